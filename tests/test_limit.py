"""Dynamo stops asking backends after some graphs of one function: nobody meets that in ordinary use, and who does is told."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from torch._dynamo import config
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.report import SpectralWarning
from spectral_compile.tensor import SpectralTensor
from tests.budget import FULL
from tests.tiny import EXACT, GREEDY, WINDOWS, build, tokens

NAMES = ("llama", "qwen2", "qwen3", "gpt2", "gpt-neox", "phi3") if FULL else ("llama",)
THREADS = 10 if FULL else 5
HELD = {"return_dict_in_generate": True, "max_new_tokens": 4}


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def run(model: PreTrainedModel, prompt: torch.Tensor, **more: object) -> object:
    """The cache after a few tokens."""
    return model.generate(prompt, **{**HELD, **GREEDY, **more}).past_key_values


def second_turn(model: PreTrainedModel, rows: int) -> object:
    first = model.generate(tokens(rows, 30), **HELD, **GREEDY)
    prompt = torch.cat((first.sequences, tokens(rows, 9, seed=1)), 1)
    mask = torch.ones_like(prompt)
    return run(model, prompt, attention_mask=mask, past_key_values=first.past_key_values)


def padded(rows: int, count: int, left: int) -> torch.Tensor:
    mask = torch.ones(rows, count, dtype=torch.int64)
    mask[0, :left] = 0
    return mask


def called(model: PreTrainedModel) -> object:
    """Without ``generate`` and without a mask."""
    with torch.no_grad():
        cache = model(tokens(1, 21), use_cache=True).past_key_values
        model(tokens(1, 1), past_key_values=cache, use_cache=True)
    return cache


def embedded(model: PreTrainedModel) -> object:
    prompt = tokens(1, 25)
    given = {"inputs_embeds": model.get_input_embeddings()(prompt).detach(), "attention_mask": torch.ones_like(prompt)}
    return model.generate(**given, **HELD, **GREEDY).past_key_values


KINDS: dict[str, Callable[[PreTrainedModel], object]] = {
    "a prompt": lambda m: run(m, tokens(1, 30)),
    "a longer one": lambda m: run(m, tokens(1, 47)),
    "two rows": lambda m: run(m, tokens(2, 30)),
    "five rows": lambda m: run(m, tokens(5, 20)),
    "two rows, padded": lambda m: run(m, tokens(2, 30), attention_mask=padded(2, 30, 7)),
    "a second turn": lambda m: second_turn(m, 1),
    "a second turn of three": lambda m: second_turn(m, 3),
    "beams": lambda m: run(m, tokens(1, 30), num_beams=3),
    "a prompt in chunks": lambda m: run(m, tokens(1, 30), prefill_chunk_size=8),
    "prompt lookup": lambda m: run(m, tokens(1, 30), prompt_lookup_num_tokens=3),
    "embeddings": embedded,
    "called": called,
}


def test_twelve_kinds_of_calls_of_several_models_in_one_process_are_all_compressed() -> None:
    dense = []
    for name in NAMES:
        model = build(name)
        model.compile(backend=sc.spectral, options=EXACT)
        for kind, call in KINDS.items():
            cache = call(model)
            held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
            if not all(isinstance(x, SpectralTensor) for x in held):
                dense.append((name, kind))
    assert not dense
    assert all(graph.matched == graph.sites == 2 for graph in sc.reports())
    assert len(sc.reports()) <= 17 * len(NAMES) < config.accumulated_recompile_limit, "graphs"
    assert len(sc.reports()) > 8, "as many as Dynamo would have stopped at"
    assert report.decodes() == 0


def test_without_guards_on_the_model_each_kind_of_call_is_still_told_apart() -> None:
    """The filter that docs/troubleshooting.md names leaves guards on inputs and cache, or a second turn would be a first."""
    dense, model = build("llama"), build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
    kinds = tuple(KINDS) if FULL else ("a prompt", "two rows, padded", "a second turn", "a prompt in chunks", "called")
    for kind in (*kinds, "a longer one", "a second turn"):
        expected, cache = KINDS[kind](dense), KINDS[kind](model)
        for own, other in zip(cache.layers, expected.layers, strict=True):
            assert isinstance(own.keys, SpectralTensor), kind
            real = slice(7, None)  # of what is padding in one kind, nothing is kept
            for ours, theirs in ((own.keys.dense(), other.keys), (own.values.dense(), other.values)):
                assert torch.allclose(ours[:, :, real], theirs[:, :, real], atol=1e-4), kind
    assert all(graph.matched == graph.sites == 2 for graph in sc.reports())
    assert report.decodes() == 0


def test_presets_and_adapters_each_get_their_graphs() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, init_lora_weights=False), adapter_name="a0").eval()
    for i in range(1, 6):
        model.add_adapter(f"a{i}", peft.LoraConfig(r=4, init_lora_weights=False))
    model.eval()
    base, kinds = model.get_base_model(), []
    for i, preset in enumerate(("quality", "balanced", "compact", "seed", "exact", "balanced")):
        base.compile(backend=sc.spectral, options={**EXACT, "preset": preset})
        model.set_adapter(f"a{i}")
        kinds.append(type(run(base, tokens(1, 40)).layers[0].keys))
    assert kinds == [SpectralTensor] * 6


def test_threads_on_a_cold_model_leave_room_for_decode() -> None:
    """Each compiles a prefill and a decode step, more than Dynamo allows, and all of the prefills come first."""
    model = build("llama")
    model.compile(backend=sc.spectral, options={"inner": "eager", **WINDOWS})
    threads = [threading.Thread(target=run, args=(model, tokens(1, 30 + 7 * i))) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sc.reports()) > 8
    before = report.decodes()
    run(model, tokens(1, 40))
    assert report.decodes() == before


def meet_the_limit(model: PreTrainedModel) -> torch.Tensor:
    """What a batch gives for which no graph may be compiled any more; the first graphs are those of one row."""
    run(model, tokens(1, 30))
    return model.generate(tokens(2, 30), max_new_tokens=6, **GREEDY)


def test_a_call_past_the_limit_is_right_dense_and_told_of() -> None:
    expected = build("llama").generate(tokens(2, 30), max_new_tokens=6, **GREEDY)
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    with config.patch(accumulated_recompile_limit=2):
        with pytest.warns(SpectralWarning, match=r"compiled this function too often .*accumulated_recompile_limit = 2.*reset"):
            assert torch.equal(meet_the_limit(model), expected)
        assert [(g.kind, g.matched) for g in sc.reports()] == [("prefill", 2), ("decode", 2), ("other", 0)]
        assert "runs densely" in str(sc.reports()[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("error", SpectralWarning)
            run(model, tokens(2, 30))  # told once
            cache = run(model, tokens(1, 30))  # and what was compiled goes on
        assert isinstance(cache.layers[0].keys, SpectralTensor)


def test_a_call_past_the_limit_is_an_error_where_strict_whoever_met_it_first() -> None:
    """Dynamo by itself never asks again, and a prefill that runs densely leaves nothing that a strict decode could miss."""
    model, other = build("llama"), build("llama", seed=1)
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    other.compile(backend=sc.spectral, options=EXACT)
    with config.patch(accumulated_recompile_limit=2):
        with pytest.warns(SpectralWarning):
            meet_the_limit(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="strict: Dynamo has compiled this function too often"):
                run(other, tokens(3, 20))


def test_other_backends_keep_their_limit() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options=EXACT)
    run(model, tokens(1, 30))
    assert config.recompile_limit == 8
    asked = []
    step = torch.compile(lambda x, n: x * n, backend=lambda gm, inputs: asked.append(gm) or gm.forward, dynamic=False)
    for n in range(20):
        step(torch.ones(3 + n), 2.0)
    assert len(asked) == 8
