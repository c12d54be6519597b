"""One layer's store with random keys and values, filled through the operations that a compiled prefill calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectral_compile.bench.measure import Geometry, Settings
from spectral_compile.cache.store import SpectralStore
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec.layout import Layout
from spectral_compile.config import SpectralConfig
from spectral_compile.evaluation.contenders import preset_options
from spectral_compile.kernels.buffers import UNUSED

DECAY = 0.75  # channel i of the spectrum has a standard deviation of (i + 1) ** -DECAY


@dataclass(frozen=True)
class Tokens:
    """Queries [B, Hq, T, D], keys before RoPE and values [B, H, T, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def columns(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """Those of the tokens from ``start`` to ``end``, as arguments of an operation."""
        return {name: x[:, :, start:end] for name, x in vars(self).items()}


def draw(geometry: Geometry, settings: Settings, batch: int, count: int) -> Tokens:
    """``count`` random tokens; keys and values have a decaying spectrum in a random basis of each head, and variance 1.

    They lie in memory as projections leave them, heads of a token side by side.
    """
    generator, d = settings.generator(), geometry.head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=settings.device)

    spread = torch.arange(1, d + 1, device=settings.device) ** -DECAY
    spread *= d**0.5 / spread.norm()

    def decaying() -> torch.Tensor:
        basis = torch.linalg.qr(normal(geometry.kv_heads, d, d))[0]
        heads = torch.matmul(normal(batch, geometry.kv_heads, count, d), spread[:, None] * basis)
        return heads.transpose(1, 2).to(settings.dtype).contiguous().transpose(1, 2)

    query = normal(batch, count, geometry.query_heads, d).to(settings.dtype).transpose(1, 2)
    return Tokens(query, decaying(), decaying())


class Layer:
    """A store and what the operations on it take beside tokens."""

    def __init__(self, geometry: Geometry, settings: Settings, preset: str, batch: int, count: int) -> None:
        """Empty, with room for a prompt of ``count`` columns in each of ``batch`` rows."""
        self.layout: Layout = SpectralConfig.parse(preset_options(preset)).layout(
            geometry.kv_heads, geometry.head_dim, geometry.rotary
        )
        self.timeline = Timeline(self.layout, batch, count, count, settings.device)
        self.store = SpectralStore(self.layout, self.timeline, settings.dtype)

    def advance(self, key: torch.Tensor) -> None:
        """Enter the columns of ``key`` [B, H, n, D] in the ledger."""
        first, count = self.timeline.length, key.shape[2]
        ids = torch.arange(first, first + count, device=key.device)[None]
        torch.ops.spectral.advance_(self.timeline.ledger, self.timeline.positions, ids, None, key, self.layout.spec())

    def append(self, tokens: dict[str, torch.Tensor]) -> None:
        """Store tokens whose columns have been entered."""
        seen = tokens["key"] if self.layout.token_weighted else None
        torch.ops.spectral.append_(**tokens, **self._shared(), seen=seen, scale=self.layout.head_dim**-0.5, number=0)

    def attend(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Attention [B, Hq, n, D] over the store and the tokens themselves, which are stored; their columns have been entered.

        It is what a step of ``generate`` calls. Of one token it may be repeated; of more a second call finds the recent tokens
        that they have replaced, which takes as long.
        """
        absent = {"mask": None, "columns": None, "sliding_window": 0, "softcap": 0.0, "sink_score": None}
        positions, scale = self.timeline.positions, self.layout.head_dim**-0.5
        return torch.ops.spectral.attend_(**tokens, **self._shared(), **absent, positions=positions, scale=scale)

    def _shared(self) -> dict[str, Any]:
        return {"ledger": self.timeline.ledger, "valid": None, **self.store.buffers._asdict(), "layout": self.layout.spec()}

    def prefill(self, tokens: dict[str, torch.Tensor]) -> None:
        """Store a whole prompt."""
        self.advance(tokens["key"])
        self.append(tokens)
        self.timeline.enter(tokens["key"].shape[2], None)
        if self.timeline.settle():
            self.store.resize()

    def begin_step(self, key: torch.Tensor) -> None:
        """Make room for the columns of ``key`` [B, H, n, D], and enter them in the ledger."""
        if self.timeline.reserve(key.shape[2]):
            self.store.resize()
        self.advance(key)

    def forget_basis(self) -> None:
        """Let the next ``append`` of the same prompt compute its bases anew."""
        self.store.buffers.starts.fill_(UNUSED)
        self.store.buffers.moment.zero_()

    def bytes_read(self) -> int:
        """Bytes of the store that attention needs of a step that has been entered: no spare room, no unused segment."""
        buffers, layout = self.store.buffers, self.layout
        before, coded = (int(n) for n in self.timeline.ledger[:, :2].sum(0))
        segments = int((buffers.starts != UNUSED).sum())
        coding = (buffers.k_codes, buffers.v_codes, *([buffers.v_norms[..., None]] if layout.normalised else []))
        a_code = sum(x.shape[1] * x.shape[3] * x.element_size() for x in coding)
        bases = (buffers.k_basis, buffers.v_basis, buffers.k_affine, buffers.v_affine)
        a_segment = sum(x.shape[1] * x[0, 0, 0].nbytes for x in bases if x.shape[2])
        a_sink = a_recent = 2 * layout.kv_heads * layout.head_dim * buffers.k_exact.element_size()
        if layout.recent_bits == 8:
            a_recent = 2 * layout.kv_heads * (layout.head_dim + 1)
        first_exact = self.timeline.batch * layout.first_exact
        exact = first_exact * a_sink + (before - coded - first_exact) * a_recent
        a_position = self.timeline.positions.element_size()
        return coded * a_code + segments * a_segment + exact + before * a_position
