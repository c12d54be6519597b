"""What a layer of a prompt leaves that is stored later."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.importance.weights import Sample, token_weights
from spectral_compile.kernels.values import Chunk


class Judged(NamedTuple):
    """What tokens of a prompt are weighed by: queries that ask, keys [B, H, n, D] as attention sees them, scale of scores."""

    sampled: Sample
    seen: torch.Tensor
    scale: float

    def token_weights(self, valid: torch.Tensor | None, layout: Layout) -> torch.Tensor:
        return token_weights(self.sampled, self.seen, valid, self.scale, layout.heads)


class KeptLayer(NamedTuple):
    """Copies of one layer's keys, as stored, and values [B, H, n, D]; its queries have been summed up."""

    key: torch.Tensor
    value: torch.Tensor
    judged: Judged | None
    query_heads: int
    layout: Layout
    buffers: Buffers  # of the store, not those that the operation was given, which may be copies that a compiler made

    @property
    def copies(self) -> list[torch.Tensor]:
        asking = [] if self.judged is None else [self.judged.seen, self.judged.sampled.query]
        return [self.key, self.value, *asking]

    def chunk(self, valid: torch.Tensor | None) -> Chunk:
        """Without queries: of these only the shape is asked for."""
        batch, _, count, dim = self.key.shape
        return Chunk(self.key.new_empty(1, 1, 1, dim).expand(batch, self.query_heads, count, dim), self.key, self.value, valid)

    def token_weight(self, valid: torch.Tensor | None) -> torch.Tensor | None:
        return None if self.judged is None else self.judged.token_weights(valid, self.layout)
