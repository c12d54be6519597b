"""Properties of the reference operations: what they store, and what attention on it gives, for random geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_compile.codec import PRESETS, Rotary
from spectral_compile.kernels.dense import materialise, rotate, unrotate
from spectral_compile.kernels.ledger import rows_of
from spectral_compile.kernels.values import Hidden
from tests.budget import examples
from tests.stores import Case, PlainStore, Step, cases, rotaries, tokens_of

PROPERTY = settings(max_examples=examples(25, full=120), deadline=None)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


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


class Dense:
    """The same tokens as plain lists, one a row, keys rotated; and of which column each token is."""

    def __init__(self, case: Case) -> None:
        self.case = case
        heads, dim = case.layout.kv_heads, case.layout.head_dim
        self.keys = [torch.zeros(heads, 0, dim) for _ in range(case.batch)]
        self.values = [torch.zeros(heads, 0, dim) for _ in range(case.batch)]
        self.columns = [torch.zeros(0, dtype=torch.int64) for _ in range(case.batch)]
        self.length = 0

    def append(self, step: Step) -> None:
        for row in range(self.case.batch):
            keep = tokens_of(step, row)
            known, count = self.keys[row].shape[1], int(keep.sum())
            ids = torch.arange(known, known + count) if step.ids is None else step.ids[min(row, len(step.ids) - 1)][keep]
            key = turned(step.key[row][:, keep], ids, self.case.layout.rotary)
            self.keys[row] = torch.cat((self.keys[row], key), 1)
            self.values[row] = torch.cat((self.values[row], step.value[row][:, keep]), 1)
            self.columns[row] = torch.cat((self.columns[row], keep.nonzero().flatten() + self.length))
        self.length += step.key.shape[2]

    def attend(self, step: Step, row: int, allowed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the step's tokens (already appended) see; ``allowed(query tokens [n, 1], key tokens [1, T])``."""
        keep = tokens_of(step, row)
        total = self.keys[row].shape[1]
        own = torch.arange(total - int(keep.sum()), total)[:, None]
        may = allowed(own, torch.arange(total)[None]).expand(len(own), total)
        return plain_attention(step.query[row][:, keep], self.keys[row], self.values[row], may, self.case.scale)


@PROPERTY
@given(cases())
def test_attend_equals_decode_then_attention(case: Case) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    for step in case.chunks:
        store.advance(step)
        out = store.attend(step, case.scale)
        for row, (before, _, after, *_) in enumerate(rows_of(store.ledger)):
            keep = tokens_of(step, row)
            key, value = store.held(row)
            key = torch.cat((key, turned(step.key[row][:, keep], store.positions[row, before:after], case.layout.rotary)), 1)
            value = torch.cat((value, step.value[row][:, keep]), 1)
            causal = torch.arange(after)[None] <= torch.arange(before, after)[:, None]
            expected = plain_attention(step.query[row][:, keep], key, value, causal, case.scale)
            torch.testing.assert_close(out[row][:, keep], expected, **CLOSE)
        store.append(step)


@PROPERTY
@given(cases(presets=("exact",)))
def test_lossless_attend_equals_causal_attention(case: Case) -> None:
    store, dense = PlainStore.blank(case.layout, case.batch, case.columns), Dense(case)
    for step in case.chunks:
        store.advance(step)
        out = store.attend(step, case.scale)
        store.append(step)
        dense.append(step)
        for row in range(case.batch):
            expected = dense.attend(step, row, lambda query, key: key <= query)
            torch.testing.assert_close(out[row][:, tokens_of(step, row)], expected, **CLOSE)


@PROPERTY
@given(cases(presets=("exact",)), st.integers(1, 30))
def test_window_hides_what_is_farther_behind(case: Case, window: int) -> None:
    store, dense = PlainStore.blank(case.layout, case.batch, case.columns), Dense(case)
    for step in case.chunks:
        store.advance(step)
        out = store.attend(step, case.scale, sliding_window=window)
        store.append(step)
        dense.append(step)
        for row in range(case.batch):
            expected = dense.attend(step, row, lambda query, key: (key <= query) & (query - key < window))
            torch.testing.assert_close(out[row][:, tokens_of(step, row)], expected, **CLOSE)


@PROPERTY
@given(cases(presets=("exact",)), st.booleans(), st.integers(0, 2**31))
def test_bool_mask_replaces_causality(case: Case, shared: bool, seed: int) -> None:
    """A mask speaks of columns; those of padding are seen by no query, whatever it says."""
    generator = torch.Generator().manual_seed(seed)
    store, dense = PlainStore.blank(case.layout, case.batch, case.columns), Dense(case)
    columns = torch.zeros(case.batch, case.columns + 7, dtype=torch.bool)
    for step in case.chunks:
        count, past = step.key.shape[2], dense.length
        mask = torch.rand(1 if shared else case.batch, 1, count, past + count, generator=generator) < 0.5
        store.advance(step)
        out = store.attend(step, case.scale, Hidden(mask, columns))
        store.append(step)
        dense.append(step)
        for row in range(case.batch):
            keep = tokens_of(step, row)
            columns[row, past : past + count] = keep
            may = mask[min(row, len(mask) - 1), 0][keep][:, dense.columns[row]]
            expected = dense.attend(step, row, lambda query, key, may=may: may)
            torch.testing.assert_close(out[row][:, keep], expected, **CLOSE)


