"""Token weights in PyTorch."""

from __future__ import annotations

import torch

from spectral_compile.kernels.autocast import without_autocast

_SCORES = 1 << 19  # that are there at a time


@without_autocast
def token_weights(
    query: torch.Tensor,
    place: torch.Tensor,
    column: torch.Tensor,
    token: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
    head_group: int,
) -> torch.Tensor:
    """``weights.token_weights`` by the members of a ``Sample``.

    The mean, over the queries that see a token, of the softmax weight that it gets times how many tokens that query sees.
    """
    batch, kv_heads, count, dim = key.shape
    query_heads = query.shape[1] // kv_heads
    hidden = torch.arange(count, device=key.device) > column[..., None]
    if valid is not None:
        hidden |= ~valid[:, None]
    queries = (~hidden).sum(1).clamp(min=1) * (query_heads * head_group)
    got = torch.zeros(batch, kv_heads, count, dtype=torch.float32, device=key.device)
    for chosen in torch.arange(column.shape[1]).split(max(1, _SCORES // (batch * query_heads * count))):
        some = slice(int(chosen[0]), int(chosen[-1]) + 1)
        at = place[:, None, some, None].expand(-1, query_heads, -1, dim)
        for h in range(kv_heads):
            asked = query[:, h * query_heads : (h + 1) * query_heads].gather(2, at)
            scores = (asked @ key[:, h, None].mT).float().mul_(scale).masked_fill_(hidden[:, None, some], float("-inf"))
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # where nothing is seen it is -inf
            given = scores.sub_(top).exp_()
            each = (token[:, some] + 1)[:, None] / given.sum(-1).clamp_min(1)
            got[:, h] += torch.einsum("bqmn,bqm->bn", given, each)
    return got.unflatten(1, (-1, head_group)).sum(2) / queries[:, None]
