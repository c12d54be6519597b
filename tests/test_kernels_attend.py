"""Attention in Triton against the reference, for random stores, in the interpreter or on the GPU that is there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_compile.codec import PRESETS, Rotary, Tiers
from spectral_compile.kernels import fused
from spectral_compile.kernels.buffers import Buffers, Capacity, allocate
from spectral_compile.kernels.digits import HALFWORDS, pieces
from spectral_compile.kernels.rotary import TILE
from tests.test_reference import Books, Case, Chunk, cases, tokens_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=12, deadline=None)  # the interpreter is slow


def on_device(books: Books) -> tuple[Tensor, Tensor, Buffers]:
    return books.ledger.to(DEVICE), books.positions.to(DEVICE), Buffers(*(x.to(DEVICE) for x in books.buffers))


def fused_attend(
    books: Books, chunk: Chunk, scale: float, mask: Tensor | None = None, columns: Tensor | None = None, window: int = 0
) -> Tensor:
    ledger, positions, buffers = on_device(books)
    given = (chunk.query, chunk.key, chunk.value, mask, columns, None, None, chunk.valid)
    query, key, value, mask, columns, _, _, valid = (x if x is None else x.to(DEVICE) for x in given)
    out = fused.attend(query, key, value, mask, columns, ledger, positions, valid, buffers, books.layout, scale, window)
    return out.to("cpu")


def assert_same(got: Tensor, expected: Tensor, chunk: Chunk) -> None:
    for row in range(len(got)):
        keep = tokens_of(chunk, row)
        torch.testing.assert_close(got[row][:, keep], expected[row][:, keep], atol=2e-4, rtol=2e-4)


@FEW
@given(cases())
def test_attend_equals_the_reference(case: Case) -> None:
    books = Books.blank(case.layout, case.batch, case.columns)
    for chunk in case.chunks:
        books.advance(chunk)
        assert_same(fused_attend(books, chunk, case.scale), books.attend(chunk, case.scale), chunk)
        books.append(chunk, case.o_weight)


@FEW
@given(cases(), st.integers(1, 30))
def test_windows_hide_the_same_tokens(case: Case, window: int) -> None:
    books = Books.blank(case.layout, case.batch, case.columns)
    for chunk in case.chunks:
        books.advance(chunk)
        expected = books.attend(chunk, case.scale, window=window)
        assert_same(fused_attend(books, chunk, case.scale, window=window), expected, chunk)
        books.append(chunk, case.o_weight)


@FEW
@given(cases(), st.integers(0, 2**31))
def test_masks_hide_the_same_tokens(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    books = Books.blank(case.layout, case.batch, case.columns)
    held = torch.zeros(case.batch, case.columns, dtype=torch.bool)
    at = 0
    for chunk in case.chunks:
        count = chunk.key.shape[2]
        rows = case.batch if seed % 2 else 1
        mask = torch.rand(rows, 1, count, at + count, generator=generator) < 0.6
        books.advance(chunk)
        expected = books.attend(chunk, case.scale, mask, held)
        assert_same(fused_attend(books, chunk, case.scale, mask, held), expected, chunk)
        books.append(chunk, case.o_weight)
        held[:, at : at + count] = True if chunk.valid is None else chunk.valid
        at += count


def store(
    preset: str, dim: int, past: int, chunk: int, ids: Tensor | None = None, batch: int = 1, head_group: int | None = None
) -> tuple[Books, Chunk]:
    """A store with ``past`` tokens and a chunk that has been entered in its books."""
    generator = torch.Generator().manual_seed(dim + past)
    rotary = Rotary(tuple(10000.0 ** (-2 * i / dim) for i in range(dim // 2)))
    layout = PRESETS[preset].layout(2, dim, rotary)
    layout = type(layout)(**{**vars(layout), "recent": 20, "block": 32, "warmup": 64, "segment": 64 * (layout.segment > 0)})

    def some(count: int) -> Chunk:
        def randn(heads: int) -> Tensor:
            return torch.randn(batch, heads, count, dim, generator=generator)

        return Chunk(randn(4), randn(2) * torch.logspace(0, -1.5, dim), randn(2), None, None)

    books = Books.blank(layout, batch, past + chunk)
    first, second = some(past), some(chunk)
    first.ids = None if ids is None else ids[None, :past]
    second.ids = None if ids is None else ids[None, past:]
    books.advance(first)
    books.append(first, None)
    books.advance(second)
    return books, second


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_head_dim_and_preset(preset: str, dim: int) -> None:
    books, chunk = store(preset, dim, past=190, chunk=1)
    assert_same(fused_attend(books, chunk, 0.1), books.attend(chunk, 0.1), chunk)


@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_positions_with_gaps(chunk: int) -> None:
    """The table of rotations knows distances within a tile: a jump inside of one is none of them."""
    ids = torch.arange(200 + chunk)
    ids[100:] += 10**5
    ids[150:] -= 3 * TILE
    books, step = store("balanced", 64, past=200, chunk=chunk, ids=ids)
    assert books.ledger[0, 5] >= 2
    assert_same(fused_attend(books, step, 0.1), books.attend(step, 0.1), step)


def test_many_queries_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    books, chunk = store("balanced", 64, past=150, chunk=90, batch=2)
    monkeypatch.setattr(fused, "_SCRATCH", 1)
    assert_same(fused_attend(books, chunk, 0.1), books.attend(chunk, 0.1), chunk)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, of what is done again
@pytest.mark.parametrize("scale", [3.0, 40.0])
@pytest.mark.parametrize("preset", ["seed", "balanced"])
def test_scores_far_from_any_reference(preset: str, scale: float) -> None:
    """Exponentials count from a reference that is not the maximum: one that is too far off must be found and replaced."""
    books, chunk = store(preset, 64, past=190, chunk=3)
    assert_same(fused_attend(books, chunk, scale), books.attend(chunk, scale), chunk)


@pytest.mark.parametrize("past", [190, 211, 212, 213])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_step_of_one_column_attends_and_enters(preset: str, past: int) -> None:
    books, chunk = store(preset, 64, past=past, chunk=1, batch=2)
    expected = books.attend(chunk, 0.1)
    ledger, positions, buffers = on_device(books)
    tokens = (x.to(DEVICE) for x in (chunk.query, chunk.key, chunk.value))
    got = fused.attend(*tokens, None, None, ledger, positions, None, buffers, books.layout, 0.1, 0, enters=True)
    assert_same(got.cpu(), expected, chunk)
    books.append(chunk, None)
    for name, mine, theirs in zip(Buffers._fields, buffers, books.buffers, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, msg=name)


def test_a_step_with_one_basis_for_all_tokens_leaves_its_product_for_the_end() -> None:
    books, chunk = store("balanced", 64, past=190, chunk=1, batch=2)
    assert books.buffers.starts.shape[1] > 1
    one = Capacity(books.buffers.k_codes.shape[2], books.buffers.k_exact.shape[2] - books.layout.sinks, 1)
    fewer = allocate(books.layout, 2, one, torch.float32, "cpu")
    books.buffers = Buffers(*(x[tuple(map(slice, y.shape))] for x, y in zip(books.buffers, fewer, strict=True)))
    books.buffers = Buffers(*(x.contiguous() for x in books.buffers))
    assert_same(fused_attend(books, chunk, 0.1), books.attend(chunk, 0.1), chunk)


TIERS = [Tiers(3, 5, 9), Tiers(0, 0, 7), Tiers(1, 0, 0), Tiers(0, 16, 0), Tiers(16, 30, 18), Tiers(4, 24, 48), Tiers(0, 8, 80)]


@pytest.mark.parametrize("tiers", TIERS)
def test_pieces_cover_every_halfword_once(tiers: Tiers) -> None:
    parts = pieces(tiers)
    covered = [halfword for first, count, _, _ in parts for halfword in range(first, first + count)]
    assert covered == list(range(tiers.row_bytes // 2))
    for first, count, padded, bits in parts:
        assert HALFWORDS <= padded >= count
        assert padded & (padded - 1) == 0
        assert padded * 16 // bits >= 16
        assert bits == 2 or 2 * (first + count) <= tiers.bits8 + -(-tiers.bits4 // 2) or not tiers.bits2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "f16"])
@pytest.mark.parametrize("count, dim", [(1, 64), (1, 128), (40, 64), (40, 256)])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_half_precision_is_near_the_reference_in_single(
    preset: str, count: int, dim: int, dtype: torch.dtype, bound: float
) -> None:
    books, chunk = store(preset, dim, past=500, chunk=count, batch=2)
    halves = ("k_exact", "v_exact", *(("k_codes", "v_codes") if books.layout.lossless else ()))
    rounded = {name: getattr(books.buffers, name).to(dtype) for name in halves}
    books.buffers = books.buffers._replace(**{name: x.float() for name, x in rounded.items()})
    chunk = Chunk(*(x.to(dtype).float() for x in (chunk.query, chunk.key, chunk.value)), None, None)
    expected = books.attend(chunk, 0.1)
    books.buffers = books.buffers._replace(**rounded)
    half = Chunk(*(x.to(dtype) for x in (chunk.query, chunk.key, chunk.value)), None, None)
    got = fused_attend(books, half, 0.1).float()
    assert (got - expected).norm() < bound * expected.norm()
