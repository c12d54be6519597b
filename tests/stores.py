"""Random stores, what enters them, and attention over them by the reference and by the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from spectral_compile.codec import PRESETS, Layout, Rotary, Tiers
from spectral_compile.kernels import dense
from spectral_compile.kernels.advance import reference as advancing
from spectral_compile.kernels.append import reference as appending
from spectral_compile.kernels.attend import kernel
from spectral_compile.kernels.attend import reference as attending
from spectral_compile.kernels.buffers import SLOTS, Buffers, Capacity, allocate
from spectral_compile.kernels.ledger import columns_of
from spectral_compile.kernels.values import NOTHING_HIDDEN, Chunk, Hidden, Past, Scoring
from tests.tiny import DEVICE, joint_heads


@st.composite
def rotaries(draw: st.DrawFn, head_dim: int) -> Rotary | None:
    kind = draw(st.sampled_from(["none", "half", "interleaved", "partial"]))
    if kind == "none":
        return None
    pairs = draw(st.integers(1, head_dim // 2 - 1)) if kind == "partial" else head_dim // 2
    base, scaling = draw(st.sampled_from([100.0, 10000.0])), draw(st.sampled_from([1.0, 1.25]))
    frequencies = tuple(base ** (-i / pairs) for i in range(pairs))
    interleaved = kind == "interleaved" or (kind == "partial" and draw(st.booleans()))
    return Rotary(frequencies, interleaved, scaling)


@st.composite
def layouts(draw: st.DrawFn, presets: tuple[str, ...] = tuple(PRESETS)) -> Layout:
    """A preset with windows so small that a few dozen tokens are coded, and sometimes with tiers of its own."""
    heads, dim = draw(st.integers(1, 4)), 2 * draw(st.integers(16, 64))
    preset = PRESETS[draw(st.sampled_from(presets))]
    block = draw(st.integers(1, 16))
    preset = replace(
        preset,
        **draw(joint_heads(heads)),
        first_exact=draw(st.integers(0, 4)),
        recent=draw(st.integers(0, 20)),
        block=block,
        warmup=draw(st.integers(1, 24)),
        segment=block if preset.segment else 0,
        recent_bits=16 if preset.lossless else draw(st.sampled_from([8, 16])),
    )
    layout = preset.layout(heads, dim, draw(rotaries(dim)))
    if not layout.lossless and draw(st.booleans()):
        few = st.builds(Tiers, st.integers(1, 3), st.integers(0, 5), st.integers(0, 9))
        layout = replace(layout, key=draw(few), value=draw(few))
    return layout


@dataclass(repr=False)
class Step:
    """A chunk with the positions of its columns, and the weights of its tokens if it is a prompt."""

    query: Tensor
    key: Tensor  # as stored, before RoPE
    value: Tensor
    ids: Tensor | None
    valid: Tensor | None
    token_weight: Tensor | None = None

    def __repr__(self) -> str:
        return f"Step({self.key.shape[2]} columns, ids={self.ids}, valid={self.valid})"

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.query, self.key, self.value, self.valid)


@dataclass
class Case:
    layout: Layout
    batch: int
    groups: int
    chunks: list[Step]
    scale: float

    @property
    def columns(self) -> int:
        return sum(chunk.key.shape[2] for chunk in self.chunks)


@st.composite
def cases(draw: st.DrawFn, presets: tuple[str, ...] = tuple(PRESETS), batch: int = 1, most: int = 3, chunks: int = 6) -> Case:
    """Up to ``most`` rows of up to ``chunks`` chunks."""
    layout = draw(layouts(presets))
    batch, groups = draw(st.integers(batch, most)), draw(st.integers(1, 3))
    counts = [draw(st.integers(1, 48)), *draw(st.lists(st.integers(1, 14), max_size=chunks - 1))]
    padding = draw(st.sampled_from(["none", "left", "holes"]))
    numbering = draw(st.sampled_from(["absent", "columns", "tokens"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads, dim = layout.kv_heads, layout.head_dim

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    valid = torch.ones(batch, sum(counts), dtype=torch.bool)
    if padding == "left":
        valid = torch.arange(sum(counts)) >= torch.randint(0, counts[0], (batch, 1), generator=generator)
    elif padding == "holes":
        valid = torch.rand(batch, sum(counts), generator=generator) < 0.7
    ids = {
        "absent": None,
        "columns": torch.arange(sum(counts))[None] + 3,
        "tokens": (valid.cumsum(1) - 1).clamp(min=0),
    }[numbering]
    chunks, at = [], 0
    for count in counts:
        scale = torch.logspace(0, -1.5, dim)[torch.randperm(dim, generator=generator)]  # another spectrum in every chunk
        part = slice(at, at + count)
        chunks.append(
            Step(
                query=randn(batch, heads * groups, count, dim),
                key=randn(batch, heads, count, dim) * scale,
                value=randn(batch, heads, count, dim) * scale,
                ids=None if ids is None else ids[:, part],
                valid=valid[:, part] if padding != "none" else None,
            )
        )
        at += count
    if draw(st.booleans()):
        chunks[0].token_weight = torch.rand(batch, layout.groups, counts[0], generator=generator).square()
    return Case(layout, batch, groups, chunks, draw(st.sampled_from([dim**-0.5, 0.3])))


@dataclass
class PlainStore:
    """A store without its growth: room for everything from the start."""

    layout: Layout
    ledger: Tensor
    positions: Tensor
    buffers: Buffers

    @classmethod
    def blank(cls, layout: Layout, batch: int, columns: int) -> PlainStore:
        segments = columns // layout.segment + 1 if layout.segment else 3
        capacity = Capacity(-(-columns // SLOTS) * SLOTS, layout.recent + max(layout.warmup, layout.block), segments)
        ledger = torch.tensor([[0, 0, 0, 0, 1, 0]]).repeat(batch, 1)
        positions = torch.zeros(batch, columns + 1, dtype=torch.int32)
        return cls(layout, ledger, positions, allocate(layout, batch, capacity, torch.float32, "cpu"))

    def row(self, row: int) -> list[Tensor]:
        return [self.ledger[row], self.positions[row, :-1], *(buffer[row] for buffer in self.buffers)]

    @property
    def past(self) -> Past:
        return Past(self.ledger, self.positions, self.buffers, self.layout)

    def advance(self, step: Step) -> None:
        advancing.advance(self.ledger, self.positions, step.ids, step.valid, step.key, self.layout)

    def attend(self, step: Step, scale: float, hidden: Hidden = NOTHING_HIDDEN, **how: Any) -> Tensor:
        return attending.attend(step.chunk, self.past, Scoring(scale, **how), hidden)

    def append(self, step: Step) -> None:
        appending.append(step.chunk, self.ledger, self.buffers, self.layout, step.token_weight)
        if step.chunk.columns == 1:
            self.catch_up(step)
            nothing = Chunk(*(x[:, :, :0] for x in (step.query, step.key, step.value)))
            appending.append(nothing, self.ledger, self.buffers, self.layout)

    def catch_up(self, step: Step) -> None:
        """The step of no columns that follows one of one column."""
        advancing.advance(self.ledger, self.positions, None, None, step.key[:, :, :0], self.layout)

    def held(self, row: int) -> tuple[Tensor, Tensor]:
        """What the store held before this step, dense."""
        rows = columns_of(self.ledger)
        before, coded = int(rows.before[row]), int(rows.coded[row])
        return dense.materialise(row, before, coded, self.positions[row], self.buffers, self.layout)


def tokens_of(chunk: Step, row: int) -> Tensor:
    return chunk.valid[row] if chunk.valid is not None else torch.ones(chunk.key.shape[2], dtype=torch.bool)


def moved(values: Any, device: str) -> Any:
    """A value of tensors on a device, as copies."""
    if isinstance(values, Tensor):
        return values.to(device, copy=True)
    return type(values)(*(moved(x, device) for x in values)) if isinstance(values, tuple) else values


def by_kernels(store: PlainStore, step: Step, scale: float, hidden: Hidden = NOTHING_HIDDEN, **how: Any) -> Tensor:
    """Attention by the kernels, on copies of everything, so that nothing is written that the reference reads."""
    chunk, past, scoring, hidden = (moved(x, DEVICE) for x in (step.chunk, store.past, Scoring(scale, **how), hidden))
    return kernel.attend(chunk, past, scoring, hidden).to("cpu")


def filled(
    preset: str,
    dim: int,
    past: int,
    new: int,
    ids: Tensor | None = None,
    batch: int = 1,
    head_group: int | None = None,
    value_group: int | None = None,
    recent_bits: int = 16,
    turned: int | None = None,
    key_size: float = 1.0,
    block: int = 32,
    recent: int = 20,
    interleaved: bool = False,
) -> tuple[PlainStore, Step]:
    """A store with ``past`` tokens, and a step of ``new`` ones that has been entered in its ledger.

    RoPE is of ``turned`` channels, or of all.
    """
    generator = torch.Generator().manual_seed(dim + past)
    pairs = (dim if turned is None else turned) // 2
    rotary = Rotary(tuple(10000.0 ** (-2 * i / dim) for i in range(pairs)), interleaved) if pairs else None
    groups = {} if head_group is None else {"key_group": head_group, "value_group": value_group or head_group}
    layout = replace(PRESETS[preset], **groups).layout(2, dim, rotary)
    segment = 2 * block * (layout.segment > 0)
    layout = replace(layout, recent=recent, block=block, warmup=64, segment=segment, recent_bits=recent_bits)

    def some(count: int) -> Step:
        def randn(heads: int) -> Tensor:
            return torch.randn(batch, heads, count, dim, generator=generator)

        return Step(randn(4), randn(2) * torch.logspace(0, -1.5, dim) * key_size, randn(2), None, None)

    store = PlainStore.blank(layout, batch, past + new)
    first, second = some(past), some(new)
    first.ids = None if ids is None else ids[None, :past]
    second.ids = None if ids is None else ids[None, past:]
    store.advance(first)
    store.append(first)
    store.advance(second)
    return store, second
