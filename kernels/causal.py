"""``spectral::causal``: a prompt attends to itself, without the mask that a model builds of all pairs of its tokens."""

from __future__ import annotations

from collections.abc import Iterator

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

    ``ledger`` holds the prompt and nothing else. A query that is padding sees the tokens before it, as in dense attention; what
    comes of it is read where padding stands on the right. One that sees nothing gets zeros.
    """
    if valid is None or all(tokens == query.shape[2] for _, _, tokens, *_ in on_host(ledger)):
        return _laid_out(scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True))
    out = _laid_out(torch.zeros_like(query))
    for row in range(len(query)):
        tokens = valid[row].nonzero()[:, 0]
        k, v = (x[row : row + 1].index_select(2, tokens) for x in (key, value))
        for asking, seen in askers(valid[row]):
            q, own = query[row : row + 1].index_select(2, asking), seen is None
            shown = (k, v) if own else (k[:, :, :seen], v[:, :, :seen])
            attended = scaled_dot_product_attention(q, *shown, is_causal=own, scale=scale, enable_gqa=True)
            out[row].index_copy_(1, asking, attended[0])
    return out


def askers(valid: torch.Tensor) -> Iterator[tuple[torch.Tensor, int | None]]:
    """The queries of a row, bool ``valid`` [n], as indices that see the same of its tokens.

    First those that are tokens, which see causally (None), then each run of padding that sees some tokens, and how many.
    """
    yield valid.nonzero()[:, 0], None
    before = valid.cumsum(0)
    padding = (~valid & (before > 0)).nonzero()[:, 0]
    counts, runs = before[padding].unique_consecutive(return_counts=True)
    for asking, seen in zip(padding.split(runs.tolist()), counts.tolist(), strict=True):
        if len(asking):
            yield asking, seen


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """As models go on with it: tokens before heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
