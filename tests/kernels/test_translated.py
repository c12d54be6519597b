"""Kernels are translated for a GPU that need not be there: the interpreter, in which the other tests run, checks no types."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.budget import FULL, combinations

SHARED = 232448  # bytes of shared memory that a program may have on an H100
FORMS = combinations(("balanced", "seed", "exact"), (0, 32, 64), (1, 3), ("no mask", "mask"))
HIDING = combinations(("balanced", "seed", "exact"), (32,), (1, 3), ("hidden tokens",))
LATENT = combinations(("balanced", "seed"), (0, 64), (1, 3), ("in the latent",))[:: 1 if FULL else 2]
DECODE, CHUNK = ("balanced", 64, 1, "window"), ("compact", 64, 40, "window")  # in 16 bits; the first is compiled to the end
ALL = (*FORMS, *HIDING, *LATENT, DECODE, CHUNK)
CASES = {f"{form[0]}, RoPE of {form[1]} of {max(form[1], 64)} channels, {form[2]} queries, {form[3]}": form for form in ALL}


@dataclass
class Compiled:
    """The kernels that were launched, and whether they were more than typed."""

    kernels: list[Any] = field(default_factory=list)
    to_the_end: bool = False


def test_every_form_of_a_step_is_translated(tmp_path: Path) -> None:
    """A mask, and channels that RoPE leaves alone, once stopped Triton's translation, on GPUs alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # nobody is to find these kernels, which hold no code
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_translated"], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    wanted = {name: "compiled" if case == DECODE else "translated" for name, case in CASES.items()}
    assert json.loads(done.stdout) == wanted


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 120] if FULL else [80])
def test_scores_in_the_latent_compile_for(architecture: int, tmp_path: Path) -> None:
    """From A100s on, with no spill in the loop over tokens, and with shared memory that any of these GPUs has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    form = "Llama-3-8B, compact"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sass", str(architecture), form],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    found = re.fullmatch(rf"\| {form} \| {architecture} \| \d+ \| \d+ \| (\d+) \+ (\d+) \| \d+ \| (\d+) \| (\d+) \|", row)
    assert found is not None, row
    named, dynamic, products, spills = map(int, found.groups())
    assert named + dynamic <= 99 << 10 and products == 62 and spills == 0


def without_a_gpu() -> Compiled:
    """Make Triton take an H100 for granted and launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """Of a GPU what a compiler asks for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    known, whole, run = Compiled(), CUDABackend.add_stages, JITFunction.run

    def add_stages(self: CUDABackend, stages: dict, *rest: object) -> None:
        whole(self, stages, *rest)
        if known.to_the_end:
            return
        for stage in ("ttgir", "llir", "ptx"):
            del stages[stage]

        def nothing(source: object, metadata: dict) -> bytes:
            metadata |= {"shared": 0, "name": "nothing"}
            return b""

        stages["cubin"] = nothing

    def compiled(self: JITFunction, *given: object, warmup: bool, **options: object) -> object:
        known.kernels.append(run(self, *given, warmup=True, **options))
        return known.kernels[-1]

    driver.set_active(Absent())
    CUDABackend.add_stages, JITFunction.run = add_stages, compiled
    return known


def step(preset: str, turned: int, count: int, hidden: str) -> None:
    """Launch what a step over 190 tokens of 2 KV heads launches on a GPU."""
    from spectral_compile.codec import PRESETS, Rotary
    from spectral_compile.kernels.advance import kernel as advance_kernel
    from spectral_compile.kernels.append.fit import fit
    from spectral_compile.kernels.append.kernel import ChunkWriter
    from spectral_compile.kernels.attend.join import join
    from spectral_compile.kernels.attend.kernel import attend
    from spectral_compile.kernels.attend.plan import override
    from spectral_compile.kernels.attend.rebuild import rebuild
    from spectral_compile.kernels.buffers import Capacity, allocate
    from spectral_compile.kernels.ledger import LedgerRow
    from spectral_compile.kernels.values import Chunk, Hidden, Past, Scoring

    dtype = torch.bfloat16 if hidden in ("window", "in the latent") else torch.float32
    dim = max(turned, 64)
    rotary = Rotary(tuple(1e4 ** (-2 * i / dim) for i in range(turned // 2))) if turned else None
    layout = replace(PRESETS[preset].layout(2, dim, rotary), recent=20, block=32, warmup=64)
    buffers = allocate(layout, 1, Capacity(512, 64, 4 if layout.segment else 1), dtype, "cpu")
    query, key = torch.zeros(1, 8, count, dim, dtype=dtype), torch.zeros(1, 2, count, dim, dtype=dtype)
    ledger, positions = torch.tensor([[190, 160, 190 + count, 160, 0, 0]]), torch.zeros(1, 512, dtype=torch.int32)
    mask = columns = visible = None
    override({"latent": int(hidden == "in the latent")})
    if hidden == "hidden tokens":
        visible = torch.ones(1, 512, dtype=torch.uint8)
        flags = torch.zeros(1, dtype=torch.int32)
        advance_kernel.hide(visible, flags, torch.ones(1, 190, dtype=torch.bool), torch.ones(1, 190, dtype=torch.int64))
    if hidden == "mask":
        mask, columns = torch.ones(1, 1, count, 190 + count, dtype=torch.bool), torch.ones(1, 190, dtype=torch.bool)
    scoring = Scoring(0.125, sliding_window=30, softcap=20.0) if hidden == "window" else Scoring(0.125)
    chunk, past = Chunk(query, key, key), Past(ledger, positions, buffers, layout)
    attend(chunk, past, scoring, Hidden(mask, columns, visible), enters=count == 1)
    if count > 1:
        writer = ChunkWriter(chunk, ledger, buffers, layout)
        writer.add_moment(False)
        writer.write(2, False)
        writer.write(0, True)
        if not layout.lossless:
            fit(writer, [LedgerRow(190, 160, 190 + count, 224, 0, 0)], torch.ones(1, layout.groups, count))
            key, value = rebuild(0, 0, slice(0, 160), past)
            join(key.float(), torch.zeros(2, 160), value, torch.zeros(2, 160))


def main() -> None:
    """Print a JSON object: for each of ``CASES`` "translated", for the decode step "compiled", or what stood in the way."""
    known, came_to = without_a_gpu(), {}
    for name, case in CASES.items():
        known.to_the_end = case == DECODE
        known.kernels.clear()
        try:
            step(*case)
            came_to[name] = "translated"
            if known.to_the_end:
                most = max(kernel.metadata.shared for kernel in known.kernels)
                came_to[name] = "compiled" if most <= SHARED else f"{most} bytes of shared memory"
        except Exception as error:
            came_to[name] = str(error)
    print(json.dumps(came_to, indent=1))


if __name__ == "__main__":
    main()
