"""Whoever asks for the backend where it cannot be reached is told at once, and what to write."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile import asked
from spectral_compile.report import expect_a_graph
from tests.tiny import EXACT, GREEDY, build, tokens


class Wrapper(torch.nn.Module):
    """As libraries wrap a model: a call of its own, and a ``generate`` that hands on."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **given: object) -> object:
        return self.inner(**given)

    def generate(self, *given: object, **more: object) -> object:
        return self.inner.generate(*given, **more)


def with_adapter(model: PreTrainedModel) -> torch.nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4)).eval()


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


@pytest.mark.parametrize(("wrap", "path"), [(with_adapter, "base_model.model"), (Wrapper, "inner")])
def test_a_wrapper_whose_generate_delegates_is_reported_with_what_to_write(wrap, path: str) -> None:
    model = wrap(build("llama"))
    model.compile(backend=sc.spectral, options=EXACT)
    prompt = {"input_ids": tokens(1, 20), "attention_mask": torch.ones(1, 20, dtype=torch.int64)}
    model.generate(**prompt, max_new_tokens=2, **GREEDY)
    (line,) = sc.reports()
    assert line.matched == 0 and f'call model.get_submodule("{path}").compile(backend="spectral")' in str(line)
    model.get_submodule(path).compile(backend=sc.spectral, options=EXACT)
    model.generate(**prompt, max_new_tokens=2, **GREEDY)
    assert [(graph.kind, graph.matched) for graph in sc.reports()] == [("prefill", 2), ("decode", 2)]


def test_looking_the_backend_up_for_such_a_wrapper_warns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **given: expect_a_graph())  # where torch.compile looks it up
    with pytest.warns(sc.SpectralWarning, match=r'get_submodule\("inner"\)'):
        Wrapper(build("llama")).compile(backend="spectral")


def test_models_and_modules_without_generate_are_not_spoken_of() -> None:
    model, plain = build("llama"), torch.nn.Linear(2, 2)
    for module in (model, plain, model.model):
        module.compile(backend=sc.spectral, options=EXACT)
        assert asked.passed_by(module) is None
    assert sc.reports() == []
    wrapper = Wrapper(model)
    wrapper.compile(backend="eager")
    assert asked.misdirected() == [], "compiled with another backend"
