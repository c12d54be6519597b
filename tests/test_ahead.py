"""The loop that reads answers a step late gives what transformers' own loop gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.errors import Mistake
from spectral_compile.outputs import cache_argument, cache_of
from tests.hybrids import HYBRIDS
from tests.tiny import build, tokens

OPTIONS = {"preset": "exact", "strict": True, "inner": "eager"}


def model_of(name: str = "llama", compressed: bool = True) -> Any:
    sc.reset()
    model = build(name)
    if compressed:
        model.compile(backend=sc.spectral, options=OPTIONS)
    return model


def both(model: Any, prompt: torch.Tensor, **how: Any) -> tuple[Any, Any]:
    """What transformers' loop gives, then what the one that runs ahead gives."""
    made = []
    for loop in ({}, {"custom_generate": sc.run_ahead}):
        torch.manual_seed(3)
        made.append(model.generate(prompt, **{"max_new_tokens": 12, "do_sample": False, **how}, **loop))
    return made[0], made[1]


def end_of(model: Any, prompt: torch.Tensor, step: int, **how: Any) -> int:
    """A token that greedy search makes at this step of the first text, and not before."""
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, **how)[0, prompt.shape[1] :].tolist()
    assert made.index(made[step]) == step, "else a text ends earlier than the test says"
    return made[step]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "one token": {"max_new_tokens": 1},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compressed", [True, False])
def test_tokens_are_those_of_the_ordinary_loop(way: str, compressed: bool) -> None:
    model = model_of(compressed=compressed and way != "without a cache")
    assert torch.equal(*both(model, tokens(2, 40), **WAYS[way]))
    assert report.decodes() == 0
    if compressed and way not in ("without a cache", "one token"):
        assert {(graph.kind, graph.sites, graph.matched) for graph in sc.reports()} == {("prefill", 2, 2), ("decode", 2, 2)}


@pytest.mark.parametrize("step", [0, 1, 5, 11])
def test_a_text_ends_where_it_would_and_the_cache_holds_no_more(step: int) -> None:
    """At the first step, in the midst, and at the last one, after which no step is too many."""
    model, prompt = model_of(), tokens(1, 40)
    end = end_of(model, prompt, step)
    want, got = both(
        model, prompt, eos_token_id=end, return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert torch.equal(want.sequences, got.sequences) and want.sequences.shape[1] == 41 + step
    for one, other in zip(want.scores + want.logits, got.scores + got.logits, strict=True):
        assert torch.equal(one, other)
    assert cache_of(want).get_seq_length() == cache_of(got).get_seq_length() == 40 + step
    more = [
        model.generate(out.sequences, max_new_tokens=3, do_sample=False, **cache_argument(cache_of(out))) for out in (want, got)
    ]
    assert torch.equal(*more), "a second turn"


def test_rows_that_end_apart_are_padded() -> None:
    model, prompt = model_of(), tokens(2, 40)
    end = end_of(model, prompt, 4)
    want, got = both(model, prompt, eos_token_id=end)
    assert torch.equal(want, got) and (want == 0).any()


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.given.append([])


@pytest.mark.parametrize("step", [4, 11])
def test_a_streamer_is_given_the_same_tokens(step: int) -> None:
    model, prompt = model_of(), tokens(1, 40)
    end, streams = end_of(model, prompt, step), (Streamed(), Streamed())
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    model.generate(prompt, streamer=streams[0], **how)
    model.generate(prompt, custom_generate=sc.run_ahead, stream_to=streams[1], **how)
    assert streams[0].given == streams[1].given


class After(StoppingCriteria):
    """Ends every text with so many tokens, and counts how often it is asked."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.asked += 1
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_criterion_of_the_caller_ends_a_text_and_is_asked_once_more() -> None:
    model, prompt, criteria = model_of(), tokens(1, 40), (After(45), After(45))
    made = [
        model.generate(prompt, max_new_tokens=12, do_sample=False, stopping_criteria=StoppingCriteriaList([one]), **loop)
        for one, loop in zip(criteria, ({}, {"custom_generate": sc.run_ahead}), strict=True)
    ]
    assert torch.equal(*made) and [one.asked for one in criteria] == [5, 6]


def test_the_answer_to_a_step_is_read_after_the_next_one_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_compile import ahead

    model, prompt, seen = model_of(compressed=False), tokens(1, 40), []
    forward, told = model.forward, ahead._told
    monkeypatch.setattr(model, "forward", lambda *a, **k: (seen.append("launched"), forward(*a, **k))[1])
    monkeypatch.setattr(ahead, "_told", lambda *a: (seen.append("read"), told(*a))[1])
    model.generate(prompt, max_new_tokens=4, do_sample=False, custom_generate=sc.run_ahead)
    assert seen == ["launched", "launched", "read", "launched", "read", "launched", "read"]


def test_a_cache_that_cannot_take_a_step_back_is_never_a_step_ahead() -> None:
    """Of a window that has slid what was before it is gone."""
    model, prompt = model_of("qwen2-with-windows", compressed=False), tokens(1, 60)
    end = end_of(model, prompt, 5)
    want, got = both(model, prompt, eos_token_id=end, return_dict_in_generate=True)
    assert torch.equal(want.sequences, got.sequences)
    assert cache_of(want).get_seq_length() == cache_of(got).get_seq_length()


@pytest.mark.parametrize("name", ["qwen3-next", "lfm2"])
def test_a_state_is_no_step_ahead_of_its_text(name: str) -> None:
    """A step that is too many cannot be taken out of it again."""
    sc.reset()
    torch.manual_seed(0)
    model, prompt = HYBRIDS[name]().eval(), tokens(1, 40)
    ends = StoppingCriteriaList([After(44)])  # a random model may make one token again and again
    want, got = both(model, prompt, stopping_criteria=ends, return_dict_in_generate=True)
    assert torch.equal(want.sequences, got.sequences) and got.sequences.shape[1] == 44
    more = [
        model.generate(out.sequences, max_new_tokens=8, do_sample=False, **cache_argument(cache_of(out))) for out in (want, got)
    ]
    assert torch.equal(*more), "a second turn"


def test_a_text_without_a_cache_ends_where_it_would() -> None:
    model, prompt = model_of(compressed=False), tokens(1, 40)
    want, got = both(model, prompt, eos_token_id=end_of(model, prompt, 4), use_cache=False, return_dict_in_generate=True)
    assert torch.equal(want.sequences, got.sequences) and cache_of(got) is None


def test_a_streamer_that_would_be_given_nothing_is_refused() -> None:
    """Who reads from it in another thread would wait for ever."""
    with pytest.raises(Mistake, match="pass it as stream_to instead"):
        model_of(compressed=False).generate(tokens(1, 40), max_new_tokens=2, streamer=Streamed(), custom_generate=sc.run_ahead)


def test_beams_are_refused() -> None:
    with pytest.raises(Mistake, match="one text a prompt, greedily or by sampling"):
        model_of(compressed=False).generate(tokens(1, 40), max_new_tokens=2, num_beams=2, custom_generate=sc.run_ahead)
