"""``spectral::causal``: a prompt attends to itself, without the mask that a model builds of all pairs of its tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from spectral_compile.kernels.ledger import on_host
from spectral_compile.kernels.operation import operation


def _fake(query, key, value, ledger, valid, scale) -> torch.Tensor:
    return _laid_out(torch.empty_like(query))


@operation(_fake)
def causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of [B, Hq, n, D] to [B, H, n, D] with Hq a multiple of H; bool ``valid`` [B, n] leaves out padding.

    ``ledger`` holds the prompt and nothing else. Queries that are padding get zeros.
    """
    if valid is None or all(tokens == query.shape[2] for _, _, tokens, *_ in on_host(ledger)):
        return _laid_out(scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True))
    out = _laid_out(torch.zeros_like(query))
    for row in range(len(query)):
        kept = valid[row].nonzero()[:, 0]
        chunk = (x[row : row + 1].index_select(2, kept) for x in (query, key, value))
        attended = scaled_dot_product_attention(*chunk, is_causal=True, scale=scale, enable_gqa=True)
        out[row].index_copy_(1, kept, attended[0])
    return out


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """As models go on with it: tokens before heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
