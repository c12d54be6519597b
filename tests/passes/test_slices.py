"""What is wide between two narrow hidden states runs on slices of a long prompt, and what is not stays as it came."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_compile as sc
from spectral_compile import backend
from spectral_compile.kernels import sliced as operation
from spectral_compile.kernels.sliced import PARTS, CompiledPart, sliced
from spectral_compile.passes import slices
from tests.budget import FULL, examples
from tests.passes.harness import Attention, counts, hidden, run_passes
from tests.tiny import GREEDY, GROUPED, SMALL, tokens

ROWS = 16
WIDE = {**GROUPED, "intermediate_size": 256}


def adapted() -> hf.PreTrainedModel:
    """A model with LoRA beside its MLP: what is wide is read by two products."""
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)), config).base_model.model


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gated": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)),
    "gate and up in one": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**WIDE)),
    "with biases": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**WIDE)),
    "beside attention": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**SMALL, "intermediate_size": 256}, rotary_pct=0.25)),
    "norms after it": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**WIDE)),
    "norms with one more than the weight": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**WIDE, head_dim=16)),
    "scaled": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**WIDE, residual_multiplier=0.5)),
    "with LoRA": adapted,
}
LEFT: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "not wide": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "experts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2)),
}


class Seen:
    """How many tokens each part was given at each of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, list[int]] = {}
        self.parts: list[slices.Part] = []
        for module in (operation, slices):
            monkeypatch.setattr(module, "ROWS", ROWS)
        compiled: dict[str, Any] = {}
        monkeypatch.setattr(operation, "PARTS", compiled)
        monkeypatch.setattr(backend, "PARTS", compiled)
        compile_part = backend.compile_part

        def watched(part: slices.Part, config: sc.SpectralConfig) -> Callable[..., Any]:
            run, counts = compile_part(part, config), self.counts.setdefault(part.name(config), [])
            self.parts.append(part)

            def call(given: torch.Tensor, *weights: torch.Tensor) -> Any:
                counts.append(given.shape[1])
                return run(given, *weights)

            return call

        monkeypatch.setattr(backend, "compile_part", watched)
        sc.reset()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def build(make: Callable[[], hf.PreTrainedModel]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


def generate(model: hf.PreTrainedModel, prompt: torch.Tensor, inner: str = "eager", **more: Any) -> torch.Tensor:
    model.compile(backend=sc.spectral, options={"preset": "exact", "strict": True, "inner": inner})
    return model.generate(prompt, max_new_tokens=4, **GREEDY, **more)


@pytest.mark.parametrize("name", MODELS)
def test_an_mlp_runs_on_slices_of_a_prompt_and_all_layers_share_one_part(name: str, seen: Seen) -> None:
    model, prompt = build(MODELS[name]), tokens(2, 50)
    want = model.generate(prompt, max_new_tokens=4, **GREEDY)
    assert torch.equal(generate(model, prompt), want)
    (counts,) = seen.counts.values()
    assert counts == [15, 15, 14, 14, 14, 14, 14] * 2  # of each layer once, and none of decode
    if name != "beside attention":
        assert_it_adds_what_it_is_given(*seen.parts)


def test_values_of_a_part_are_found_where_sizes_may_be_symbols(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 takes a product apart in C++ else, which wants numbers: no prompt of more than 2048 tokens ran with it."""
    found, run_node = set(), slices._Valued.run_node

    def watched(self: Any, node: torch.fx.Node) -> Any:
        found.add(torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher))
        return run_node(self, node)

    monkeypatch.setattr(slices._Valued, "run_node", watched)
    generate(build(MODELS["gated"]), tokens(1, 50))
    assert found == {True}


def assert_it_adds_what_it_is_given(part: slices.Part) -> None:
    """So the norm before the MLP is in it too, and hidden states are not alive beside what is added to them."""
    given, *_, output = part.gm.graph.nodes
    (last,) = output.all_input_nodes
    assert given in last.all_input_nodes


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_wide_or_not_of_each_token_alone_is_left_as_it_came(name: str, seen: Seen) -> None:
    model, prompt = build(LEFT[name]), tokens(1, 50)
    want = model.generate(prompt, max_new_tokens=4, **GREEDY)
    assert torch.equal(generate(model, prompt), want)
    assert not seen.counts


def test_short_prompts_autocast_and_values_read_elsewhere_are_left_as_they_came(seen: Seen) -> None:
    model = build(MODELS["gated"])
    generate(model, tokens(1, ROWS))
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, tokens(1, 50))
    kept = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, given, out: kept.append(out.mean()))
    assert not seen.counts
    sc.reset()
    generate(model, tokens(1, 50))
    (counts,) = seen.counts.values()
    assert len(counts) == 4, "the second layer alone"
    assert len(kept) == 4


def test_any_length_runs_with_what_was_compiled_for_one(seen: Seen) -> None:
    model = build(MODELS["gated"])
    for count in (40, 17, 65):
        prompt = tokens(1, count)
        want = build(MODELS["gated"]).generate(prompt, max_new_tokens=4, **GREEDY)
        assert torch.equal(generate(model, prompt), want)
    (counts,) = seen.counts.values()
    assert counts == [14, 13, 13] * 2 + [17] * 2 + [13] * 10


def test_a_chunk_over_a_compressed_past_is_sliced_too(seen: Seen) -> None:
    model, prompt = build(MODELS["gated"]), tokens(1, 80)
    want = model.generate(prompt, max_new_tokens=4, **GREEDY)
    assert torch.equal(generate(model, prompt, prefill_chunk_size=40), want)
    (counts,) = seen.counts.values()
    assert counts == [14, 13, 13] * 4


@pytest.mark.parametrize("transposed", [False, True] if FULL else [True])
def test_inductor_compiles_a_part_for_any_number_of_tokens(transposed: bool, seen: Seen) -> None:
    """Weights that lie transposed in memory, as one of three does here, are read as they lie."""
    model = build(MODELS["gated"])
    if transposed:
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            weight.data = weight.data.T.contiguous().T
    prompts = [tokens(1, count) for count in (50, 33)]
    wants = [model.generate(prompt, max_new_tokens=4, **GREEDY) for prompt in prompts]
    for prompt, want in zip(prompts, wants, strict=True):
        assert torch.equal(generate(model, prompt, "inductor"), want)
    (counts,) = seen.counts.values()
    assert counts == [13, 13, 12, 12] * 2 + [11, 11, 11] * 2


@settings(max_examples=examples(15, full=30), deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_slices_give_what_the_whole_gives(batch: int, count: int, transposed: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 9, (batch, count, 8), generator=draw).float()  # sums are exact in any order
    if transposed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight = torch.randint(-9, 9, (5, 8), generator=draw).float()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(operation, "ROWS", ROWS)
        part = CompiledPart(lambda x, weight: (torch.nn.functional.linear(x, weight).double(),))
        monkeypatch.setitem(PARTS, "a test's", part)
        out = sliced(x, [weight], "a test's", 5, torch.float64)
    assert torch.equal(out, torch.nn.functional.linear(x, weight).double())
    assert out.is_contiguous()


def test_parts_die_with_the_graphs_that_they_were_cut_from() -> None:
    """They used to survive a reset, and to grow by every model that was ever loaded."""
    sc.reset()
    gc.collect()
    before = set(PARTS)
    for width in (256, 320):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "intermediate_size": width})).eval()
        generate(model, tokens(1, 2100))
    assert len(set(PARTS) - before) == 2
    del model
    sc.reset()
    gc.collect()
    assert set(PARTS) == before


@pytest.mark.parametrize(("cached", "count", "pieces"), [(0, ROWS + 1, 1), (0, ROWS, 0), (40, ROWS + 1, 1), (40, 1, 0)])
def test_one_call_takes_the_place_of_what_is_wide(
    cached: int, count: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "ROWS", ROWS)
    trace = run_passes(Attention(mlp=256), slices.slice_wide, cached=cached, **hidden(1, cached + count))
    assert counts(trace)["sliced.default"] == len(trace.parts) == pieces
    for node in trace.gm.graph.nodes:
        if node.target is sliced:
            assert node.args[2] in trace.parts
    for part in trace.parts.values():
        part.examples()
        assert all("example_value" in node.meta for node in part.gm.graph.nodes)  # else AOTAutograd's cache is bypassed
