"""Long chunks over a compressed past: the past decoded piece by piece against the reference, and which chunks are long."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_compile as sc
from spectral_compile.kernels import extend
from tests.budget import examples
from tests.stores import DEVICE, Books, Case, Chunk, cases, on_device, store, tokens_of
from tests.tiny import GREEDY, build, tokens


def in_pieces(books: Books, chunk: Chunk, scale: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    ledger, positions, buffers = on_device(books) if device != "cpu" else (books.ledger, books.positions, books.buffers)
    held = buffers.cast(dtype, books.layout)
    given = (x.to(device, dtype) for x in (chunk.query, chunk.key, chunk.value))
    valid = None if chunk.valid is None else chunk.valid.to(device)
    return extend.attend(*given, ledger, positions, valid, held, books.layout, scale).float().cpu()


@settings(max_examples=examples(20, full=100), deadline=None)
@given(cases(), st.integers(1, 40))
def test_pieces_give_what_the_reference_gives(case: Case, piece: int) -> None:
    books = Books.blank(case.layout, case.batch, case.columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "PIECE", piece)
        for chunk in case.chunks:
            books.advance(chunk)
            got, expected = in_pieces(books, chunk, case.scale, torch.float32, "cpu"), books.attend(chunk, case.scale)
            for row in range(case.batch):
                keep = tokens_of(chunk, row)
                torch.testing.assert_close(got[row][:, keep], expected[row][:, keep], atol=2e-4, rtol=2e-4)
            books.append(chunk)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "f16"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("preset", ["exact", "balanced", "seed"])
def test_pieces_in_half_precision(
    preset: str, dim: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extend, "PIECE", 100)
    books, chunk = store(preset, dim, past=500, chunk=600, batch=2)
    expected = books.attend(chunk, 0.1)
    got = in_pieces(books, chunk, 0.1, dtype, DEVICE)
    assert (got - expected).norm() < bound * expected.norm()


def test_a_prompt_in_long_chunks_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths; chunks of the prompt are long, and the last one and what follows are not."""
    chunks = []
    original = extend.attend
    monkeypatch.setattr(extend, "LEAST", 64)
    monkeypatch.setattr(extend, "attend", lambda query, *rest: chunks.append(query.shape[2]) or original(query, *rest))
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
    assert extend.takes(query, None, 0, 0.0, None)
    for other in ((mask, 0, 0.0, None), (None, 9, 0.0, None), (None, 0, 30.0, None), (None, 0, 0.0, torch.zeros(2))):
        assert not extend.takes(query, *other)
    assert not extend.takes(query[:, :, 1:], None, 0, 0.0, None)


def test_a_row_of_padding_alone_sees_the_past() -> None:
    books, chunk = store("balanced", 64, past=300, chunk=40, batch=2)
    chunk.valid = torch.ones(2, 40, dtype=torch.bool)
    chunk.valid[1] = False
    books.ledger[1, 2] = books.ledger[1, 0]
    got = in_pieces(books, chunk, 0.1, torch.float32, "cpu")
    expected = books.attend(chunk, 0.1)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert got[1].any()
