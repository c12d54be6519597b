"""The ledger and the positions of a step, and what its mask hides, as one kernel each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.arguments import LEDGER_COLUMNS, as_bytes
from spectral_compile.kernels.ledger import forget


class Schedule(NamedTuple):
    """When the tokens of a layout are coded; see ``Layout``."""

    first_exact: int
    recent: int
    block: int
    first: int
    in_segments: bool

    @classmethod
    def of(cls, layout: Layout) -> Schedule:
        return cls(layout.first_exact, layout.recent, layout.block, layout.first, layout.segment > 0)


class Columns(NamedTuple):
    """The columns of a chunk: their positions int [B, n], which of them are tokens uint8 [B, n], and distances in memory."""

    ids: torch.Tensor | None
    valid: torch.Tensor | None
    ids_row: int
    ids_column: int
    valid_row: int


@triton.jit(do_not_specialize=["n", "slots"])
def _advance_kernel(ledger, positions, columns, n, slots, S: tl.constexpr, ONE: tl.constexpr, TILE: tl.constexpr):
    """One row of the ledger, whose columns are those of ``LedgerRow``; a single warp, since each loads what another stored."""
    b = tl.program_id(0).to(tl.int64)
    row = ledger + b * LEDGER_COLUMNS
    before, coded, waiting = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    gaps = tl.load(row + 5)
    after = before
    for start in range(0, n, TILE):
        column = start + tl.arange(0, TILE)
        keep = column < n
        if columns.valid is not None:
            keep = keep & (tl.load(columns.valid + b * columns.valid_row + column, mask=keep, other=0) != 0)
        counted = keep.to(tl.int32)
        slot = after + tl.cumsum(counted, 0) - 1
        if columns.ids is not None:
            ids = columns.ids + b * columns.ids_row + column * columns.ids_column
            new = tl.load(ids, mask=keep, other=0).to(tl.int32)
        else:
            new = slot.to(tl.int32)
        tl.store(positions + b * slots + slot, new, mask=keep)
        tl.debug_barrier()
        follows = keep & (slot > 0)
        previous = tl.load(positions + b * slots + slot - 1, mask=follows, other=0)
        gaps += tl.sum((follows & (new != previous + 1)).to(tl.int32), 0)
        after += tl.sum(counted, 0)
    ready = tl.maximum(after - S.first_exact - S.recent - coded, 0)
    step = ready // S.block * S.block
    if ONE:
        step = tl.where((waiting > 0) | S.in_segments, 0, step)
    else:
        waiting = tl.where(ready < S.first, waiting, 0)
        step = tl.where(waiting > 0, 0, step)
    tl.store(row, before)
    tl.store(row + 1, coded)
    tl.store(row + 2, after)
    tl.store(row + 3, coded + step)
    tl.store(row + 4, waiting)
    tl.store(row + 5, gaps)


@triton.jit(do_not_specialize=["n", "slots"])
def _hide_kernel(visible, flags, columns, shown, n, slots, columns_row, shown_row, shown_column, TILE: tl.constexpr):
    """``hide.hide`` of ``TILE`` columns of a row, of which a program counts the tokens before its own by itself."""
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    t = tl.arange(0, TILE)
    before = tl.zeros([TILE], tl.int32)
    for start in range(0, first, TILE):
        before += tl.load(columns + b * columns_row + start + t).to(tl.int32)
    column = first + t
    held = tl.load(columns + b * columns_row + column, mask=column < n, other=0) != 0
    seen = tl.load(shown + b * shown_row + column * shown_column, mask=column < n, other=0) != 0
    slot = tl.sum(before, 0) + tl.cumsum(held.to(tl.int32), 0) - 1
    tl.store(visible + b * slots + slot, seen.to(tl.uint8), mask=held)
    found = tl.max((held & (seen == 0)).to(tl.int32), 0) + 2 * tl.max((seen & (held == 0)).to(tl.int32), 0)
    tl.atomic_or(flags + b, found)


def advance(
    ledger: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    chunk: torch.Tensor,
    layout: Layout,
) -> None:
    """``reference.advance`` in one launch, which begins a step: an append follows no other change of its ledger.

    The scratch slot of ``positions`` is left alone.
    """
    forget()
    batch, count = ledger.shape[0], chunk.shape[2]
    ids = position_ids if position_ids is None else position_ids.expand(batch, count)
    valid = as_bytes(valid)
    columns = Columns(ids, valid, *((0, 0) if ids is None else ids.stride()), 0 if valid is None else valid.stride(0))
    one = count == 1
    _advance_kernel[(batch,)](
        ledger, positions, columns, count, positions.shape[1],
        S=Schedule.of(layout), ONE=one, TILE=16 if one else 512, num_warps=1,
    )  # fmt: skip


def hide(visible: torch.Tensor, flags: torch.Tensor, columns: torch.Tensor, shown: torch.Tensor) -> None:
    """``hide.hide`` in one launch, and one that clears ``flags``."""
    shown, tile = shown.view(torch.uint8) if shown.dtype == torch.bool else shown, 2048
    flags.zero_()
    _hide_kernel[(len(visible), max(1, triton.cdiv(shown.shape[1], tile)))](
        visible, flags, columns.view(torch.uint8), shown, shown.shape[1], visible.shape[1], columns.stride(0), *shown.stride(),
        TILE=tile, num_warps=8,
    )  # fmt: skip
