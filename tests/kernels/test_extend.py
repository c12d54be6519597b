"""Long chunks over a compressed past, decoded some tokens at a time, against the reference; and which chunks are long."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_compile as sc
from spectral_compile.kernels.attend import extend
from spectral_compile.kernels.ledger import columns_of
from spectral_compile.kernels.values import NOTHING_HIDDEN, Hidden, Scoring
from tests.budget import examples
from tests.stores import Case, PlainStore, Step, cases, filled, moved, tokens_of
from tests.tiny import DEVICE, GREEDY, build, tokens


def by_library(store: PlainStore, step: Step, scale: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    chunk, past = moved(step.chunk, device), moved(store.past, device)
    chunk = chunk._replace(**{name: getattr(chunk, name).to(dtype) for name in ("query", "key", "value")})
    past = past._replace(buffers=past.buffers.cast(dtype, past.layout))
    return extend.attend(chunk, past, scale).float().cpu()


@settings(max_examples=examples(20, full=100), deadline=None)
@given(cases(), st.integers(1, 40))
def test_some_at_a_time_give_what_the_reference_gives(case: Case, at_once: int) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "AT_ONCE", at_once)
        for step in case.chunks:
            store.advance(step)
            got, expected = by_library(store, step, case.scale, torch.float32, "cpu"), store.attend(step, case.scale)
            for row in range(case.batch):
                keep = tokens_of(step, row)
                torch.testing.assert_close(got[row][:, keep], expected[row][:, keep], atol=2e-4, rtol=2e-4)
            store.append(step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "f16"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("preset", ["exact", "balanced", "seed"])
def test_long_chunks_in_half_precision(
    preset: str, dim: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extend, "AT_ONCE", 100)
    store, step = filled(preset, dim, past=500, new=600, batch=2)
    expected = store.attend(step, 0.1)
    got = by_library(store, step, 0.1, dtype, DEVICE)
    assert (got - expected).norm() < bound * expected.norm()


def test_a_prompt_in_long_chunks_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths; chunks of the prompt are long, and the last one and what follows are not."""
    chunks = []
    original = extend.attend
    monkeypatch.setattr(extend, "LEAST", 64)
    monkeypatch.setattr(extend, "attend", lambda step, *rest: chunks.append(step.columns) or original(step, *rest))
    sc.reset()
    model, prompt = build("llama"), tokens(2, 300)
    mask = torch.ones_like(prompt)
    mask[0, :37] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "prefill_chunk_size": 128, **GREEDY}
    expected = model.generate(prompt, **given)
    model.compile(backend=sc.spectral, options={"preset": "exact", "strict": True, "inner": "eager"})
    found = model.generate(prompt, **given)
    assert {(graph.kind, graph.matched, graph.sites) for graph in sc.reports()} == {
        ("prefill", 2, 2), ("extend", 2, 2), ("decode", 2, 2)
    }  # fmt: skip
    assert chunks == [128, 128]  # a layer each, and the other 44 columns by the kernel
    assert torch.equal(found, expected)


def test_what_the_library_does_not_know_is_left_to_the_kernel() -> None:
    query = torch.zeros(1, 2, extend.LEAST, 64)
    mask = torch.ones(1, 1, extend.LEAST, extend.LEAST, dtype=torch.bool)
    plain = Scoring(1.0)
    assert extend.takes(query, NOTHING_HIDDEN, plain)
    assert not extend.takes(query, Hidden(mask), plain)
    for other in ({"sliding_window": 9}, {"softcap": 30.0}, {"sink_score": torch.zeros(2)}):
        assert not extend.takes(query, NOTHING_HIDDEN, Scoring(1.0, **other))
    assert not extend.takes(query[:, :, 1:], NOTHING_HIDDEN, plain)


def test_a_row_of_padding_alone_sees_the_past() -> None:
    store, step = filled("balanced", 64, past=300, new=40, batch=2)
    step.valid = torch.ones(2, 40, dtype=torch.bool)
    step.valid[1] = False
    rows = columns_of(store.ledger)
    rows.after[1] = rows.before[1]
    got = by_library(store, step, 0.1, torch.float32, "cpu")
    expected = store.attend(step, 0.1)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert got[1].any()
