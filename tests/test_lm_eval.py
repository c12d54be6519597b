"""lm-evaluation-harness on a compiled model: which of its requests the cache answers, and that ``exact`` changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import spectral_compile as sc
from spectral_compile import backend, report
from tests.examples import example
from tests.tiny import EXACT, build

SHORT = {"characters": 200}  # of text around what is asked for; EXACT's small windows have it coded nevertheless


@pytest.fixture(scope="module", name="example")
def lm_eval_tasks() -> ModuleType:
    return example("lm_eval_tasks")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; the byte zero ends a text."""
    zero = "Ā"  # as byte-level tokenizers write it
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter != zero, letter))
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=zero, pad_token=zero)


class Tried:
    """A tiny model, compiled with a preset or dense, in batches of two as a class of lm-eval runs it, and all it generated."""

    def __init__(self, example: ModuleType, tokenizer: PreTrainedTokenizerFast, kind: type, preset: str | None) -> None:
        self.example, self.outputs, self.samples, model = example, [], {}, build("llama")
        if preset:
            model.compile(backend=sc.spectral, options={**EXACT, "preset": preset})
        self.lm = kind(self.keeping(model), tokenizer=tokenizer, batch_size=2)

    def keeping(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, of which lm-eval gets tokens alone: caches stay here."""
        generate = model.generate

        def kept(**given: Any) -> torch.Tensor:
            self.outputs.append(generate(**given, return_dict_in_generate=True))
            return self.outputs[-1].sequences

        model.generate = kept
        return model

    def ask(self, *tasks: str) -> None:
        """Note for each item the text that came, or of each choice the log-likelihood and whether nothing is likelier."""
        found = self.example.evaluate(self.lm, *tasks, **SHORT)["samples"]
        self.samples |= {task: [sample["resps"] for sample in found[task]] for task in tasks}

    def tokens(self) -> torch.Tensor:
        """What was generated, behind prompts of one length: int64 [items, 8]."""
        return torch.cat([out.sequences for out in self.outputs])[:, -8:]


@pytest.fixture
def tried(example: ModuleType, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Tried]]:
    sc.reset()
    yield lambda preset, kind=example.HFLM: Tried(example, tokenizer, kind, preset)
    sc.reset()


@pytest.fixture(scope="module")
def dense(example: ModuleType, tokenizer: PreTrainedTokenizerFast) -> Tried:
    """What is not compiled, and has been asked already."""
    tried = Tried(example, tokenizer, example.HFLM, None)
    tried.ask("recall", "recall_choices")
    return tried


def assert_compressed(*kinds: str) -> None:
    """Graphs of these kinds and no others came, and all of their attention is compressed."""
    assert {graph.kind for graph in sc.reports()} == set(kinds)
    assert all(graph.matched == graph.sites == 2 for graph in sc.reports())
    assert report.decodes() == 0


@pytest.mark.parametrize("preset", ["exact", "compact"])
def test_log_likelihoods_are_the_dense_models_whatever_the_preset(tried: Any, dense: Tried, preset: str) -> None:
    """To the last bit, also where the codec loses: no cache is read."""
    ours = tried(preset)
    ours.ask("recall_choices")
    assert ours.samples["recall_choices"] == dense.samples["recall_choices"]
    assert_compressed("prefill")


def test_answers_that_exact_generates_are_the_dense_models(tried: Any, dense: Tried) -> None:
    exact = tried("exact")
    exact.ask("recall")
    assert exact.samples["recall"] == dense.samples["recall"]
    assert torch.equal(exact.tokens(), dense.tokens())
    assert_compressed("prefill", "decode")
    assert all(sc.memory_stats(out).parts["codes"] > 0 for out in exact.outputs)


def test_answers_come_from_the_cache_from_the_second_token_on(tried: Any, dense: Tried) -> None:
    lossy = tried("compact")
    lossy.ask("recall")
    assert torch.equal(lossy.tokens()[:, 0], dense.tokens()[:, 0])
    assert not torch.equal(lossy.tokens(), dense.tokens())
    assert_compressed("prefill", "decode")
    assert all(sc.memory_stats(out).ratio > 4 for out in lossy.outputs)


@pytest.mark.parametrize("preset", ["exact", "compact"])
def test_log_likelihoods_through_the_cache(
    tried: Any, dense: Tried, preset: str, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.ThroughCache, "chunk", 150)  # two to a text
    ours = tried(preset, example.ThroughCache)
    ours.ask("recall_choices")
    found, expected = (torch.tensor(x.samples["recall_choices"]) for x in (ours, dense))
    assert torch.allclose(found, expected, atol=1e-4, rtol=0) == (preset == "exact")
    assert_compressed("prefill", "extend")


def test_the_example_runs(
    example: ModuleType,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "compile_inner", lambda gm, *rest: gm.forward)  # a compiler takes a minute, and is torch's
    sc.reset()
    example.run(build("llama"), tokenizer, **SHORT)
    shown = capsys.readouterr().out
    assert shown.count("|recall_choices|") == 2 and shown.count("exact_match") == 1
    assert_compressed("prefill", "decode", "extend")
    assert "decode: 2 of 2 attention sites compressed" in shown
