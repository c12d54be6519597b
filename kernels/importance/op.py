"""``spectral::importance``: how much attention each token of a prompt gets, from a sample of its queries."""

from __future__ import annotations

import torch

from spectral_compile.kernels import padding
from spectral_compile.kernels.importance import reference
from spectral_compile.kernels.operation import operation

SAMPLE = 576  # queries that a token is weighed by, over all heads of its group


def _fake(query, key, valid, scale, head_group, least=0) -> torch.Tensor:
    return key.new_empty(key.shape[0], key.shape[1] // head_group, key.shape[2], dtype=torch.float32)


@operation(_fake)
def importance(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, scale: float, head_group: int, least: int = 0
) -> torch.Tensor:
    """Token weights: causal attention to each token over what it would get if all were alike, mean over some queries.

    ``query`` [B, Hq, n, D] and ``key`` [B, H, n, D] as attention takes them; bool ``valid`` [B, n] leaves out padding, of which
    no row's figures depend. The queries stand at even distances. Returns float32 [B, H / head_group, n], 0 for padding, and for
    all of a prompt of fewer than ``least`` columns.
    """
    batch, heads, count, _ = query.shape
    valid = padding.asked(valid)
    if count < least:
        return key.new_zeros(batch, key.shape[1] // head_group, count, dtype=torch.float32)
    sample = -(-SAMPLE * key.shape[1] // (heads * head_group))
    column, token = None, None
    if valid is not None or not key.is_cuda:  # else kernels count for themselves
        shown = torch.ones(batch, count, dtype=torch.bool, device=key.device) if valid is None else valid
        column, token = _at_even_distances(sample, shown)
    if key.is_cuda:
        from spectral_compile.kernels.importance.kernel import token_weights  # Triton is there only where a GPU is

        return token_weights(query, key, valid, column, token, scale, head_group, sample)
    assert column is not None and token is not None
    return reference.token_weights(query, key, valid, column, token, scale, head_group)


def _at_even_distances(sample: int, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of ``sample`` queries of each row, int64 [B, m], and which of the row's tokens they are."""
    number = valid.cumsum(1) - 1  # which token a column is
    token = (torch.arange(1, sample + 1, device=valid.device) * (number[:, -1:] + 1) // sample - 1).clamp(min=0)
    return torch.searchsorted(number, token).clamp(max=valid.shape[1] - 1), token
