"""The real model, end to end: SmolLM2-135M-Instruct through ``generate``."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.models import prompt as real_text
from tests.budget import FULL, examples
from tests.tiny import tokens

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True, "output_logits": True}
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


def assert_same_logits(ours: tuple[torch.Tensor, ...], others: Iterable[torch.Tensor]) -> None:
    """The first layers alone choose few different tokens."""
    torch.testing.assert_close(torch.stack(ours), torch.stack(tuple(others)), atol=5e-3, rtol=0)


def ids(smollm2: Real, count: int) -> torch.Tensor:
    return real_text(smollm2[1], count)[:, :count]


def assert_two_graphs(layers: int = 30) -> None:
    found = [(graph.kind, graph.sites, graph.matched) for graph in sc.reports()]
    assert found == [("prefill", layers, layers), ("decode", layers, layers)]
    assert not any(graph.refusals or graph.notes for graph in sc.reports())
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert report.decodes() == 0


@pytest.fixture
def shallow(smollm2: Real, monkeypatch: pytest.MonkeyPatch) -> int:
    """In CI only the first layers run, since compilers take a second for each of them; all give them the same code."""
    layers = examples(2, full=30)
    monkeypatch.setattr(smollm2[0].config, "num_hidden_layers", layers)
    return layers


def test_inductor_generates_from_a_compressed_cache(smollm2: Real, shallow: int) -> None:
    model = smollm2[0]
    expected = generate(model, ids(smollm2, 700), 12)
    model.compile(backend=sc.spectral, options={"preset": "exact", "strict": True, "warmup": 128})
    out = generate(model, ids(smollm2, 700), 12)
    assert_two_graphs(shallow)
    assert all(graph.seconds["inner"] > 0 for graph in sc.reports())
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_logits(out.logits, expected.logits)


# few new tokens fill several blocks, and the room that there is for them
BORDERS = {} if FULL else {"recent": 16, "block": 8, "warmup": 24, "headroom": 16}
EAGER = {"strict": True, "inner": "eager"}


def test_one_decode_graph_for_all_lengths_and_no_state_between_prompts(smollm2: Real, shallow: int) -> None:
    """The waiting for a basis ends while decoding; prompts of other lengths come between."""
    model, prompt = smollm2[0], ids(smollm2, examples(64, full=300))
    model.compile(backend=sc.spectral, options={"preset": "balanced", **EAGER, **BORDERS, "warmup": examples(64, full=512)})
    short = generate(model, prompt, 12)
    long = generate(model, prompt, examples(48, full=500))
    assert_same_logits(long.logits[:12], short.logits)
    assert_two_graphs(shallow)
    held = long.past_key_values.layers[0].keys.store.timeline.ledger[0]
    assert sc.memory_stats(long.past_key_values).parts["codes"] > 0 and held[3] > 0
    generate(model, ids(smollm2, examples(300, full=1400)), 12)
    assert_same_logits(generate(model, prompt, 12).logits, short.logits)
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode", "prefill"]
    assert all(graph.matched == graph.sites == shallow for graph in sc.reports())


def test_exact_equals_dense_over_every_border(smollm2: Real, shallow: int) -> None:
    model, count, new = smollm2[0], examples(64, full=600), examples(40, full=512)
    model.compile(backend=sc.spectral, options={"preset": "exact", **EAGER, "warmup": 128, **BORDERS})
    out = generate(model, ids(smollm2, count), new)
    assert_two_graphs(shallow)
    model._compiled_call_impl = None
    with torch.no_grad():
        dense = model(out.sequences, use_cache=False).logits[:, count - 1 : -1]
    assert out.sequences.shape[1] == count + new
    assert torch.equal(out.sequences[:, count:], dense.argmax(-1))  # what the dense model would have chosen there
    assert_same_logits(out.logits, dense.unbind(1))


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
    assert sc.memory_stats(out.past_key_values).ratio > 2
    assert_two_graphs()
    assert sc.reports()[0].profiled, "by the profile that comes with the package, though nobody asked for one"


@pytest.mark.slow
def test_long_prompt_bytes_are_what_the_presets_promise() -> None:
    """4096 tokens in bfloat16 of a narrow model with SmolLM2's cache; windows, bases and spare capacity are counted."""
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 3, "vocab_size": 512}
    cached = {"num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 4096}
    config = LlamaConfig(**sizes, **cached, num_hidden_layers=examples(2, full=30))
    model = LlamaForCausalLM(config).bfloat16().eval()
    least = {"seed": 2.0, "quality": 6.0, "balanced": 8.4, "compact": 14.0}
    for preset, ratio in least.items():
        model.compile(backend=sc.spectral, options={"preset": preset, "strict": True, "inner": "eager"})
        with torch.no_grad():
            cache = model(tokens(1, 4096), use_cache=True, logits_to_keep=1).past_key_values
        stats = sc.memory_stats(cache)
        first, *others = stats.layers  # the first one counts what all of them share
        assert len(set(others)) == 1 and first + sum(others) == stats.stored_bytes
        assert stats.logical_bytes == len(stats.layers) * 2 * 3 * 4096 * 64 * 2
        assert 30 * 2 * 3 * 4096 * 64 * 2 / (first + 29 * others[0]) > ratio, preset
