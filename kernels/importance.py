"""``spectral::importance``: how much attention each token of a prompt gets from a sample of its queries."""

from __future__ import annotations

import torch

from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.operation import operation

SAMPLE = 576  # queries that judge a token, over all heads of its group
_SCORES = 1 << 19  # that are there at a time


def _fake(query, key, valid, scale, head_group, least=0) -> torch.Tensor:
    return key.new_empty(key.shape[0], key.shape[1] // head_group, key.shape[2], dtype=torch.float32)


@operation(_fake)
def importance(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, scale: float, head_group: int, least: int = 0
) -> torch.Tensor:
    """Causal attention to each token over what it would get if all were alike, mean over queries at even distances.

    ``query`` [B, Hq, n, D] and ``key`` [B, H, n, D] as attention takes them; bool ``valid`` [B, n] leaves out padding, of which
    no row's figures depend. Returns float32 [B, H / head_group, n], 0 for padding, and for all of a prompt of fewer than
    ``least`` columns.
    """
    batch, heads, count, _ = query.shape
    if count < least:
        return key.new_zeros(batch, key.shape[1] // head_group, count, dtype=torch.float32)
    shown = torch.ones(batch, count, dtype=torch.bool, device=key.device) if valid is None else valid
    number = shown.cumsum(1) - 1  # which token a column is
    sample = -(-SAMPLE * key.shape[1] // (heads * head_group))
    judge = (torch.arange(1, sample + 1, device=key.device) * (number[:, -1:] + 1) // sample - 1).clamp(min=0)
    column = torch.searchsorted(number, judge).clamp(max=count - 1)
    if key.is_cuda:
        from spectral_compile.kernels.shares import shares  # Triton is there only where a GPU is

        return shares(query, key, valid, column, judge, scale, head_group)
    return _shares(query, key, valid, column, judge, scale, head_group)


@without_autocast
def _shares(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    column: torch.Tensor,
    judge: torch.Tensor,
    scale: float,
    head_group: int,
) -> torch.Tensor:
    """``kernels.shares.shares`` in PyTorch."""
    batch, kv_heads, count, dim = key.shape
    per_key = query.shape[1] // kv_heads
    hidden = torch.arange(count, device=key.device) > column[..., None]
    if valid is not None:
        hidden |= ~valid[:, None]
    queries = (~hidden).sum(1).clamp(min=1) * (per_key * head_group)
    got = torch.zeros(batch, kv_heads, count, dtype=torch.float32, device=key.device)
    for part in torch.arange(column.shape[1]).split(max(1, _SCORES // (batch * per_key * count))):
        some = slice(int(part[0]), int(part[-1]) + 1)
        at = column[:, None, some, None].expand(-1, per_key, -1, dim)
        for h in range(kv_heads):
            asked = query[:, h * per_key : (h + 1) * per_key].gather(2, at)
            scores = (asked @ key[:, h, None].mT).float().mul_(scale).masked_fill_(hidden[:, None, some], float("-inf"))
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # where nothing is seen it is -inf
            given = scores.sub_(top).exp_()
            each = (judge[:, some] + 1)[:, None] / given.sum(-1).clamp_min(1)
            got[:, h] += torch.einsum("bqmn,bqm->bn", given, each)
    return got.unflatten(1, (-1, head_group)).sum(2) / queries[:, None]
