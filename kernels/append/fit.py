"""Bases of the segments that a step begins, for all rows, groups and both sides at once."""

from __future__ import annotations

import torch

from spectral_compile import codec
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append.basis import Fitted, bases
from spectral_compile.kernels.append.gram import Parts, matrices_of, sums
from spectral_compile.kernels.append.kernel import ChunkWriter
from spectral_compile.kernels.append.steps import analyse, search
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import LedgerRow, columns_of

_AT_ONCE = 4096  # tokens, in whole segments, whose bases are computed at a time: each leaves matrices until it is stored


def fit(writer: ChunkWriter, rows: list[LedgerRow], token_weight: torch.Tensor | None) -> None:
    """Begin the segments that are due, as ``reference.append`` does before it codes; ``rows`` is the ledger on the host.

    What is decided by the tokens themselves is decided on the device.
    """
    layout = writer.layout
    counts = [coded_after - coded for _, coded, _, coded_after, *_ in rows]
    may = [
        count > 0 and (coded == 0 or layout.segment > 0 or count >= layout.warmup)
        for count, (_, coded, *_) in zip(counts, rows, strict=True)
    ]
    if not any(may):
        return
    longest, anew = max(counts), all(coded == 0 for _, coded, *_ in rows)
    if one_basis(layout, rows):
        fits(writer, Parts(0, 1, longest), counts, token_weight, Fitted.of(writer.buffers))
        writer.buffers.starts[:, 0] = columns_of(writer.ledger).coded
        return
    length, current = layout.segment or longest, _current(writer)
    run = max(1, _AT_ONCE // length)
    for first in range(0, -(-longest // length), run):
        parts = Parts(first, min(run, -(-longest // length) - first), length)
        fitted = Fitted.blank(writer.buffers, len(rows), parts.count)
        _begin(writer, current, parts, fitted, fits(writer, parts, counts, token_weight, fitted), anew)


def one_basis(layout: Layout, rows: list[LedgerRow]) -> bool:
    """Whether each row begins its first segment, for all that this step codes, as the host knows."""
    return not layout.segment and all(row.coded == 0 and row.coded_after > 0 for row in rows)


def fits(
    writer: ChunkWriter, parts: Parts, counts: list[int], token_weight: torch.Tensor | None, fitted: Fitted
) -> torch.Tensor:
    """Write a basis and steps for each part to ``fitted``; its sums of products, float32 [2, B, G, parts, numbers].

    ``counts`` are those of the tokens that some row codes; ``token_weight`` float32 [B, G, n] counts if the layout asks.
    """
    gram = bases(writer, sums(writer, parts, token_weight if writer.layout.token_weighted else None), fitted)
    search(analyse(writer, parts, counts, fitted), fitted, writer.geometry, writer.layout.margin)
    return gram


def _current(writer: ChunkWriter) -> torch.Tensor:
    """The segment of each row's last coded token, -1 where there is none: int64 [B, 1]."""
    return (writer.buffers.starts <= columns_of(writer.ledger).coded[:, None]).sum(1, keepdim=True) - 1


def _begin(writer: ChunkWriter, current: torch.Tensor, parts: Parts, fitted: Fitted, gram: torch.Tensor, anew: bool) -> None:
    """Store the bases of ``parts`` of the coded tokens in rows where they begin a segment.

    ``current`` int64 [B, 1] is the segment that a row had before this step, and ``anew`` says that none had one.
    """
    buffers, layout, rows = writer.buffers, writer.layout, columns_of(writer.ledger)
    segments = buffers.starts.shape[1]
    part = parts.first + torch.arange(parts.count, device=buffers.starts.device)
    first = rows.coded[:, None] + part * parts.length  # [B, parts], as all that follows
    count = (rows.coded_after[:, None] - first).clamp(max=parts.length)
    new = current + 1 + part
    takes = (count > 0) & (new < segments)
    if not layout.segment and not anew:
        takes &= (current < 0) | ((count >= layout.warmup) & ~_serves(buffers, layout, current, gram, fitted))

    # the part that each segment begins with, if one of these does: what is written depends on no order of writing
    chosen = torch.arange(segments, device=buffers.starts.device) - new[:, :1]  # [B, S]
    begins = (chosen >= 0) & (chosen < parts.count)
    chosen = chosen.clamp(0, parts.count - 1)
    begins &= takes.gather(1, chosen)
    buffers.starts.copy_(torch.where(begins, first.gather(1, chosen), buffers.starts))
    row = torch.arange(len(rows.coded), device=buffers.starts.device)[:, None]
    for buffer, x in zip(Fitted.of(buffers).tensors, fitted.tensors, strict=True):
        x = x.transpose(1, 2)[row, chosen].transpose(1, 2)  # [B, G, S, ...]
        buffer.copy_(torch.where(begins[:, None, :].reshape(len(row), 1, segments, *[1] * (x.ndim - 3)), x, buffer))


def _serves(buffers: Buffers, layout: Layout, current: torch.Tensor, gram: torch.Tensor, fitted: Fitted) -> torch.Tensor:
    """Whether the basis of a row's segment captures its tokens nearly as well as the new one: bool [B, 1]."""
    row, segment = torch.arange(len(current), device=current.device), current[:, 0].clamp(min=0)
    serves, held, new = torch.ones_like(current, dtype=torch.bool), Fitted.of(buffers).tensors, fitted.tensors
    for side, how in enumerate((layout.k, layout.v)):
        x = matrices_of(gram[side], how)[:, :, 0]
        lost = codec.gram_residual(x, held[side].mT[row, :, segment], held[side + 2][row, :, segment])
        least = codec.gram_residual(x, new[side].mT[:, :, 0], new[side + 2][:, :, 0])
        serves &= (lost <= codec.REFRESH * least).all(1, keepdim=True)
    return serves
