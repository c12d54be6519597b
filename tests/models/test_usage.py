"""What people do with ``generate`` and with its cache: compressed in each graph, and the same as dense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

import spectral_compile as sc
from spectral_compile import report
from tests.budget import FULL, combinations
from tests.tiny import EXACT, GREEDY, OLDEST, build, tokens

PROMPT = tokens(2, 40)
MASK = torch.ones_like(PROMPT)
MASK[0, :7] = 0
PADDED = {"inputs": PROMPT, "attention_mask": MASK, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 10, "eos_token_id": None}
SEARCHED = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def assert_compressed(*kinds: str) -> None:
    assert {graph.kind for graph in sc.reports()} == set(kinds), sc.reports()
    assert all(graph.matched == graph.sites == 2 for graph in sc.reports()), sc.reports()
    assert report.decodes() == 0


def both(run: Callable[[PreTrainedModel], Any]) -> tuple[Any, Any]:
    """What ``run`` gives with the compressed cache and with the dense one, from the same seed."""
    given = []
    for compress in (True, False):
        model = build("llama")
        if compress:
            model.compile(backend=sc.spectral, options=EXACT)
        torch.manual_seed(0)
        given.append(run(model))
    return given[0], given[1]


def growing(model: PreTrainedModel, prompt: torch.Tensor, **options: Any) -> Any:
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, return_dict_in_generate=True, **GREEDY, **options
    )


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten())

    def end(self) -> None:
        pass


WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sampling": ({**PADDED, **SAMPLED}, ("prefill", "decode")),
    "several texts from one prompt": ({**PADDED, **SAMPLED, "num_return_sequences": 2}, ("prefill", "decode")),
    "beams": ({**PADDED, **SEARCHED, "num_beams": 3}, ("prefill", "decode")),
    "beams that are sampled": ({**PADDED, **SAMPLED, "num_beams": 3}, ("prefill", "decode")),
    "a prompt in chunks": ({**PADDED, **SEARCHED, "prefill_chunk_size": 16}, ("prefill", "extend", "decode")),
    "rows that end early": ({**PADDED, **SAMPLED, "eos_token_id": list(range(1, 256, 9))}, ("prefill", "decode")),
    "prompt lookup": (
        {"inputs": PROMPT[:1], "pad_token_id": 0, **SEARCHED, "prompt_lookup_num_tokens": 3},
        ("prefill", "extend", "decode"),
    ),
    "no more than one new token": ({**PADDED, **SEARCHED, "max_new_tokens": 1}, ("prefill",)),
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_equal_dense(way: str) -> None:
    options, kinds = WAYS[way]
    ours, dense = both(lambda model: model.generate(**{"max_new_tokens": 24, **options}))
    assert torch.equal(ours, dense)
    assert_compressed(*kinds)


def test_assisted_decoding_crops_what_the_assistant_got_wrong() -> None:
    assistant = build("llama", seed=1)
    ours, dense = both(
        lambda model: model.generate(PROMPT[:1], assistant_model=assistant, max_new_tokens=24, pad_token_id=0, **SEARCHED)
    )
    assert torch.equal(ours, dense)
    assert_compressed("prefill", "extend", "decode")


def test_an_assistant_may_be_compressed_itself() -> None:
    def run(model: PreTrainedModel) -> torch.Tensor:
        assistant = build("llama", seed=1)
        assistant.compile(backend=sc.spectral, options=EXACT)
        return model.generate(PROMPT[:1], assistant_model=assistant, max_new_tokens=24, pad_token_id=0, **SEARCHED)

    ours, dense = both(run)
    assert torch.equal(ours, dense)
    assert report.decodes() == 0


def test_a_chat_of_several_turns_grows_one_cache() -> None:
    def chat(model: PreTrainedModel) -> torch.Tensor:
        out = growing(model, PROMPT[:1])
        for turn in range(3):
            said = torch.cat([out.sequences, tokens(1, 9, seed=turn)], 1)
            out = growing(model, said, past_key_values=out.past_key_values)
        return out.sequences

    ours, dense = both(chat)
    assert torch.equal(ours, dense)
    assert_compressed("prefill", "decode", "extend")


@pytest.mark.parametrize(("headroom", "copied"), [(None, False), (24, False), (3, True)][0 if FULL else 1 :])
def test_buffers_are_not_replaced_while_there_is_headroom(headroom: int | None, copied: bool) -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "headroom": headroom})
    cache = growing(model, PROMPT[:1]).past_key_values
    codes = cache.layers[0].keys.store.buffers.k_codes
    growing(model, torch.cat([PROMPT[:1], tokens(1, 11)], 1), past_key_values=cache)
    assert (cache.layers[0].keys.store.buffers.k_codes is not codes) == copied


def test_a_prompt_in_chunks_leaves_no_more_room_than_one_in_a_piece() -> None:
    room = []
    for chunk in (None, 40):
        sc.reset()
        model = build("llama")
        model.compile(backend=sc.spectral, options={**EXACT, "headroom": 24})
        cache = growing(model, tokens(1, 400), prefill_chunk_size=chunk).past_key_values
        timeline = cache.layers[0].keys.store.timeline
        room.append(timeline.capacity.coded - int(timeline.ledger[0, 3]))
    assert room[1] <= room[0] + timeline.layout.block


def test_logits_and_hidden_states_are_there_and_right() -> None:
    def run(model: PreTrainedModel) -> Any:
        more = {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True}
        return model.generate(**PADDED, **SEARCHED, max_new_tokens=8, **more)

    ours, dense = both(run)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(dense.logits), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(ours.hidden_states, dense.hidden_states, strict=True):
        torch.testing.assert_close(mine[-1][1], theirs[-1][1], atol=1e-5, rtol=1e-5)
    assert {graph.kind for graph in sc.reports()} >= {"prefill", "decode"} and report.decodes() == 0


def test_a_streamer_hears_every_token() -> None:
    def run(model: PreTrainedModel) -> torch.Tensor:
        listener = Listener()
        model.generate(PROMPT[:1], max_new_tokens=12, streamer=listener, **GREEDY)
        return torch.cat(listener.heard)

    ours, dense = both(run)
    assert torch.equal(ours, dense) and len(ours) == 52
    assert_compressed("prefill", "decode")


def test_a_prompt_of_embeddings_is_compressed() -> None:
    def run(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            given = model.get_input_embeddings()(PROMPT)
        return model.generate(inputs_embeds=given, attention_mask=MASK, max_new_tokens=12, **GREEDY)

    ours, dense = both(run)
    assert torch.equal(ours, dense)
    assert_compressed("prefill", "decode")


@torch.no_grad()
def next_tokens(model: PreTrainedModel, cache: Any, rows: int, seed: int, count: int = 1) -> torch.Tensor:
    return model(tokens(rows, count, seed=seed), past_key_values=cache, use_cache=True).logits


CHANGES: dict[str, tuple[Callable[[Any], None], int]] = {
    "cropped": (lambda cache: cache.crop(-15), 2),
    "repeated": (lambda cache: cache.batch_repeat_interleave(3), 6),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
}


@pytest.mark.parametrize(("change", "count"), combinations(list(CHANGES), [6, 1]))
def test_a_cache_goes_on_after_it_was_changed(change: str, count: int) -> None:
    """To Dynamo a view is what it was taken of: a changed cache must be none."""
    do, rows = CHANGES[change]

    def run(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).past_key_values
        do(cache)
        return torch.cat([next_tokens(model, cache, rows, seed, count) for seed in (3, 4)], 1)

    ours, dense = both(run)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    assert_compressed("prefill", "extend" if count > 1 else "decode")


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "preset": "balanced"})
    together = model.generate(**PADDED, **SEARCHED, max_new_tokens=20)
    alone = model.generate(PROMPT[:1], attention_mask=MASK[:1], max_new_tokens=20, **GREEDY)
    assert torch.equal(together[:1], alone)


def test_a_copied_system_prompt_shares_nothing_with_its_copies() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "preset": "balanced"})
    with torch.no_grad():
        cache = model(PROMPT[:1], use_cache=True).past_key_values
    one, other = copy.deepcopy(cache), copy.deepcopy(cache)
    growing(model, torch.cat([PROMPT[:1], tokens(1, 9, seed=1)], 1), past_key_values=one)
    held = [set(map(torch.Tensor.data_ptr, layer.keys.store.buffers)) for c in (cache, one, other) for layer in c.layers]
    pointers = [pointer for layer in held for pointer in layer if pointer]
    assert len(pointers) == len(set(pointers))
    assert (cache.get_seq_length(), other.get_seq_length()) == (40, 40)


@torch.no_grad()
def test_autocast_computes_in_its_dtype() -> None:
    """Keys leave RoPE in single there and values in half: attention and the cache are in half."""

    def run(model: PreTrainedModel) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(PROMPT, attention_mask=MASK, use_cache=True)
            mask = torch.cat([MASK, MASK[:, -1:]], 1)
            return model(tokens(2, 1), attention_mask=mask, past_key_values=out.past_key_values, use_cache=True).logits

    ours, dense = both(run)
    assert (ours - dense).norm() < 0.02 * dense.norm()
    assert_compressed("prefill", "decode")


def compile_forward(model: PreTrainedModel, **how: Any) -> None:
    model.forward = torch.compile(model.forward, backend=sc.spectral, options=EXACT, **how)


COMPILED: dict[str, Callable[[PreTrainedModel], None]] = {
    "compile": lambda model: model.compile(backend=sc.spectral, options=EXACT),
    "by name": lambda model: model.compile(backend="spectral", options=EXACT),
    "forward": compile_forward,
    "fullgraph": lambda model: model.compile(backend=sc.spectral, options=EXACT, fullgraph=True),
    "dynamic": lambda model: model.compile(backend=sc.spectral, options=EXACT, dynamic=True),
    "static": lambda model: model.compile(backend=sc.spectral, options=EXACT, dynamic=False),
}

if OLDEST:
    del COMPILED["static"]  # there decode is not dynamic, as docs/models.md says


@pytest.mark.parametrize(("way", "context"), combinations(list(COMPILED), [torch.no_grad, torch.inference_mode]))
def test_every_way_to_compile(way: str, context: Callable[[], Any]) -> None:
    model, prompt = build("llama"), PROMPT[:1]
    expected = model.generate(prompt, max_new_tokens=12, **GREEDY)
    COMPILED[way](model)
    with context():
        assert torch.equal(model.generate(prompt, max_new_tokens=12, **GREEDY), expected)
    assert_compressed("prefill", "decode")


@torch.no_grad()
def test_the_compiled_module_itself_may_be_called() -> None:
    model = build("llama")
    compiled = torch.compile(model, backend=sc.spectral, options=EXACT)
    cache = compiled(PROMPT, use_cache=True).past_key_values
    ours = compiled(tokens(2, 1), past_key_values=cache, use_cache=True).logits
    whole = model(torch.cat([PROMPT, tokens(2, 1)], 1)).logits[:, -1:]
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    assert_compressed("prefill", "decode")


def test_a_static_cache_that_generate_compiles_is_refused_with_a_reason() -> None:
    model = build("llama")
    expected = model.generate(PROMPT[:1], max_new_tokens=12, **GREEDY)
    how = CompileConfig(backend="spectral", mode=None, fullgraph=False)
    how._compile_all_devices = True
    with pytest.warns(report.SpectralWarning, match="the cache is static"):
        got = model.generate(PROMPT[:1], max_new_tokens=12, cache_implementation="static", compile_config=how, **GREEDY)
    assert torch.equal(got, expected)


STATIC = {"cache_implementation": "static", "max_new_tokens": 40, "pad_token_id": 0}


@pytest.mark.parametrize("how", [SEARCHED, SAMPLED, {**SEARCHED, "num_beams": 3}], ids=["greedy", "sampled", "beams"])
def test_a_static_cache_that_a_graph_allocates_is_compressed(how: dict[str, Any]) -> None:
    ours, dense = both(lambda model: model.generate(PROMPT, attention_mask=MASK, **STATIC, **how))
    assert torch.equal(ours, dense)
    assert_compressed("prefill", "decode")


def test_a_static_cache_holds_what_a_growing_one_holds() -> None:
    """Also in a second turn, and copied; what a cache has room for and does not hold is not stored."""
    held = []
    for empty in (lambda model: StaticCache(model.config, max_cache_len=400), lambda model: DynamicCache(config=model.config)):
        sc.reset()
        model = build("llama")
        model.compile(backend=sc.spectral, options={**EXACT, "preset": "balanced"})
        made, cache = [], empty(model)
        for prompt in (PROMPT, tokens(2, 9, seed=1), tokens(2, 1, seed=2), tokens(2, 1, seed=3)):
            with torch.no_grad():
                out = model(prompt, past_key_values=cache, use_cache=True)
            cache = copy.deepcopy(out.past_key_values)
            made.append(out.logits[:, -1])
        assert_compressed("prefill", "extend", "decode")
        held.append((torch.stack(made), sc.memory_stats(cache).stored_bytes, cache.layers[0].keys))
    (ours, bytes_held, static), (growing, bytes_grown, grown) = held
    torch.testing.assert_close(ours, growing, atol=1e-5, rtol=1e-5)
    assert bytes_held == bytes_grown + 2 * 8, "each layer counts its columns in a tensor"
    assert (static.shape[2], static.length) == (400, grown.shape[2]) == (400, 51)
    torch.testing.assert_close(static.store.dense("key", 51), grown.store.dense("key", 51))


def test_a_static_cache_with_a_mask_of_numbers_stays_dense_with_a_reason() -> None:
    expected = build("llama-eager").generate(PROMPT, attention_mask=MASK, **STATIC, **SEARCHED)
    model = build("llama-eager")
    model.compile(backend=sc.spectral, options=EXACT)
    with pytest.warns(report.SpectralWarning, match="its mask adds numbers to the scores"):
        assert torch.equal(model.generate(PROMPT, attention_mask=MASK, **STATIC, **SEARCHED), expected)
    assert report.decodes() == 0


def test_a_static_cache_is_not_decoded_for_a_graph_that_would_write_to_it() -> None:
    """What it writes would be lost with the decoded tensor."""
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    with torch.no_grad():
        cache = model(PROMPT, past_key_values=StaticCache(model.config, max_cache_len=60), use_cache=True).past_key_values
    with (
        pytest.warns(report.SpectralWarning, match="gradients"),
        pytest.raises(RuntimeError, match="would write to a compressed static cache: use the default DynamicCache"),
    ):
        model(tokens(2, 1), past_key_values=cache, use_cache=True)


def test_a_static_cache_is_written_to_behind_its_last_token_alone() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options=EXACT)
    cache = model.generate(PROMPT, return_dict_in_generate=True, **STATIC, **SEARCHED).past_key_values
    key = cache.layers[0].keys
    with pytest.raises(RuntimeError, match="only written to behind its last token"):
        key.index_copy_(2, torch.tensor([3]), torch.zeros(2, 2, 1, 16))
    with pytest.raises(RuntimeError, match="would write to a compressed cache"):
        cache.reset()
