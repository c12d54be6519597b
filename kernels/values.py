"""What the operations on a store take, as values; in their schemas each is the list of its members."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.buffers import Buffers


class Chunk(NamedTuple):
    """The tokens of a step."""

    query: torch.Tensor  # [B, Hq, n, D], as attention sees it
    key: torch.Tensor  # [B, H, n, D], as stored: before RoPE where the layout has a rotary
    value: torch.Tensor  # [B, H, n, D]
    valid: torch.Tensor | None = None  # bool [B, n]; False is padding

    @property
    def columns(self) -> int:
        return self.key.shape[2]


class Past(NamedTuple):
    """One layer's store, whose ledger and positions this step has been entered in already (``advance``)."""

    ledger: torch.Tensor  # int64 [B, 6]: see ``LedgerRow``
    positions: torch.Tensor  # int32 [B, slots], of each token; the last slot is scratch
    buffers: Buffers
    layout: Layout


class Hidden(NamedTuple):
    """What a query may not see beside what causality hides; all None where that is nothing."""

    mask: torch.Tensor | None = None  # bool [B or 1, Hq or 1, n, columns], which replaces causality
    columns: torch.Tensor | None = None  # bool [B, N]: which columns hold stored tokens, where there is a mask
    visible: torch.Tensor | None = None  # uint8 [B, slots]: 0 hides a stored token


NOTHING_HIDDEN = Hidden()


class Scoring(NamedTuple):
    """How scores are made of queries and keys."""

    scale: float
    sliding_window: int = 0  # hides keys that are that many tokens or more behind; 0 hides none
    softcap: float = 0.0  # a score s becomes ``softcap * tanh(s / softcap)``; 0 leaves it
    sink_score: torch.Tensor | None = None  # [Hq]: one more score of each query head, which gives no value

    @property
    def is_plain(self) -> bool:
        """Whether a library's attention makes the same scores."""
        return not self.sliding_window and not self.softcap and self.sink_score is None
