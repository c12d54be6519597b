"""The real model, end to end: SmolLM2-135M-Instruct through ``generate``."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.models import prompt as real_text
from tests.tiny import tokens

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True}
Real = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(autouse=True)
def fresh(smollm2: Real):
    """The model as it was loaded, but in float32: a CPU without instructions for bfloat16 takes four times as long in it."""
    sc.reset()
    counters.clear()
    smollm2[0].float()
    yield
    smollm2[0]._compiled_call_impl = None
    smollm2[0].bfloat16()


def generate(model: PreTrainedModel, ids: torch.Tensor, count: int):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **GREEDY)


def ids(smollm2: Real, count: int) -> torch.Tensor:
    return real_text(smollm2[1], count)[:, :count]


def assert_two_graphs() -> None:
    assert [(graph.kind, graph.sites, graph.matched) for graph in sc.reports()] == [("prefill", 30, 30), ("decode", 30, 30)]
    assert not any(graph.refusals or graph.notes for graph in sc.reports())
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert report.decodes() == 0


def test_inductor_generates_from_a_compressed_cache(smollm2: Real) -> None:
    model = smollm2[0]
    expected = generate(model, ids(smollm2, 700), 12).sequences
    model.compile(backend=sc.spectral, options={"preset": "exact", "strict": True, "warmup": 128})
    out = generate(model, ids(smollm2, 700), 12)
    assert_two_graphs()
    assert all(graph.seconds["inner"] > 0 for graph in sc.reports())
    assert torch.equal(out.sequences, expected)


@pytest.mark.slow
def test_two_graphs_from_64_to_500_new_tokens(smollm2: Real) -> None:
    model = smollm2[0]
    options = {"preset": "balanced", "strict": True, "inner": "eager", "warmup": 512}
    model.compile(backend=sc.spectral, options=options)
    prompt = ids(smollm2, 300)
    short = generate(model, prompt, 64).sequences
    long = generate(model, prompt, 500)
    assert torch.equal(long.sequences[:, : short.shape[1]], short)
    assert_two_graphs()
    stats = sc.memory_stats(long.past_key_values)
    assert stats.parts["codes"] > 0 and stats.ratio > 2


@pytest.mark.slow
def test_exact_equals_dense_over_512_new_tokens(smollm2: Real) -> None:
    model = smollm2[0]
    prompt = ids(smollm2, 600)
    model.compile(backend=sc.spectral, options={"preset": "exact", "strict": True, "inner": "eager", "warmup": 128})
    out = generate(model, prompt, 512).sequences
    assert_two_graphs()
    model._compiled_call_impl = None
    with torch.no_grad():  # each token is the one that the dense model would have chosen there
        chosen = model(out, use_cache=False).logits.argmax(-1)
    assert out.shape[1] == 1112 and torch.equal(out[:, 600:], chosen[:, 599:-1])


@pytest.mark.slow
def test_short_long_short_prompts_share_no_state(smollm2: Real) -> None:
    model = smollm2[0]
    model.compile(backend=sc.spectral, options={"preset": "balanced", "strict": True, "inner": "eager"})
    short, long = ids(smollm2, 40), ids(smollm2, 1400)
    first = generate(model, short, 20).sequences
    generate(model, long, 20)
    assert torch.equal(generate(model, short, 20).sequences, first)
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode", "prefill"]
    assert all(graph.matched == graph.sites == 30 for graph in sc.reports())


def test_a_needle_survives_compression(smollm2: Real) -> None:
    """The older system lost it as soon as one block was compressed."""
    model, tokenizer = smollm2
    words = tokenizer.decode(real_text(tokenizer, 2200)[0]).split(" ")
    key = "The pass key is 48213. Remember it. 48213 is the pass key."
    text = "\n".join((" ".join(words[:400]), key, " ".join(words[400:1100])))
    question = f"Here is a text with a pass key in it.\n{text}\nWhat is the pass key?"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    # whether it begins so is a matter of half a logit, and of the machine
    prompt = tokenizer(f"{chat}The pass key is ", return_tensors="pt").input_ids
    assert prompt.shape[1] > 1200
    dense = tokenizer.decode(generate(model, prompt, 16).sequences[0, prompt.shape[1] :])
    assert dense.startswith("48213")
    model.compile(backend=sc.spectral, options={"preset": "balanced", "strict": True, "inner": "eager"})
    out = generate(model, prompt, 16)
    assert tokenizer.decode(out.sequences[0, prompt.shape[1] :]).startswith("48213")
    assert out.past_key_values.layers[0].keys.store.timeline.ledger[0, 3] > 1000
    assert_two_graphs()


@pytest.mark.slow
def test_long_prompt_bytes_are_what_the_presets_promise() -> None:
    """4096 tokens in bfloat16 of a narrow model with SmolLM2's cache; windows, bases and spare capacity are counted."""
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 3, "vocab_size": 512}
    cached = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 4096}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **cached)).bfloat16().eval()
    least = {"seed": 2.0, "quality": 6.0, "balanced": 8.4, "compact": 14.0}
    for preset, ratio in least.items():
        model.compile(backend=sc.spectral, options={"preset": preset, "strict": True, "inner": "eager"})
        with torch.no_grad():
            cache = model(tokens(1, 4096), use_cache=True, logits_to_keep=1).past_key_values
        stats = sc.memory_stats(cache)
        assert stats.logical_bytes == 30 * 2 * 3 * 4096 * 64 * 2
        assert stats.ratio > ratio, preset
