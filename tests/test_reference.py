"""Properties of the reference operations: what they store, and what attention on it gives, for random geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_compile.codec import PRESETS, Layout, Rotary, Tiers
from spectral_compile.kernels import reference
from spectral_compile.kernels.buffers import Buffers, Capacity, allocate
from tests.budget import examples

PROPERTY = settings(max_examples=examples(25, full=120), deadline=None)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


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
        head_group=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        sinks=draw(st.integers(0, 4)),
        recent=draw(st.integers(0, 20)),
        block=block,
        warmup=draw(st.integers(1, 24)),
        segment=block if preset.segment else 0,
        window_bits=16 if preset.lossless else draw(st.sampled_from([8, 16])),
    )
    layout = preset.layout(heads, dim, draw(rotaries(dim)))
    if not layout.lossless and draw(st.booleans()):
        few = st.builds(Tiers, st.integers(1, 3), st.integers(0, 5), st.integers(0, 9))
        layout = replace(layout, key=draw(few), value=draw(few))
    return layout


@dataclass(repr=False)
class Chunk:
    query: Tensor
    key: Tensor  # as stored, before RoPE
    value: Tensor
    ids: Tensor | None
    valid: Tensor | None
    importance: Tensor | None = None

    def __repr__(self) -> str:
        return f"Chunk({self.key.shape[2]} columns, ids={self.ids}, valid={self.valid})"


@dataclass
class Case:
    layout: Layout
    batch: int
    groups: int
    chunks: list[Chunk]
    scale: float

    @property
    def columns(self) -> int:
        return sum(chunk.key.shape[2] for chunk in self.chunks)


@st.composite
def cases(
    draw: st.DrawFn, presets: tuple[str, ...] = tuple(PRESETS), batch: int = 1, most: int = 3, chunks: int = 6
) -> Case:
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
            Chunk(
                query=randn(batch, heads * groups, count, dim),
                key=randn(batch, heads, count, dim) * scale,
                value=randn(batch, heads, count, dim) * scale,
                ids=None if ids is None else ids[:, part],
                valid=valid[:, part] if padding != "none" else None,
            )
        )
        at += count
    if draw(st.booleans()):
        chunks[0].importance = torch.rand(batch, layout.groups, counts[0], generator=generator).square()
    return Case(layout, batch, groups, chunks, draw(st.sampled_from([dim**-0.5, 0.3])))


@dataclass
class Books:
    """A store without its growth: room for everything from the start."""

    layout: Layout
    ledger: Tensor
    positions: Tensor
    buffers: Buffers

    @classmethod
    def blank(cls, layout: Layout, batch: int, columns: int) -> Books:
        segments = columns // layout.segment + 1 if layout.segment else 3
        capacity = Capacity(columns, layout.recent + max(layout.warmup, layout.block), segments)
        ledger = torch.tensor([[0, 0, 0, 0, 1, 0]]).repeat(batch, 1)
        positions = torch.zeros(batch, columns + 1, dtype=torch.int32)
        return cls(layout, ledger, positions, allocate(layout, batch, capacity, torch.float32, "cpu"))

    def row(self, row: int) -> list[Tensor]:
        return [self.ledger[row], self.positions[row, :-1], *(buffer[row] for buffer in self.buffers)]

    def advance(self, chunk: Chunk) -> None:
        reference.advance(self.ledger, self.positions, chunk.ids, chunk.valid, chunk.key, self.layout)

    def attend(
        self, chunk: Chunk, scale: float, mask: Tensor | None = None, columns: Tensor | None = None, **how: object
    ) -> Tensor:
        parts = chunk.query, chunk.key, chunk.value, mask, columns
        books = self.ledger, self.positions, chunk.valid, self.buffers, self.layout
        return reference.attend(*parts, *books, scale, **{"window": 0, **how})

    def append(self, chunk: Chunk) -> None:
        tokens = chunk.query, chunk.key, chunk.value
        reference.append(*tokens, self.ledger, chunk.valid, chunk.importance, self.buffers, self.layout)
        if chunk.key.shape[2] == 1:
            self.catch_up(chunk)
            nothing = (x[:, :, :0] for x in (chunk.query, chunk.key, chunk.value))
            reference.append(*nothing, self.ledger, None, None, self.buffers, self.layout)

    def catch_up(self, chunk: Chunk) -> None:
        """The step of no columns that follows one of one column."""
        reference.advance(self.ledger, self.positions, None, None, chunk.key[:, :, :0], self.layout)

    def held(self, row: int) -> tuple[Tensor, Tensor]:
        """What the store held before this step, dense."""
        before, coded = self.ledger[row, :2].tolist()
        return reference.materialise(row, before, coded, self.positions[row], self.buffers, self.layout)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """[Hq, n, D] over [H, T, D] where ``allowed`` [n, T]; zeros where a query may see nothing."""
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ value


def turned(key: Tensor, ids: Tensor, rotary: Rotary | None) -> Tensor:
    """Keys [H, n, D] rotated, by complex numbers."""
    if rotary is None:
        return key
    half = rotary.dim // 2
    head, rest = key[..., : rotary.dim].double(), key[..., rotary.dim :]
    pairs = head.unflatten(-1, (half, 2)) if rotary.interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
    angle = ids.double()[:, None] * torch.tensor(rotary.frequencies, dtype=torch.float64)
    out = torch.view_as_real(torch.complex(*pairs.unbind(-1)) * torch.polar(torch.full_like(angle, rotary.scaling), angle))
    out = out if rotary.interleaved else out.transpose(-1, -2)
    return torch.cat((out.flatten(-2).float(), rest), -1)


def tokens_of(chunk: Chunk, row: int) -> Tensor:
    return chunk.valid[row] if chunk.valid is not None else torch.ones(chunk.key.shape[2], dtype=torch.bool)


class Dense:
    """The same tokens as plain lists, one a row, keys rotated; and of which column each token is."""

    def __init__(self, case: Case) -> None:
        self.case = case
        heads, dim = case.layout.kv_heads, case.layout.head_dim
        self.keys = [torch.zeros(heads, 0, dim) for _ in range(case.batch)]
        self.values = [torch.zeros(heads, 0, dim) for _ in range(case.batch)]
        self.columns = [torch.zeros(0, dtype=torch.int64) for _ in range(case.batch)]
        self.length = 0

    def append(self, chunk: Chunk) -> None:
        for row in range(self.case.batch):
            keep = tokens_of(chunk, row)
            known, count = self.keys[row].shape[1], int(keep.sum())
            ids = torch.arange(known, known + count) if chunk.ids is None else chunk.ids[min(row, len(chunk.ids) - 1)][keep]
            key = turned(chunk.key[row][:, keep], ids, self.case.layout.rotary)
            self.keys[row] = torch.cat((self.keys[row], key), 1)
            self.values[row] = torch.cat((self.values[row], chunk.value[row][:, keep]), 1)
            self.columns[row] = torch.cat((self.columns[row], keep.nonzero().flatten() + self.length))
        self.length += chunk.key.shape[2]

    def attend(self, chunk: Chunk, row: int, allowed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the chunk's tokens (already appended) see; ``allowed(query tokens [n, 1], key tokens [1, T])``."""
        keep = tokens_of(chunk, row)
        total = self.keys[row].shape[1]
        own = torch.arange(total - int(keep.sum()), total)[:, None]
        may = allowed(own, torch.arange(total)[None]).expand(len(own), total)
        return plain_attention(chunk.query[row][:, keep], self.keys[row], self.values[row], may, self.case.scale)


