"""Whether two versions of the kernels are the same to a GPU: their PTX for sm_90, which needs none.

    python -m tests.kernels.ptx save FILE        the PTX of many forms of all kernels; some four minutes
    python -m tests.kernels.ptx compare OLD NEW  which are the same, and which instructions of the others are not

Names of registers, labels and parameters do not count, and neither does the order of parameters.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.kernels.test_translated import without_a_gpu

NAMES = re.compile(r"%[a-z]+\d+|\$\w+|\b\w+_param_\d+\b|\bglobal_smem\b")
DIRECTIVES = (".loc", ".file", ".version", ".target", ".address_size", ".param", ".visible", ".extern", ".reg", ".maxntid")
DIRECTIVES += (".reqntid", "ld.param")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Step:
    """A step over 190 tokens of two KV heads."""

    preset: str
    dim: int
    turned: int
    columns: int
    dtype: torch.dtype
    hidden: str = ""
    segments: int = 1
    key_group: int = 2
    value_group: int = 2


STEPS = (
    *(Step(preset, 64, 64, 1, BF16) for preset in ("balanced", "compact", "seed", "exact")),
    Step("quality", 64, 0, 1, BF16),
    Step("balanced", 128, 128, 1, BF16, key_group=1, value_group=1),
    Step("balanced", 128, 128, 1, BF16, key_group=1),
    Step("compact", 64, 64, 40, BF16, key_group=2, value_group=1),
    Step("compact", 80, 32, 40, BF16),
    Step("balanced", 64, 64, 1, F16),
    Step("balanced", 64, 64, 1, F32, "mask"),
    Step("balanced", 64, 64, 40, BF16, "padding"),
    Step("balanced", 64, 64, 40, BF16, "window", 3),
    Step("balanced", 64, 64, 1, BF16, "tokens", 3),
    Step("seed", 64, 64, 3, F16, "mask", 4),
    Step("exact", 64, 64, 40, F16, "tokens"),
)


def launch(step: Step) -> None:
    """What such a step launches."""
    from spectral_compile.codec import PRESETS, Rotary
    from spectral_compile.kernels.append.fit import fit
    from spectral_compile.kernels.append.kernel import ChunkWriter
    from spectral_compile.kernels.attend.kernel import attend
    from spectral_compile.kernels.buffers import Capacity, allocate
    from spectral_compile.kernels.ledger import LedgerRow
    from spectral_compile.kernels.values import Chunk, Hidden, Past, Scoring

    count, turned = step.columns, step.turned
    rotary = Rotary(tuple(1e4 ** (-2 * i / turned) for i in range(turned // 2))) if turned else None
    groups = {"key_group": step.key_group, "value_group": step.value_group}
    layout = replace(PRESETS[step.preset], **groups).layout(2, step.dim, rotary)
    layout = replace(layout, recent=20, block=32, warmup=64)
    buffers = allocate(layout, 1, Capacity(512, 64, step.segments), step.dtype, "cpu")
    query, key = (torch.zeros(1, heads, count, step.dim, dtype=step.dtype) for heads in (8, 2))
    chunk = Chunk(query, key, key, torch.ones(1, count, dtype=torch.bool) if step.hidden == "padding" else None)
    ledger, positions = torch.tensor([[190, 160, 190 + count, 160, 0, 0]]), torch.zeros(1, 512, dtype=torch.int32)
    mask, columns = torch.ones(1, 1, count, 190 + count, dtype=torch.bool), torch.ones(1, 190, dtype=torch.bool)
    visible = torch.ones(1, 512, dtype=torch.uint8)
    hidden = {"mask": Hidden(mask, columns), "tokens": Hidden(visible=visible)}.get(step.hidden, Hidden())
    scoring = Scoring(0.125, 30, 20.0, torch.zeros(8)) if step.hidden == "window" else Scoring(0.125)
    attend(chunk, Past(ledger, positions, buffers, layout), scoring, hidden, enters=count == 1)
    writer = ChunkWriter(chunk, ledger, buffers, layout)
    writer.write(2, keep=False)
    writer.write(0, keep=True)
    if count > 1:
        writer.add_moment(False)
        if not layout.lossless:
            fit(writer, [LedgerRow(190, 160, 190 + count, 224, 0, 0)], torch.ones(1, layout.groups, count))


def launch_others() -> None:
    """The ledger, hidden tokens, token weights and steps."""
    from spectral_compile.codec import PRESETS
    from spectral_compile.kernels.advance import kernel as advancing
    from spectral_compile.kernels.importance.kernel import token_weights

    ledger, positions = torch.tensor([[190, 160, 190, 160, 0, 0]]), torch.zeros(1, 512, dtype=torch.int32)
    for count in (1, 40):
        for valid in (None, torch.ones(1, count, dtype=torch.bool)):
            for ids in (None, torch.zeros(1, count, dtype=torch.int64)):
                chunk = torch.zeros(1, 2, count, 64)
                advancing.advance(ledger, positions, ids, valid, chunk, PRESETS["balanced"].layout(2, 64))
    columns, shown = torch.ones(1, 190, dtype=torch.bool), torch.ones(1, 190, dtype=torch.int64)
    advancing.hide(torch.ones(1, 512, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32), columns, shown)
    for dtype in (F32, BF16):
        for valid in (None, torch.ones(1, 600, dtype=torch.bool)):
            query, key = torch.zeros(1, 8, 72, 64, dtype=dtype), torch.zeros(1, 2, 600, 64, dtype=dtype)
            sampled = torch.zeros(1, 72, dtype=torch.int64)
            token_weights(query, sampled, sampled, sampled, key, valid, 0.1, 2)


def save(path: Path) -> None:
    known = without_a_gpu()
    known.to_the_end, made = True, {}
    for name, run in [*((str(step), lambda step=step: launch(step)) for step in STEPS), ("the others", launch_others)]:
        known.kernels.clear()
        run()
        made[name] = [[kernel.name, kernel.asm["ptx"]] for kernel in known.kernels]
        print(name, flush=True)
    path.write_text(json.dumps(made))


def instructions(ptx: str) -> Iterator[str]:
    """One by one, without names."""
    for line in ptx.partition(".section")[0].splitlines():
        line = line.split("//")[0].strip()
        if line and not line.startswith(DIRECTIVES):
            yield NAMES.sub("_", line)


def compare(old: Path, new: Path) -> bool:
    """Print how the kernels differ; whether none does."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    verdicts: Counter[str] = Counter()
    for name in before | after:
        pair = before.get(name, []), after.get(name, [])
        if len(pair[0]) != len(pair[1]):
            verdicts["not in both"] += 1
            print(f"{name}: {len(pair[0])} kernels and {len(pair[1])}")
        for (kernel, theirs), (_, ours) in zip(*pair, strict=False):
            a, b = (list(instructions(ptx)) for ptx in (theirs, ours))
            verdict = "same sequence" if a == b else "same instructions" if Counter(a) == Counter(b) else "different"
            verdicts[verdict] += 1
            if verdict == "different":
                print(f"{name}: {kernel}: {dict(Counter(a) - Counter(b))} became {dict(Counter(b) - Counter(a))}")
    print(dict(verdicts))
    return not verdicts["different"] and not verdicts["not in both"]


if __name__ == "__main__":
    command, *files = sys.argv[1:]
    if command == "save":
        save(Path(files[0]))
    elif not compare(*map(Path, files)):
        sys.exit(1)
