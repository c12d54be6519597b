"""``spectral::importance``: how much attention each token of a prompt gets, judged by a sample of its queries."""

from __future__ import annotations

import torch

SAMPLE = 576  # queries that judge a token, over all heads of its group
_SCORES = {"cpu": 1 << 19, "cuda": 1 << 24}  # that are there at a time: launches cost a GPU more than memory


@torch.library.custom_op("spectral::importance", mutates_args=())
def importance(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, scale: float, head_group: int
) -> torch.Tensor:
    """Causal attention to each token over what it would get if all were alike, mean over queries at even distances.

    ``query`` [B, Hq, n, D] and ``key`` [B, H, n, D] as attention takes them; bool ``valid`` [B, n] leaves out padding, of which
    no row's figures depend. Returns float32 [B, H / head_group, n], 0 for padding.
    """
    batch, heads, count, dim = query.shape
    kv_heads = key.shape[1]
    per_key = heads // kv_heads
    shown = torch.ones(batch, count, dtype=torch.bool, device=key.device) if valid is None else valid
    number = shown.cumsum(1) - 1  # which token a column is
    sample = -(-SAMPLE // (per_key * head_group))
    judges = (torch.arange(1, sample + 1, device=key.device) * (number[:, -1:] + 1) // sample - 1).clamp(min=0)
    column = torch.searchsorted(number, judges)[:, None, :, None].expand(-1, per_key, -1, dim)
    hidden = ~shown[:, None] | (number[:, None] > judges[..., None])
    judged = (~hidden).sum(1).clamp(min=1) * (per_key * head_group)
    got = torch.zeros(batch, kv_heads, count, dtype=torch.float32, device=key.device)
    for part in torch.arange(sample).split(max(1, _SCORES.get(key.device.type, 1 << 19) // (batch * per_key * count))):
        some = slice(int(part[0]), int(part[-1]) + 1)
        for h in range(kv_heads):
            asked = query[:, h * per_key : (h + 1) * per_key].gather(2, column[:, :, some].clamp(max=count - 1))
            scores = (asked @ key[:, h, None].mT).float().mul_(scale).masked_fill_(hidden[:, None, some], float("-inf"))
            shares = scores.sub_(scores.amax(-1, keepdim=True)).exp_().nan_to_num_(0.0)  # of nothing, where nothing is seen
            each = (judges[:, some] + 1)[:, None] / shares.sum(-1).clamp_min(1)
            got[:, h] += torch.einsum("bqmn,bqm->bn", shares, each)
    return got.unflatten(1, (-1, head_group)).sum(2) / judged[:, None]


@importance.register_fake
def _(query, key, valid, scale, head_group) -> torch.Tensor:
    return key.new_empty(key.shape[0], key.shape[1] // head_group, key.shape[2], dtype=torch.float32)