@PROPERTY
@given(cases())
def test_attend_equals_decode_then_attention(case: Case) -> None:
    books = Books.blank(case.layout, case.batch, case.columns)
    for chunk in case.chunks:
        books.advance(chunk)
        out = books.attend(chunk, case.scale)
        for row, (before, _, after, *_) in enumerate(books.ledger.tolist()):
            keep = tokens_of(chunk, row)
            key, value = books.held(row)
            key = torch.cat((key, turned(chunk.key[row][:, keep], books.positions[row, before:after], case.layout.rotary)), 1)
            value = torch.cat((value, chunk.value[row][:, keep]), 1)
            causal = torch.arange(after)[None] <= torch.arange(before, after)[:, None]
            expected = plain_attention(chunk.query[row][:, keep], key, value, causal, case.scale)
            torch.testing.assert_close(out[row][:, keep], expected, **CLOSE)
        books.append(chunk)


@PROPERTY
@given(cases(presets=("exact",)))
def test_lossless_attend_equals_causal_attention(case: Case) -> None:
    books, dense = Books.blank(case.layout, case.batch, case.columns), Dense(case)
    for chunk in case.chunks:
        books.advance(chunk)
        out = books.attend(chunk, case.scale)
        books.append(chunk)
        dense.append(chunk)
        for row in range(case.batch):
            expected = dense.attend(chunk, row, lambda query, key: key <= query)
            torch.testing.assert_close(out[row][:, tokens_of(chunk, row)], expected, **CLOSE)