@PROPERTY
@given(cases(batch=2), st.data())
def test_a_row_does_not_depend_on_its_neighbours(case: Case, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, case.batch - 1))

    def only(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) == 1 else x[row : row + 1]

    together, alone = (PlainStore.blank(case.layout, batch, case.columns) for batch in (case.batch, 1))
    for step in case.chunks:
        single = Step(*(only(x) for x in vars(step).values()))
        together.advance(step)
        alone.advance(single)
        assert torch.equal(together.attend(step, case.scale)[row], alone.attend(single, case.scale)[0])
        together.append(step)
        alone.append(single)
        for mine, own in zip(together.row(row), alone.row(0), strict=True):
            assert torch.equal(mine, own)


@PROPERTY
@given(cases(presets=("balanced", "seed"), batch=2))
def test_padding_does_not_reach_the_codes(case: Case) -> None:
    """A row stores the same bytes when what stands in its columns of padding changes."""
    first, second = (PlainStore.blank(case.layout, case.batch, case.columns) for _ in range(2))
    for step in case.chunks:
        valid = torch.ones(case.batch, step.key.shape[2], dtype=torch.bool) if step.valid is None else step.valid
        hidden = ~valid[:, None, :, None]
        other = replace(step, **{name: getattr(step, name).masked_fill(hidden, 1e4) for name in ("query", "key", "value")})
        for store, given_chunk in ((first, step), (second, other)):
            store.advance(given_chunk)
            store.append(given_chunk)
    for row in range(case.batch):
        for a, b in zip(first.row(row), second.row(row), strict=True):
            assert torch.equal(a, b)


@PROPERTY
@given(cases())
def test_ledger_adds_up(case: Case) -> None:
    layout, store = case.layout, PlainStore.blank(case.layout, case.batch, case.columns)
    tokens = [0] * case.batch
    for step in case.chunks:
        old, count = rows_of(store.ledger), step.key.shape[2]
        store.advance(step)
        if count == 1:
            for was, now in zip(old, rows_of(store.ledger), strict=True):
                (coded, waiting), (coded_after, waiting_after) = was[3:5], now[3:5]
                assert waiting_after == waiting
                assert coded_after == coded or not (waiting or layout.segment), "a step of one column begins no segment"
            store.catch_up(step)
        for row, (before, coded_before, after, coded, waiting, _) in enumerate(rows_of(store.ledger)):
            tokens[row] += int(tokens_of(step, row).sum())
            if count == 1:
                before, coded_before = old[row][2:4]
            assert (before, coded_before) == tuple(old[row][2:4])
            assert after == tokens[row]
            assert coded_before <= coded <= max(0, after - layout.first_exact - layout.recent)
            assert coded % layout.block == 0
            assert waiting <= old[row][4], "a row that has a basis never waits again"
            if waiting:
                assert coded == 0
                assert after - layout.first_exact < layout.recent + layout.first
            else:
                assert after - layout.first_exact - coded < layout.recent + layout.block


@PROPERTY
@given(cases())
def test_positions_are_those_of_the_tokens(case: Case) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    expected: list[list[int]] = [[] for _ in range(case.batch)]
    for step in case.chunks:
        store.advance(step)
        for row, known in enumerate(expected):
            keep = tokens_of(step, row)
            count = int(keep.sum())
            ids = step.ids[min(row, len(step.ids) - 1)][keep].tolist() if step.ids is not None else None
            known += range(len(known), len(known) + count) if ids is None else ids
            assert store.positions[row, : len(known)].tolist() == known


@PROPERTY
@given(cases(presets=("quality", "balanced", "compact", "seed")))
def test_what_is_not_coded_stays_exact_or_is_held_in_bytes(case: Case) -> None:
    layout, store, dense = case.layout, PlainStore.blank(case.layout, case.batch, case.columns), Dense(case)
    for step in case.chunks:
        store.advance(step)
        store.append(step)
        dense.append(step)
    for row, (_, _, after, coded, *_) in enumerate(rows_of(store.ledger)):
        key, value = materialise(row, after, coded, store.positions[row], store.buffers, layout)
        token = torch.arange(after)
        first, recent = token < layout.first_exact, token >= layout.first_exact + coded
        exact = first if layout.recent_bits == 8 else first | recent
        assert (first | recent).sum() >= min(after, layout.first_exact + layout.recent)
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
    rotated = rotate(x, ids, rotary)
    torch.testing.assert_close(rotated, turned(x, ids, rotary), atol=2e-3, rtol=0)  # float32 angles of some thousand radians
    torch.testing.assert_close(unrotate(rotated, ids, rotary), x, atol=1e-5, rtol=1e-5)


def test_a_query_that_may_see_nothing_gives_zeros() -> None:
    layout = replace(PRESETS["exact"], warmup=1).layout(1, 32)
    store = PlainStore.blank(layout, 1, 4)
    step = Step(*(torch.randn(1, 1, 4, 32) for _ in range(3)), None, torch.tensor([[False, False, True, True]]))
    store.advance(step)
    out = store.attend(step, 1.0)
    assert (out[0, :, :2] == 0).all()
    assert (out[0, :, 2:] != 0).all()


def test_a_mask_that_differs_between_heads_is_refused() -> None:
    layout = PRESETS["exact"].layout(2, 32)
    store = PlainStore.blank(layout, 1, 4)
    step = Step(*(torch.randn(1, 2, 4, 32) for _ in range(3)), None, None)
    store.advance(step)
    hidden = Hidden(torch.ones(1, 2, 4, 4, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="differs between heads"):
        store.attend(step, 1.0, hidden)
