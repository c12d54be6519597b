"""Attention that is compiled from C, against the reference."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_compile as sc
from spectral_compile.codec import PRESETS
from spectral_compile.kernels.attend.native import attend as native
from spectral_compile.kernels.attend.native import library
from spectral_compile.kernels.ledger import columns_of
from spectral_compile.kernels.values import NOTHING_HIDDEN, Hidden, Scoring
from tests.budget import examples
from tests.kernels.test_attend import Real, real_store
from tests.stores import Case, PlainStore, Step, cases, filled, tokens_of
from tests.tiny import GREEDY, WINDOWS, build, tokens

CODED = tuple(name for name in PRESETS if name != "exact")
CLOSE = {"atol": 5e-5, "rtol": 5e-5}


def assert_same(store: PlainStore, step: Step, scale: float, hidden: Hidden = NOTHING_HIDDEN, **how: object) -> None:
    assert native.takes(step.chunk, store.layout)
    got = native.attend(step.chunk, store.past, Scoring(scale, **how), hidden)  # type: ignore[arg-type]
    expected = store.attend(step, scale, hidden, **how)
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.transpose(1, 2).is_contiguous()
    for row in range(len(got)):
        torch.testing.assert_close(got[row][:, tokens_of(step, row)], expected[row][:, tokens_of(step, row)], **CLOSE)


@settings(max_examples=examples(40, full=300), deadline=None)
@given(cases(presets=CODED), st.sampled_from(["nothing", "softcap", "sinks", "window", "mask"]), st.integers(0, 2**31))
def test_attend_equals_the_reference(case: Case, what: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    held, at = torch.zeros(case.batch, case.columns, dtype=torch.bool), 0
    for step in case.chunks:
        count = step.key.shape[2]
        store.advance(step)
        how = {
            "softcap": {"softcap": 0.3},
            "sinks": {"sink_score": torch.linspace(-2.0, 3.0, case.layout.kv_heads * case.groups)},
            "window": {"sliding_window": 1 + seed % 30},
        }.get(what, {})
        hidden = NOTHING_HIDDEN
        if what == "mask":
            mask = torch.rand(case.batch if seed % 2 else 1, 1, count, at + count, generator=generator) < 0.6
            visible = (torch.rand(store.positions.shape, generator=generator) < 0.7).to(torch.uint8)
            hidden = Hidden(mask, held, visible if seed % 3 else None)
        if native.takes(step.chunk, store.layout):
            assert_same(store, step, case.scale, hidden, **how)
        store.append(step)
        held[:, at : at + count] = True if step.valid is None else step.valid
        at += count


@pytest.mark.parametrize(("preset", "dim"), list(product(CODED, [64, 80, 96, 128, 256])))
def test_every_head_dim_and_preset(preset: str, dim: int) -> None:
    assert_same(*filled(preset, dim, past=190, new=1), 0.1)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("preset", "batch", "head_group", "new"), list(product(CODED, [1, 2], [1, 2], [1, 3])))
def test_a_past_that_is_split_among_threads(threads: None, preset: str, batch: int, head_group: int, new: int) -> None:
    assert_same(*filled(preset, 64, past=450, new=new, batch=batch, head_group=head_group, recent_bits=8), 0.1)


@pytest.mark.parametrize("new", [1, 3])
def test_positions_with_gaps_and_far_on(new: int) -> None:
    ids = torch.arange(200 + new)
    ids[100:] += 10**4
    ids[150:] -= 200
    store, step = filled("balanced", 64, past=200, new=new, ids=ids)
    assert columns_of(store.ledger).gaps[0] >= 2
    # the reference multiplies positions and frequencies in single precision
    got = native.attend(step.chunk, store.past, Scoring(0.1))
    torch.testing.assert_close(got, store.attend(step, 0.1), atol=2e-3, rtol=2e-3)


def test_large_scores() -> None:
    """Exponentials count from the largest score that there was, which a later tile exceeds."""
    store, step = filled("balanced", 64, past=450, new=3)
    got = native.attend(step.chunk, store.past, Scoring(40.0))
    # scores of 1000 have an error of 1e-4 in single precision, and weights the same
    torch.testing.assert_close(got, store.attend(step, 40.0), atol=1e-3, rtol=1e-3)


def test_a_query_that_sees_nothing_gives_zeros_whatever_values_are() -> None:
    store, step = filled("balanced", 64, past=190, new=1)
    step.value[:] = torch.nan
    hidden = Hidden(torch.zeros(1, 1, 1, 191, dtype=torch.bool), torch.ones(1, 190, dtype=torch.bool))
    assert not native.attend(step.chunk, store.past, Scoring(0.1), hidden).any()


def test_a_key_that_is_no_number_shows() -> None:
    store, step = filled("balanced", 64, past=190, new=1)
    step.key[:, 0, 0, 5] = torch.nan
    got, expected = native.attend(step.chunk, store.past, Scoring(0.1)), store.attend(step, 0.1)
    torch.testing.assert_close(got, expected, equal_nan=True, **CLOSE)
    assert got[0, :2].isnan().all() and not got[0, 2:].isnan().any()


def test_a_step_over_a_real_cache(smollm2: Real) -> None:
    store, step = real_store(smollm2, "balanced", 12, past=700, count=1)
    assert_same(store, step, 0.125)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recent_bits", [8, 16])
def test_results_are_in_the_dtype_of_the_query(dtype: torch.dtype, recent_bits: int) -> None:
    store, step = filled("balanced", 64, past=190, new=1, recent_bits=recent_bits)
    half = replace(step, **{name: getattr(step, name).to(dtype) for name in ("query", "key", "value")})
    store.buffers = store.buffers.cast(dtype, store.layout)
    assert native.takes(half.chunk, store.layout)
    got = native.attend(half.chunk, store.past, Scoring(0.1))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), store.attend(step, 0.1), atol=2e-2, rtol=2e-2)


def test_every_layer_of_every_decode_step_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = native.attend
    monkeypatch.setattr(native, "attend", lambda chunk, *rest: calls.append(chunk.columns) or attend(chunk, *rest))
    sc.reset()
    model, prompt = build("llama"), tokens(1, 90)
    model.compile(backend="spectral", options={"preset": "balanced", "strict": True, "inner": "eager", "warmup": 16, **WINDOWS})
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, **GREEDY)
    assert {graph.kind: (graph.matched, graph.sites) for graph in sc.reports()} == {"prefill": (2, 2), "decode": (2, 2)}
    assert calls == [1] * 2 * 5, "two layers, and a step for each token but the first"


def test_what_is_compiled_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))
    assert library.library.__wrapped__() is not None
    (made,) = tmp_path.iterdir()
    run = subprocess.run

    def no_compilation(command: list[str], **how: object) -> object:
        assert command[1:] == ["--version"]
        return run(command, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(library.subprocess, "run", no_compilation)
    assert library.library.__wrapped__() is not None
    assert list(tmp_path.iterdir()) == [made]


def test_without_a_compiler_attention_runs_in_pytorch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/compiler")
    with pytest.warns(UserWarning, match="install gcc or clang"):
        assert library.library.__wrapped__() is None
    monkeypatch.setattr(native, "library", lambda: None)
    store, step = filled("balanced", 64, past=190, new=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.takes(step.chunk, store.layout)


def test_what_is_lossless_or_long_is_left_to_pytorch() -> None:
    store, step = filled("exact", 64, past=190, new=1)
    assert not native.takes(step.chunk, store.layout)
    store, step = filled("balanced", 64, past=190, new=native.MOST + 1)
    assert not native.takes(step.chunk, store.layout)
