"""A long chunk's attention: some of the compressed past is decoded at a time, which all queries of the chunk then share.

``kernel`` rebuilds keys for every tile of queries, which is the cheapest for few of them. Where there are many, some of the
past is decoded once and attended to by a library's kernel; what comes of it is merged by log-sum-exp (Dao et al., arXiv
2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend

from spectral_compile.kernels import dense
from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.causal import askers
from spectral_compile.kernels.ledger import on_host
from spectral_compile.kernels.values import Chunk, Hidden, Past, Scoring

LEAST = 512  # queries for which decoding costs less than rebuilding keys tile by tile
AT_ONCE = 16384  # tokens that are dense at a time


def takes(query: torch.Tensor, hidden: Hidden, scoring: Scoring) -> bool:
    """Whether a chunk [B, Hq, n, D] is long, and its attention plain enough for the library's kernel."""
    if query.shape[2] < LEAST or hidden.mask is not None or not scoring.is_plain:
        return False
    return not query.is_cuda or (query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] % 8 == 0)


@without_autocast
def attend(chunk: Chunk, past: Past, scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """``reference.attend`` without a mask, holding ``AT_ONCE`` tokens of the past at a time. The host reads the ledger."""
    query, key, value, valid = chunk
    ledger, positions, _, layout = past
    batch, heads, count, dim = query.shape
    out = query.new_zeros(batch, count, heads, dim).transpose(1, 2)
    if query.is_cuda:
        from spectral_compile.kernels.attend.join import join  # Triton is there only where a GPU is
    for row, (before, coded, after, *_) in enumerate(on_host(ledger)):
        q, at = query[row], positions[row, before:after]
        if valid is None or after - before == count:
            mixed, total = _attention(q, dense.rotate(key[row], at, layout.rotary), value[row], scale, causal=True)
            mixed, total = mixed.float(), total.contiguous()
        else:
            tokens = valid[row].nonzero()[:, 0]
            k, v = dense.rotate(key[row][:, tokens], at, layout.rotary), value[row][:, tokens]
            mixed = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            total = mixed.new_full(q.shape[:2], float("-inf"))
            for asking, seen in askers(valid[row]):
                if after > before:
                    own = _attention(q[:, asking], k[:, :seen], v[:, :seen], scale, causal=seen is None)
                    mixed[:, asking], total[:, asking] = own[0].float(), own[1]
        shown = None if visible is None or visible[row, :before].all() else visible[row].bool()
        for k, v in _decoded(row, before, coded, past, shown):
            if k.shape[1] == 0:
                continue
            more, more_total = _attention(q, k, v, scale)
            if query.is_cuda:
                join(mixed, total, more, more_total)
            else:
                mixed.lerp_(more.float(), (more_total - total).sigmoid()[..., None])
                total = total.logaddexp(more_total)
        out[row] = mixed.to(query.dtype)
    return out


def _decoded(
    row: int, before: int, coded: int, past: Past, shown: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys (rotated) and values [H, n, D] of the first ``before`` tokens of a row, ``AT_ONCE`` at a time, in no order.

    Where there is a bool ``shown`` [N], of those tokens alone that it names.
    """

    def chosen(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        return x if kept is None else x[:, kept]

    positions, buffers, layout = past.positions[row], past.buffers, past.layout
    first = min(before, layout.first_exact)
    if before > coded:
        at = torch.cat((positions[:first], positions[first + coded : before]))
        k, v = (dense.not_coded(row, side, before, coded, buffers, layout) for side in ("k", "v"))
        kept = None if shown is None else torch.cat((shown[:first], shown[first + coded : before]))
        yield chosen(dense.rotate(k, at, layout.rotary), kept), chosen(v, kept)
    for segment, slots in dense.spans(row, coded, buffers, layout):
        for start in range(slots.start, slots.stop, AT_ONCE):
            some = slice(start, min(start + AT_ONCE, slots.stop))
            here = slice(first + some.start, first + some.stop)
            k, v = _of_segment(row, segment, some, past)
            kept = None if shown is None else shown[here]
            yield chosen(k, kept), chosen(v, kept)


def _of_segment(row: int, segment: int, slots: slice, past: Past) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated) and values [H, n, D] of coded tokens of one segment, in the model's dtype."""
    positions, buffers, layout = past.positions[row], past.buffers, past.layout
    if positions.is_cuda and not layout.lossless:
        from spectral_compile.kernels.attend.rebuild import rebuild

        return rebuild(row, segment, slots, past)
    k, v = (dense.decode(row, segment, slots, side, buffers, layout).to(buffers.k_exact.dtype) for side in ("k", "v"))
    at = positions[layout.first_exact + slots.start : layout.first_exact + slots.stop]
    return dense.rotate(k, at, layout.rotary), v


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [Hq, n, D] of queries to [H, m, D] and the logarithm [Hq, n] of the sum of its weights."""
    aten, given = torch.ops.aten, (query[None], key[None], value[None])
    if not query.is_cuda:
        out, total = aten._scaled_dot_product_flash_attention_for_cpu(*given, is_causal=causal, scale=scale)
    elif torch._fused_sdp_choice(*given, is_causal=causal, scale=scale, enable_gqa=True) == SDPBackend.CUDNN_ATTENTION.value:
        out, total, *_ = aten._scaled_dot_product_cudnn_attention(*given, None, True, is_causal=causal, scale=scale)
    else:
        out, total, *_ = aten._scaled_dot_product_flash_attention(*given, is_causal=causal, scale=scale)
    return out[0], total[0].view(query.shape[:2])