@PROPERTY
@given(cases(presets=("exact",)), st.integers(1, 30))
def test_window_hides_what_is_farther_behind(case: Case, window: int) -> None:
    books, dense = Books.blank(case.layout, case.batch, case.columns), Dense(case)
    for chunk in case.chunks:
        books.advance(chunk)
        out = books.attend(chunk, case.scale, window=window)
        books.append(chunk)
        dense.append(chunk)
        for row in range(case.batch):
            expected = dense.attend(chunk, row, lambda query, key: (key <= query) & (query - key < window))
            torch.testing.assert_close(out[row][:, tokens_of(chunk, row)], expected, **CLOSE)


@PROPERTY
@given(cases(presets=("exact",)), st.booleans(), st.integers(0, 2**31))
def test_bool_mask_replaces_causality(case: Case, shared: bool, seed: int) -> None:
    """A mask speaks of columns; those of padding are seen by no query, whatever it says."""
    generator = torch.Generator().manual_seed(seed)
    books, dense = Books.blank(case.layout, case.batch, case.columns), Dense(case)
    columns = torch.zeros(case.batch, case.columns + 7, dtype=torch.bool)
    for chunk in case.chunks:
        count, past = chunk.key.shape[2], dense.length
        mask = torch.rand(1 if shared else case.batch, 1, count, past + count, generator=generator) < 0.5
        books.advance(chunk)
        out = books.attend(chunk, case.scale, mask, columns)
        books.append(chunk)
        dense.append(chunk)
        for row in range(case.batch):
            keep = tokens_of(chunk, row)
            columns[row, past : past + count] = keep
            may = mask[min(row, len(mask) - 1), 0][keep][:, dense.columns[row]]
            expected = dense.attend(chunk, row, lambda query, key, may=may: may)
            torch.testing.assert_close(out[row][:, keep], expected, **CLOSE)


