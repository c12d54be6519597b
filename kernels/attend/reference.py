"""Attention of a chunk over a compressed past, in PyTorch: the truth that the kernels are held against."""

from __future__ import annotations

import torch

from spectral_compile import codec
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels import dense
from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import LedgerRow, rows_of
from spectral_compile.kernels.values import NOTHING_HIDDEN, Chunk, Hidden, Past, Scoring


@without_autocast
def attend(chunk: Chunk, past: Past, scoring: Scoring, hidden: Hidden = NOTHING_HIDDEN) -> torch.Tensor:
    """Attention of a chunk over the compressed past and over itself (causal), merged in one softmax.

    The past is what stood in the store before this step. Returns [B, Hq, n, D]; a query that may see nothing gives zeros.
    """
    query, key, value, valid = chunk
    ledger, positions, buffers, layout = past
    batch, q_heads, count, dim = query.shape
    out = query.new_zeros(batch, count, q_heads, dim).transpose(1, 2)
    for row, counts in enumerate(rows_of(ledger)):
        before, coded, after = counts[:3]
        keep = torch.ones(count, dtype=torch.bool, device=query.device) if valid is None else valid[row]
        where = positions[row, :after]
        chunk_k, chunk_v = dense.rotate(key[row][:, keep], where[before:], layout.rotary), value[row][:, keep]
        in_first = min(before, layout.first_exact)
        old = slice(in_first, in_first + coded)  # tokens that are coded, between the first ones and the recent ones
        exact_at = torch.cat((where[: old.start], where[old.stop : before]))
        exact_k = dense.rotate(dense.not_coded(row, "k", before, coded, buffers, layout), exact_at, layout.rotary)

        q = query[row].float().reshape(layout.kv_heads, -1, dim) * scoring.scale  # queries of a KV head side by side
        scores = q.new_empty(*q.shape[:2], after)
        exact = q @ exact_k.float().mT
        scores[..., : old.start], scores[..., old.stop : before] = exact[..., : old.start], exact[..., old.start :]
        scores[..., before:] = q @ chunk_k.float().mT
        for segment, slots in dense.spans(row, coded, buffers, layout):
            k = dense.decode(row, segment, slots, "k", buffers, layout)
            k = dense.rotate(k, where[layout.first_exact + slots.start : layout.first_exact + slots.stop], layout.rotary)
            scores[..., layout.first_exact + slots.start : layout.first_exact + slots.stop] = q @ k.float().mT

        allowed = allowed_of(row, counts, keep, hidden, scoring.sliding_window)
        if scoring.softcap:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        scores = scores.unflatten(1, (-1, count)).masked_fill(~allowed, float("-inf"))
        if scoring.sink_score is not None:
            taken = scoring.sink_score.float().reshape(layout.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, taken), -1)
        nothing = (scores == float("-inf")).all(-1, keepdim=True)  # a softmax of it is NaN, which keys and values may be too
        p = torch.softmax(scores, -1).masked_fill(nothing, 0.0)[..., :after].flatten(1, 2)

        mixed = p[..., before:] @ chunk_v.float()
        exact_p = torch.cat((p[..., : old.start], p[..., old.stop : before]), -1)
        mixed += exact_p @ dense.not_coded(row, "v", before, coded, buffers, layout).float()
        for segment, slots in dense.spans(row, coded, buffers, layout):
            part = p[..., layout.first_exact + slots.start : layout.first_exact + slots.stop]
            mixed += _mix(part, row, segment, slots, buffers, layout)
        out[row] = mixed.reshape(q_heads, count, dim).to(query.dtype)
    return out


def allowed_of(row: int, counts: LedgerRow, keep: torch.Tensor, hidden: Hidden, sliding_window: int) -> torch.Tensor:
    """Which stored tokens each query of the chunk may see: bool, broadcastable to [Hq / H, n, after].

    ``keep`` bool [n] are the columns that are no padding.
    """
    allowed = _not_masked(row, counts, keep, hidden, sliding_window)
    if hidden.visible is None:
        return allowed
    shown = torch.ones(counts.after, dtype=torch.bool, device=keep.device)
    shown[: counts.before] = hidden.visible[row, : counts.before] != 0
    return allowed & shown


def _not_masked(row: int, counts: LedgerRow, keep: torch.Tensor, hidden: Hidden, sliding_window: int) -> torch.Tensor:
    token = torch.arange(counts.after, device=keep.device)
    if hidden.mask is not None:
        seen = hidden.mask[min(row, hidden.mask.shape[0] - 1)]
        count = seen.shape[-1] - len(keep)  # columns of the past
        assert hidden.columns is not None, "they come with a mask"
        stored = hidden.columns[row, :count].nonzero().flatten()
        chosen = torch.cat((stored, keep.nonzero().flatten() + count))
        if seen.shape[0] > 1:
            raise NotImplementedError("a mask that differs between heads cannot be attended to")
        return seen[..., chosen]
    own = counts.before + keep.cumsum(0) - 1  # the token that each query is
    allowed = token[None] <= own[:, None]
    return allowed & (token[None] > own[:, None] - sliding_window) if sliding_window else allowed


def _mix(p: torch.Tensor, row: int, segment: int, slots: slice, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """``p`` [H, m, n] times coded values, without decoding them: summed in the latent, then one product with the basis."""
    if layout.lossless:
        return p @ dense.ungroup(buffers.v_codes[row, :, slots], layout.v).float()
    codes, basis, affine, side = dense.coded_side("v", buffers, layout)
    latent = codec.latent(codes[row, :, slots], affine[row, :, segment], side.tiers)  # [G, n, R]
    synthesis = codec.synthesis(basis[row, :, segment], affine[row, :, segment])  # [G, R, W]
    p = p.unflatten(0, (side.groups, side.heads))
    if layout.normalised:
        p = p * codec.norm_value(buffers.v_norms[row, :, slots])[:, None, None]
    own = synthesis.unflatten(-1, (side.heads, layout.head_dim)).transpose(1, 2)  # [G, heads, R, D]
    return (p @ latent[:, None] @ own).flatten(0, 1)
