"""What a GPU would run of attention in the latent, counted without one: registers, spills, shared memory and the main loop.

    python -m tests.kernels.sass [SM or form ...]    of these forms and architectures, or of all that there are

The main loop takes 32 tokens of one KV head and four queries. Instructions are those of the machine, by NVIDIA's own tools,
which come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.kernels.test_translated import without_a_gpu

ARCHITECTURES = (80, 86, 89, 90, 120)
TRANSPOSED, OFTEN = "MOVM", 4  # the loop over coded tokens transposes weights so often, and no smaller one does


@dataclass(frozen=True)
class Form:
    """One column of a model in bfloat16."""

    preset: str
    dim: int
    kv_heads: int
    query_heads: int  # of a KV head
    turned: int
    theta: float
    key_group: int | None = None
    value_group: int | None = None


FORMS = {
    "Llama-3-8B, balanced": Form("balanced", 128, 8, 4, 128, 5e5),
    "Llama-3-8B, compact": Form("compact", 128, 8, 4, 128, 5e5),
    "Llama-3-8B, quality": Form("quality", 128, 8, 4, 128, 5e5),
    "Llama-3-8B, balanced, values of 2": Form("balanced", 128, 8, 4, 128, 5e5, 1, 2),
    "Llama-3-8B, balanced, values of 4": Form("balanced", 128, 8, 4, 128, 5e5, 1, 4),
    "Llama-3-8B, balanced, keys of 2": Form("balanced", 128, 8, 4, 128, 5e5, 2, 1),
    "Llama-3-8B, compact, values of 2": Form("compact", 128, 8, 4, 128, 5e5, 1, 2),
    "Llama-3-8B, quality, values of 2": Form("quality", 128, 8, 4, 128, 5e5, 1, 2),
    "Llama-3-8B, seed": Form("seed", 128, 8, 4, 128, 5e5),
    "SmolLM2, balanced": Form("balanced", 64, 3, 3, 64, 1e5),
    "Llama-2, balanced": Form("balanced", 128, 32, 1, 128, 1e4),
    "no RoPE, balanced": Form("balanced", 128, 8, 4, 0, 1.0),
}


@dataclass(frozen=True)
class Count:
    registers: int
    stack: int  # bytes of a thread, of which nothing need lie in the main loop
    shared: int  # bytes that are reserved by name
    dynamic: int  # and that Triton asks for beside them
    instructions: int  # of the main loop
    products: int  # of matrices, among these
    spills: int  # loads and stores of the stack, among these


def launch(form: Form) -> None:
    """A decode step of a short past; the host decides by shapes alone, so nothing need be in it."""
    from spectral_compile.codec import PRESETS, Rotary
    from spectral_compile.kernels.attend.kernel import attend
    from spectral_compile.kernels.attend.plan import override
    from spectral_compile.kernels.buffers import Capacity, allocate
    from spectral_compile.kernels.values import Chunk, Past, Scoring

    pairs = form.turned // 2
    rotary = Rotary(tuple(form.theta ** (-i / pairs) for i in range(pairs))) if pairs else None
    groups = {"key_group": form.key_group, "value_group": form.value_group} if form.key_group else {}
    layout = replace(PRESETS[form.preset], **groups).layout(form.kv_heads, form.dim, rotary)
    buffers = allocate(
        layout, 1, Capacity(1024, layout.recent + layout.block, 2 if layout.segment else 1), torch.bfloat16, "cpu"
    )
    query, key = (
        torch.zeros(1, heads, 1, form.dim, dtype=torch.bfloat16) for heads in (form.kv_heads * form.query_heads, form.kv_heads)
    )
    ledger, positions = torch.tensor([[1248, 1000, 1249, 1000, 0, 0]]), torch.zeros(1, 2048, dtype=torch.int32)
    override({"latent": 1})
    attend(Chunk(query, key, key), Past(ledger, positions, buffers, layout), Scoring(0.1), enters=True)


def count(kernel: Any) -> Count:
    """Of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used, code = (
            subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", used)
    assert found is not None, used
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)]
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\S*\s+.*?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            loops.append([line for place, line in lines if int(target[1], 16) <= place <= at])
    main = min((loop for loop in loops if sum(TRANSPOSED in line for line in loop) >= OFTEN), key=len)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in main)
    return Count(*map(int, found.groups()), kernel.metadata.shared, len(main), sum("HMMA" in line for line in main), spills)


def compiled(form: Form, architecture: int, known: Any) -> Any:
    """The attention kernel of such a step; ``known`` is what ``without_a_gpu`` gave."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    type(driver.active).get_current_target = lambda self: GPUTarget("cuda", architecture, 32)
    known.to_the_end = True
    known.kernels.clear()
    launch(form)
    return next(kernel for kernel in known.kernels if kernel.name == "attend_kernel")


def main() -> None:
    known = without_a_gpu()
    asked = sys.argv[1:]
    architectures = [int(x) for x in asked if x.isdigit()] or ARCHITECTURES
    forms = [x for x in asked if not x.isdigit()] or FORMS
    print("| form | sm | registers | stack | shared + dynamic | instructions | products | spills |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture in architectures:
        for name in forms:
            c = count(compiled(FORMS[name], architecture, known))
            row = (name, architecture, c.registers, c.stack, f"{c.shared} + {c.dynamic}", c.instructions, c.products, c.spills)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
