"""A step enters the ledger, in PyTorch."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.ledger import LedgerRow


def advance(
    ledger: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    chunk: torch.Tensor,
    layout: Layout,
) -> None:
    """Enter the columns of ``chunk`` [B, H, count, D] in the ledger and the positions that all layers share.

    Rows are independent: each has its own count of tokens, so that padding and neighbours never reach a row's codes.

    ``ledger`` int64 [B, 6] and ``positions`` int32 [B, N] are updated; ``position_ids`` is int [1 or B, count] (tokens are
    numbered on where it is None), ``valid`` bool [B, count] leaves padding out. The last slot of ``positions`` is scratch.

    A step of one column never begins a segment, so that no decode step computes a basis: what it leaves to be coded is done
    by a step of no columns, which follows when ``Timeline.catch_up`` says so.
    """
    batch, count = ledger.shape[0], chunk.shape[2]
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=ledger.device)
    held = LedgerRow(*ledger.clone().unbind(1))
    before, coded, waiting = held.after, held.coded_after, held.waiting
    slot = before[:, None] + valid.cumsum(1) - 1
    new = slot if position_ids is None else position_ids.expand(batch, count)
    positions.scatter_(1, torch.where(valid, slot, positions.shape[1] - 1), new.to(torch.int32))
    previous = positions.gather(1, (slot - 1).clamp(min=0))
    gaps = held.gaps + (valid & (slot > 0) & (new != previous + 1)).sum(1)
    after = before + valid.sum(1)
    ready = (after - layout.first_exact - layout.recent - coded).clamp(min=0)
    step = ready // layout.block * layout.block
    if count == 1:
        step = torch.zeros_like(step) if layout.segment else torch.where(waiting > 0, 0, step)
    else:
        waiting = waiting * (ready < layout.first)
        step = torch.where(waiting > 0, 0, step)
    ledger.copy_(torch.stack(LedgerRow(before, coded, after, coded + step, waiting, gaps), 1))
