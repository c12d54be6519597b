"""The ledger as kernels read it, and as launchers do that must know it on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_compile.kernels import buffers

COLUMNS: tl.constexpr = tl.constexpr(buffers.LEDGER)

_read: dict[int, list[list[int]]] = {}  # ledgers by address as this step left them, which all layers read


@triton.jit
def books(ledger, b):
    """Of one row: tokens and coded tokens before this step, and the same after it, int32."""
    row = ledger + b * COLUMNS
    before, coded = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    return before, coded, tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)


def on_host(ledger: torch.Tensor) -> list[list[int]]:
    """The rows of a ledger; the first layer of a step waits for the GPU."""
    key = ledger.data_ptr()
    if key not in _read:
        _read[key] = ledger.tolist()
    return _read[key]


def forget() -> None:
    """A step begins, and what ``on_host`` has read no longer holds."""
    _read.clear()