@PROPERTY
@given(cases(batch=2), st.data())
def test_a_row_does_not_depend_on_its_neighbours(case: Case, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, case.batch - 1))

    def only(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 else x[row : row + 1]

    together, alone = (Books.blank(case.layout, batch, case.columns) for batch in (case.batch, 1))
    for chunk in case.chunks:
        single = Chunk(*(only(x) for x in vars(chunk).values()))
        together.advance(chunk)
        alone.advance(single)
        assert torch.equal(together.attend(chunk, case.scale)[row], alone.attend(single, case.scale)[0])
        together.append(chunk)
        alone.append(single)
        for mine, own in zip(together.row(row), alone.row(0), strict=True):
            assert torch.equal(mine, own)


@PROPERTY
@given(cases(presets=("balanced", "seed"), batch=2))
def test_padding_does_not_reach_the_codes(case: Case) -> None:
    """A row stores the same bytes when what stands in its columns of padding changes."""
    first, second = (Books.blank(case.layout, case.batch, case.columns) for _ in range(2))
    for chunk in case.chunks:
        valid = torch.ones(case.batch, chunk.key.shape[2], dtype=torch.bool) if chunk.valid is None else chunk.valid
        hidden = ~valid[:, None, :, None]
        other = replace(chunk, **{name: getattr(chunk, name).masked_fill(hidden, 1e4) for name in ("query", "key", "value")})
        for books, given_chunk in ((first, chunk), (second, other)):
            books.advance(given_chunk)
            books.append(given_chunk)
    for row in range(case.batch):
        for a, b in zip(first.row(row), second.row(row), strict=True):
            assert torch.equal(a, b)


@PROPERTY
@given(cases())
def test_ledger_adds_up(case: Case) -> None:
    layout, books = case.layout, Books.blank(case.layout, case.batch, case.columns)
    tokens = [0] * case.batch
    for chunk in case.chunks:
        old, count = books.ledger.tolist(), chunk.key.shape[2]
        books.advance(chunk)
        if count == 1:
            for was, now in zip(old, books.ledger.tolist(), strict=True):
                (coded, waiting), (coded_after, waiting_after) = was[3:5], now[3:5]
                assert waiting_after == waiting
                assert coded_after == coded or not (waiting or layout.segment), "a step of one column begins no segment"
            books.catch_up(chunk)
        for row, (before, coded_before, after, coded, waiting, _) in enumerate(books.ledger.tolist()):
            tokens[row] += int(tokens_of(chunk, row).sum())
            if count == 1:
                before, coded_before = old[row][2:4]
            assert (before, coded_before) == tuple(old[row][2:4])
            assert after == tokens[row]
            assert coded_before <= coded <= max(0, after - layout.sinks - layout.recent)
            assert coded % layout.block == 0
            assert waiting <= old[row][4], "a row that has a basis never waits again"
            if waiting:
                assert coded == 0
                assert after - layout.sinks < layout.recent + layout.first
            else:
                assert after - layout.sinks - coded < layout.recent + layout.block


@PROPERTY
@given(cases())
def test_positions_are_those_of_the_tokens(case: Case) -> None:
    books = Books.blank(case.layout, case.batch, case.columns)
    expected: list[list[int]] = [[] for _ in range(case.batch)]
    for chunk in case.chunks:
        books.advance(chunk)
        for row, known in enumerate(expected):
            keep = tokens_of(chunk, row)
            count = int(keep.sum())
            ids = chunk.ids[min(row, len(chunk.ids) - 1)][keep].tolist() if chunk.ids is not None else None
            known += range(len(known), len(known) + count) if ids is None else ids
            assert books.positions[row, : len(known)].tolist() == known


@PROPERTY
@given(cases(presets=("quality", "balanced", "compact", "seed")))
def test_what_is_not_coded_stays_exact_or_is_held_in_bytes(case: Case) -> None:
    layout, books, dense = case.layout, Books.blank(case.layout, case.batch, case.columns), Dense(case)
    for chunk in case.chunks:
        books.advance(chunk)
        books.append(chunk)
        dense.append(chunk)
    for row, (_, _, after, coded, *_) in enumerate(books.ledger.tolist()):
        key, value = reference.materialise(row, after, coded, books.positions[row], books.buffers, layout)
        token = torch.arange(after)
        first, recent = token < layout.sinks, token >= layout.sinks + coded
        exact = first if layout.window_bits == 8 else first | recent
        assert (first | recent).sum() >= min(after, layout.sinks + layout.recent)
        torch.testing.assert_close(key[:, exact], dense.keys[row][:, exact], **CLOSE)
        assert torch.equal(value[:, exact], dense.values[row][:, exact])
        for ours, theirs in ((key, dense.keys[row]), (value, dense.values[row])):
            apart, most = (ours - theirs)[:, recent].norm(dim=-1), theirs[:, recent].norm(dim=-1)
            assert (apart <= 0.01 * layout.head_dim**0.5 * most + 1e-6).all()
        assert torch.isfinite(key).all() and torch.isfinite(value).all()


@settings(PROPERTY, max_examples=examples(25, full=100))
@given(st.integers(16, 64).flatmap(lambda half: st.tuples(st.just(2 * half), rotaries(2 * half))), st.integers(0, 2**31))
def test_unrotate_undoes_rotate(case: tuple[int, Rotary | None], seed: int) -> None:
    dim, rotary = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, dim, generator=generator)
    ids = torch.randint(0, 4096, (5,), generator=generator)
    rotated = reference.rotate(x, ids, rotary)
    torch.testing.assert_close(rotated, turned(x, ids, rotary), atol=2e-3, rtol=0)  # float32 angles of some thousand radians
    torch.testing.assert_close(reference.unrotate(rotated, ids, rotary), x, atol=1e-5, rtol=1e-5)


def test_a_query_that_may_see_nothing_gives_zeros() -> None:
    layout = replace(PRESETS["exact"], warmup=1).layout(1, 32)
    books = Books.blank(layout, 1, 4)
    chunk = Chunk(*(torch.randn(1, 1, 4, 32) for _ in range(3)), None, torch.tensor([[False, False, True, True]]))
    books.advance(chunk)
    out = books.attend(chunk, 1.0)
    assert (out[0, :, :2] == 0).all()
    assert (out[0, :, 2:] != 0).all()


def test_a_mask_that_differs_between_heads_is_refused() -> None:
    layout = PRESETS["exact"].layout(2, 32)
    books = Books.blank(layout, 1, 4)
    chunk = Chunk(*(torch.randn(1, 2, 4, 32) for _ in range(3)), None, None)
    books.advance(chunk)
    with pytest.raises(NotImplementedError, match="differs between heads"):
        books.attend(chunk, 1.0, torch.ones(1, 2, 4, 4, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool))
