"""The other real model, most of whose layers see a window: Gemma 3 270M.

It is fetched and converted in a minute or two, so that in CI only what is in the cache already is tested.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import spectral_compile as sc
from spectral_compile.files import cache_folder
from spectral_compile.models import load
from spectral_compile.models import prompt as real_text
from tests.budget import FULL, examples

NAME = "gemma-3-270m"
pytestmark = [
    pytest.mark.xdist_group("gemma"),  # a worker loads it
    pytest.mark.skipif(
        not FULL and not (cache_folder() / NAME).is_dir(),
        reason=f"{NAME} is not in the cache: `spectral-compile doctor {NAME}` puts it there, and so does SPECTRAL_TESTS=full",
    ),
]
WINDOW = "the cache keeps only a window of its tokens"
Real = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def gemma() -> Real:
    """In float32: a CPU without instructions for bfloat16 takes several times as long in it."""
    return load(NAME, torch.float32)


def test_it_reads_and_writes_english(gemma: Real) -> None:
    model, tokenizer = gemma
    ids = real_text(tokenizer, 256)
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 25
    begun = tokenizer("The capital of France is the city of", return_tensors="pt")
    assert tokenizer.decode(model.generate(**begun, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


def test_the_layers_that_see_everything_are_compressed(gemma: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a prompt that is longer than the window, and mostly coded; in CI in the first six layers, of which one is full."""
    (model, tokenizer), layers = gemma, examples(6, full=18)
    monkeypatch.setattr(model.config, "num_hidden_layers", layers)
    sc.reset()
    ids = real_text(tokenizer, 640)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **given, return_dict_in_generate=True, output_logits=True)
    few = {"recent": 32, "block": 32, "warmup": 256}
    model.compile(backend=sc.spectral, options={"preset": "quality", "strict": True, "inner": "eager", **few})
    out = model.generate(ids, **given, return_dict_in_generate=True, output_logits=True)
    # after the prompt the windows are views of all its keys, whose strides are others than those of the next ones
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode", "decode"]
    for graph in sc.reports():
        assert (graph.sites, graph.matched) == (layers, layers // 6)
        assert {refusal.reason for refusal in graph.refusals} == {WINDOW}
    store = out.past_key_values.layers[5].keys.store
    assert store.layout.head_dim == 256 and store.timeline.ledger[0, 3] > 500
    dense, ours = (torch.stack(run.logits)[:, 0].log_softmax(-1) for run in (expected, out))
    assert 0 < (dense.exp() * (dense - ours)).sum(-1).mean() < 0.02  # nats; it is coded, but little is lost
