"""Coded tokens as dense keys and values, and attention in parts, by kernels, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_compile.kernels import dense
from spectral_compile.kernels.attend.join import join
from spectral_compile.kernels.attend.rebuild import rebuild
from spectral_compile.kernels.digits import INTERPRETED
from spectral_compile.kernels.ledger import rows_of
from tests.budget import examples
from tests.kernels.test_native import CODED
from tests.stores import Case, PlainStore, cases, filled, moved
from tests.tiny import DEVICE

EXTENT = 3e-6 if INTERPRETED else 2e-4  # products of float32 are made of three of TF32 there


def assert_rebuilt(store: PlainStore, dtype: torch.dtype, bound: float) -> None:
    """Relative to the size of each token's keys, or values."""
    past = moved(store.past, DEVICE)
    past = past._replace(buffers=past.buffers.cast(dtype, past.layout))
    first, layout = store.layout.first_exact, store.layout
    for row, (_, coded, *_) in enumerate(rows_of(store.ledger)):
        for segment, slots in dense.spans(row, coded, store.buffers, layout):
            got = rebuild(row, segment, slots, past)
            key, value = (dense.decode(row, segment, slots, side, store.buffers, layout) for side in ("k", "v"))
            at = store.positions[row, first + slots.start : first + slots.stop]
            for x, expected in zip(got, (dense.rotate(key, at, layout.rotary), value), strict=True):
                assert x.dtype == dtype and x.shape == expected.shape
                size = expected.norm(dim=-1).max().clamp(min=1e-30)
                assert (x.cpu().float() - expected).norm(dim=-1).max() <= bound * size


@settings(max_examples=examples(15, full=100), deadline=None)
@given(cases(presets=CODED))
def test_rebuilt_tokens_equal_the_reference(case: Case) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    for step in case.chunks:
        store.advance(step)
        store.append(step)
    store.catch_up(step)
    assert_rebuilt(store, torch.float32, 10 * EXTENT)


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3])
@pytest.mark.parametrize("preset", CODED)
def test_keys_of_any_size_are_rebuilt_in_float16(preset: str, size: float) -> None:
    store, _ = filled(preset, 64, past=900, new=3, key_size=size, head_group=2)
    assert_rebuilt(store, torch.float16, 2e-3)


def test_positions_with_jumps() -> None:
    ids = torch.arange(903)
    ids[300:] += 4000
    ids[500:] -= 200
    store, _ = filled("balanced", 64, past=900, new=3, ids=ids)
    assert_rebuilt(store, torch.float32, 2e-3)  # the reference rounds angles of 5000 radians


@settings(max_examples=examples(20, full=100), deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([8, 64, 80]), st.booleans())
def test_parts_join_to_one_softmax(heads: int, queries: int, dim: int, tokens_first: bool) -> None:
    generator = torch.Generator().manual_seed(heads * queries)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if tokens_first else x

    scores, values = 20 * randn(heads, queries, 12), randn(heads, 12, dim)
    scores[0, 0, :5] = float("-inf")  # a query that sees nothing of the first part
    parts = [(scores[..., part].softmax(-1).nan_to_num(0) @ values[:, part], scores[..., part].logsumexp(-1))
             for part in (slice(5), slice(5, None))]  # fmt: skip
    (out, total), (more, more_total) = ((laid_out(x).to(DEVICE), t.to(DEVICE)) for x, t in parts)
    join(out, total, more, more_total)
    torch.testing.assert_close(out.cpu(), scores.softmax(-1) @ values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.cpu(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
