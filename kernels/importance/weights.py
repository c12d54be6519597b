"""How much attention each token of a prompt gets, from a sample of its queries."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from spectral_compile.kernels.importance import reference

SAMPLE = 576  # queries that a token is weighed by, over all heads of its group


class Sample(NamedTuple):
    """Some queries of each row, which stand at places of ``query``."""

    query: torch.Tensor  # [B, Hq, x, D]
    place: torch.Tensor  # int64 [B, m], below x
    column: torch.Tensor  # int64 [B, m], of the prompt
    token: torch.Tensor  # int64 [B, m]: which of the row's tokens it is

    def copied(self) -> Sample:
        """With a copy of these queries, and no others."""
        batch, number = self.place.shape
        at = self.place[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        return self._replace(query=self.query.gather(2, at), place=_in_order(number, batch, self.place.device))


def sample(query: torch.Tensor, per_group: int, valid: torch.Tensor | None) -> Sample:
    """Queries of [B, Hq, n, D] at even distances, ``SAMPLE`` over the ``per_group`` heads that ask a group's tokens.

    bool ``valid`` [B, n] leaves out padding.
    """
    batch, _, count, _ = query.shape
    number = -(-SAMPLE // per_group)
    if valid is None:
        column = _at_even_distances(number, count, batch, query.device)
        return Sample(query, column, column, column)
    tokens = valid.cumsum(1) - 1  # which token a column is
    token = (torch.arange(1, number + 1, device=valid.device) * (tokens[:, -1:] + 1) // number - 1).clamp(min=0)
    column = torch.searchsorted(tokens, token).clamp(max=count - 1)
    return Sample(query, column, column, token)


# The same in all layers of a prompt, which do not compute them again. Tensors made in inference mode could be used in no other.


@functools.lru_cache(maxsize=4)
def _at_even_distances(number: int, count: int, batch: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return (torch.arange(1, number + 1, device=device) * count // number - 1).clamp(min=0).repeat(batch, 1)


@functools.lru_cache(maxsize=4)
def _in_order(number: int, batch: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(number, device=device).repeat(batch, 1)


def token_weights(
    sampled: Sample, key: torch.Tensor, valid: torch.Tensor | None, scale: float, head_group: int
) -> torch.Tensor:
    """Causal attention to each token over what it would get if all were alike, mean over the sampled queries that see it.

    ``key`` [B, H, n, D] as attention takes it. Returns float32 [B, H / head_group, n], 0 for padding.
    """
    if key.is_cuda:
        from spectral_compile.kernels.importance import kernel  # Triton is there only where a GPU is

        return kernel.token_weights(*sampled, key, valid, scale, head_group)
    return reference.token_weights(*sampled, key, valid, scale, head_group)
