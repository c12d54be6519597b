"""Bases of the segments that a step begins, for all rows, groups and both sides at once, from Gram matrices of their tokens."""

from __future__ import annotations

import torch

from spectral_compile import codec
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append import eigen
from spectral_compile.kernels.append.kernel import ChunkWriter
from spectral_compile.kernels.append.steps import search_step
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import LedgerRow, columns_of

_AT_ONCE = 4096  # tokens that are gathered at a time


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
    longest, weight = max(counts), _weights(writer)
    token_scale = None if token_weight is None or not layout.token_weighted else _token_scale(writer, token_weight, counts)
    anew = all(coded == 0 for _, coded, *_ in rows)
    if not layout.segment:
        gram = None
        for at in range(0, longest, _AT_ONCE):
            x = writer.gather(at, min(_AT_ONCE, longest - at))[:, :, :, None]
            part = _gram(x if token_scale is None else x * token_scale[:, :, None, at : at + _AT_ONCE, None])
            gram = part if gram is None else gram + part
        assert gram is not None, "some row has tokens to code"
        most = max(-(-count // max(1, count // codec.SAMPLE)) for count in counts)
        sample = writer.gather(0, most, codec.SAMPLE)[:, :, :, None]
        if anew and min(counts) > 0:
            _begin_first(writer, _fits(layout, gram, sample, weight))
        else:
            _begin(writer, _current(writer), 0, longest, gram, sample, weight, anew)
        return
    length, current = layout.segment, _current(writer)
    run = length * max(1, _AT_ONCE // length)
    for at in range(0, longest, run):
        parts = -(-min(run, longest - at) // length)
        x = writer.gather(at, parts * length).unflatten(3, (parts, length))
        _begin(writer, current, at // length, length, _gram(x), x[..., :: max(1, length // codec.SAMPLE), :], weight, anew)


def eigenbasis(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The ``rank`` leading eigenvectors of positive semidefinite matrices, largest first; on a GPU, near ones mixed.

    float32 [..., W, W] -> float32 [..., W, rank].
    """
    if gram.is_cuda:
        return eigen.eigenbasis(gram, rank)  # eigh waits for each matrix
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank]


def _weights(writer: ChunkWriter) -> torch.Tensor:
    """How much each channel of keys and values counts, with mean 1: float32 [2, B, G, W]."""
    layout, moment = writer.layout, writer.buffers.moment
    key, value = torch.ones_like(moment), torch.ones_like(moment)
    if layout.query_weighted:
        key = codec.key_weight(moment, layout.rotary)
    both = torch.stack((key, value)).unflatten(2, (layout.groups, layout.head_group)).flatten(-2)
    return codec.even(both)


def _token_scale(writer: ChunkWriter, token_weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Of the tokens that a prompt codes, ``counts`` in each row, in the model's dtype [B, G, most of them]."""
    longest = max(counts)
    if writer.chunk.index is None and min(counts) == longest:
        chosen = token_weight.narrow(2, writer.layout.first_exact, longest)
        return codec.token_scale(chosen).to(writer.chunk.key.dtype)
    token = writer.layout.first_exact + torch.arange(longest, device=token_weight.device)
    counted = token < writer.layout.first_exact + columns_of(writer.ledger).coded_after[:, None]
    column, index = token.expand(len(counted), -1), writer.chunk.index
    if index is not None:
        column = index.gather(1, counted * token).long()
    chosen = token_weight.gather(2, column[:, None].expand(-1, token_weight.shape[1], -1))
    return codec.token_scale(chosen, counted[:, None]).to(writer.chunk.key.dtype)


def _gram(x: torch.Tensor) -> torch.Tensor:
    """Sums of products of channels over tokens: [..., n, W] -> float32 [..., W, W]."""
    flat = x.flatten(0, -3)
    if x.is_cuda and x.dtype != torch.float32:
        out = torch.bmm(flat.mT, flat, out_dtype=torch.float32)
    else:
        flat = flat.float()
        out = flat.mT @ flat
    return out.unflatten(0, x.shape[:-2])


def _current(writer: ChunkWriter) -> torch.Tensor:
    """The segment of each row's last coded token, -1 where there is none: int64 [B, 1]."""
    return (writer.buffers.starts <= columns_of(writer.ledger).coded[:, None]).sum(1, keepdim=True) - 1


def _fits(
    layout: Layout, gram: torch.Tensor, sample: torch.Tensor, weight: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Basis and affine numbers of each part, for keys and for values; arguments as ``_begin`` takes them."""
    weight = weight[:, :, :, None].expand(gram.shape[:-1])
    search = search_step if gram.is_cuda else codec.search_step
    vectors = eigenbasis(gram * weight[..., None, :] * weight[..., None], max(layout.key.rank, layout.value.rank))
    return [
        codec.rounded(
            vectors[i, ..., : tiers.rank], sample[i] * weight[i, ..., None, :], weight[i], tiers, layout.margin, search
        )
        for i, tiers in enumerate((layout.key, layout.value))
    ]


def _held(buffers: Buffers) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Basis and affine numbers of all segments as they are stored, for keys and for values, in the shapes of ``_fits``."""
    return (buffers.k_basis.mT, buffers.k_affine), (buffers.v_basis.mT, buffers.v_affine)


def _begin_first(writer: ChunkWriter, fits: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """``_begin`` of what the host knows to begin the first segment of each row: a prompt waits for few launches."""
    for old, fitted in zip(_held(writer.buffers), fits, strict=True):
        for buffer, x in zip(old, fitted, strict=True):
            buffer[:, :, 0] = x[:, :, 0]
    writer.buffers.starts[:, 0] = columns_of(writer.ledger).coded


def _begin(
    writer: ChunkWriter,
    current: torch.Tensor,
    at: int,
    length: int,
    gram: torch.Tensor,
    sample: torch.Tensor,
    weight: torch.Tensor,
    anew: bool,
) -> None:
    """Write the bases of parts ``at``, ``at + 1``, ... of ``length`` coded tokens each, in rows where they begin a segment.

    ``current`` int64 [B, 1] is the segment that a row had before this step, and ``anew`` says that none had one. gram: float32
    [2, B, G, parts, W, W]; sample: the model's dtype [2, B, G, parts, n, W]; weight: float32 [2, B, G, W].
    """
    buffers, layout, rows = writer.buffers, writer.layout, columns_of(writer.ledger)
    parts, segments = gram.shape[3], buffers.starts.shape[1]
    fits = _fits(layout, gram, sample, weight)

    part = at + torch.arange(parts, device=buffers.starts.device)
    first = rows.coded[:, None] + part * length  # [B, parts], as all that follows
    count = (rows.coded_after[:, None] - first).clamp(max=length)
    new = current + 1 + part
    takes = (count > 0) & (new < segments)
    if not layout.segment and not anew:
        takes &= (current < 0) | ((count >= layout.warmup) & ~_serves(buffers, current, gram, fits))

    # the part that each segment begins with, if one of these does: what is written depends on no order of writing
    chosen = torch.arange(segments, device=buffers.starts.device) - new[:, :1]  # [B, S]
    begins = (chosen >= 0) & (chosen < parts)
    chosen = chosen.clamp(0, parts - 1)
    begins &= takes.gather(1, chosen)
    buffers.starts.copy_(torch.where(begins, first.gather(1, chosen), buffers.starts))
    row = torch.arange(len(rows.coded), device=buffers.starts.device)[:, None]
    for old, fitted in zip(_held(buffers), fits, strict=True):
        for buffer, x in zip(old, fitted, strict=True):
            x = x.transpose(1, 2)[row, chosen].transpose(1, 2)  # [B, G, S, ...]
            buffer.copy_(torch.where(begins[:, None, :].reshape(len(row), 1, segments, *[1] * (x.ndim - 3)), x, buffer))


def _serves(
    buffers: Buffers, current: torch.Tensor, gram: torch.Tensor, fits: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Whether the basis of a row's segment captures its tokens nearly as well as the new one: bool [B, 1]."""
    row, segment = torch.arange(len(current), device=current.device), current[:, 0].clamp(min=0)
    serves = torch.ones_like(current, dtype=torch.bool)
    for x, (basis, affine), new in zip(gram[:, :, :, 0], _held(buffers), fits, strict=True):
        lost = codec.gram_residual(x, basis[row, :, segment], affine[row, :, segment])
        least = codec.gram_residual(x, *(part[:, :, 0] for part in new))
        serves &= (lost <= codec.REFRESH * least).all(1, keepdim=True)
    return serves
