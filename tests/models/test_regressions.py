"""One test for each way in which the older system of this idea failed, and for every bug seen since."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.passes import masks
from spectral_compile.tensor import SpectralTensor
from tests.budget import FULL
from tests.tiny import EXACT, GREEDY, GROUPED, WINDOWS, build, tokens


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def compiled(preset: str = "exact", **options: object):
    model = build("llama")
    model.compile(backend=sc.spectral, options={"preset": preset, "strict": True, "inner": "eager", **WINDOWS, **options})
    return model


def generated(model, prompt: torch.Tensor, count: int = 30, **options: object):
    return model.generate(prompt, max_new_tokens=count, return_dict_in_generate=True, **GREEDY, **options)


def test_positions_do_not_run_on_across_generations() -> None:
    model, prompt = compiled(), tokens(1, 30)
    first, second = generated(model, prompt), generated(model, prompt)
    assert torch.equal(first.sequences, second.sequences)
    timeline = second.past_key_values.layers[0].keys.store.timeline
    assert timeline.positions[0, :59].tolist() == list(range(59))


def test_no_key_is_rotated_to_a_negative_position() -> None:
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :29] = 0
    cache = generated(compiled(), tokens(2, 30), attention_mask=mask).past_key_values
    timeline = cache.layers[0].keys.store.timeline
    for row, count in enumerate(timeline.ledger[:, 2].tolist()):
        assert timeline.positions[row, :count].tolist() == list(range(count))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 11] if FULL else [1, 3, 11])
def test_a_prompt_shorter_than_every_window_rotates_its_keys(length: int) -> None:
    prompt = tokens(1, length)
    expected = generated(build("llama"), prompt, output_logits=True)
    out = generated(compiled(first_exact=4, recent=64, block=32, warmup=1024), prompt, output_logits=True)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)
    assert out.past_key_values.layers[0].keys.store.timeline.ledger[0, 3] == 0


def test_decode_reads_and_leaves_the_compressed_cache() -> None:
    cache = generated(compiled(), tokens(1, 60)).past_key_values
    kinds = {graph.kind: (graph.sites, graph.matched) for graph in sc.reports()}
    assert kinds == {"prefill": (2, 2), "decode": (2, 2)}
    assert all(isinstance(x, SpectralTensor) for layer in cache.layers for x in (layer.keys, layer.values))
    assert report.decodes() == 0


def test_decode_sees_what_the_codes_say() -> None:
    model, prompt = compiled(), tokens(1, 60)
    with torch.no_grad():
        before = model(prompt, use_cache=True).past_key_values
        step = torch.tensor([[7]])
        clean = model(step, past_key_values=before, position_ids=torch.tensor([[60]])).logits
        again = model(prompt, use_cache=True).past_key_values
        for layer in again.layers:
            layer.keys.store.buffers.v_codes.zero_()
        poisoned = model(step, past_key_values=again, position_ids=torch.tensor([[60]])).logits
    assert not torch.allclose(clean, poisoned, atol=1e-3)


def test_the_recent_window_and_the_sinks_are_used_and_exact() -> None:
    prompt = tokens(1, 120)
    with torch.no_grad():
        expected = build("llama")(prompt, use_cache=True).past_key_values.layers[1]
        layer = compiled("compact", recent_bits=16)(prompt, use_cache=True).past_key_values.layers[1]
    for held, dense in ((layer.keys.dense(), expected.keys), (layer.values.dense(), expected.values)):
        exact = torch.cat((held[:, :, :2], held[:, :, -8:]), 2)
        torch.testing.assert_close(exact, torch.cat((dense[:, :, :2], dense[:, :, -8:]), 2), atol=1e-5, rtol=1e-5)
        coded = slice(2, 120 - 8 - 4)
        assert not torch.allclose(held[:, :, coded], dense[:, :, coded], atol=1e-3)


def test_codes_are_packed_integers_that_are_really_held() -> None:
    cache = generated(compiled("balanced"), tokens(1, 200)).past_key_values
    for layer in cache.layers:
        store = layer.keys.store
        layout, buffers = store.layout, store.buffers
        assert buffers.k_codes.dtype == buffers.v_codes.dtype == torch.uint8
        assert buffers.k_codes.shape[-1] == layout.key.row_bytes < layout.k.width * 3 // 10
        assert buffers.v_codes.shape[-1] == layout.value.row_bytes < layout.v.width * 3 // 10
        floats = [b for b in buffers if b.is_floating_point() and b.shape[-2] >= 200]
        assert floats == []


def test_a_graph_with_a_dynamic_batch_still_sees_its_padding() -> None:
    """The mask then depends on the embeddings, though only on their shape."""
    model, dense = compiled(), build("llama")
    generated(model, tokens(1, 40))
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :7], mask[2, :25] = 0, 0
    expected = generated(dense, tokens(3, 40), attention_mask=mask).sequences
    assert torch.equal(generated(model, tokens(3, 40), attention_mask=mask).sequences, expected)


def test_a_padded_cache_refuses_to_go_on_without_its_mask() -> None:
    model = compiled()
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :9] = 0
    with torch.no_grad():
        cache = model(tokens(2, 30), attention_mask=mask, use_cache=True).past_key_values
        generated(model, tokens(2, 30))
        with pytest.raises(RuntimeError, match="pass the mask of all tokens"):
            model(tokens(2, 1), past_key_values=cache)


def test_two_continuations_of_one_cache_never_see_each_other() -> None:
    model, dense = compiled(), build("llama")
    prompt = tokens(1, 40)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        old = [(layer.keys, layer.values) for layer in cache.layers]
        branches = []
        for first in (5, 6, 7):
            for layer, (k, v) in zip(cache.layers, old, strict=True):
                layer.keys, layer.values = k, v
            for i, token in enumerate((first, 9, 11)):
                model(torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[40 + i]]))
            branches.append((first, [(layer.keys, layer.values) for layer in cache.layers]))
        for first, held in branches:
            for layer, (k, v) in zip(cache.layers, held, strict=True):
                layer.keys, layer.values = k, v
            out = model(torch.tensor([[13]]), past_key_values=cache, position_ids=torch.tensor([[43]])).logits
            whole = torch.cat((prompt, torch.tensor([[first, 9, 11, 13]])), 1)
            torch.testing.assert_close(out[:, -1], dense(whole).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert len({id(key.store.timeline) for _, held in branches for key, _ in held}) == 3


def test_a_reordered_cache_is_decoded_by_the_same_graph() -> None:
    """The mark that makes the length dynamic used to be lost with the first beam reorder."""
    compiled().generate(tokens(2, 30), num_beams=3, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode"]


def test_a_mask_that_shows_what_was_padding_is_refused() -> None:
    model = compiled()
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = model(tokens(2, 30), attention_mask=mask, use_cache=True).past_key_values
        longer = torch.ones(2, 40, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="attention_mask shows tokens that earlier calls on this cache masked"):
            model(tokens(2, 10), attention_mask=longer, past_key_values=cache, position_ids=torch.arange(30, 40)[None])


def test_padding_that_comes_with_a_second_turn_is_remembered() -> None:
    model = compiled()
    with torch.no_grad():
        cache = model(tokens(1, 30), use_cache=True).past_key_values
        mask = torch.ones(1, 40, dtype=torch.int64)
        mask[0, 33] = 0
        model(tokens(1, 10), attention_mask=mask, past_key_values=cache, position_ids=torch.arange(30, 40)[None])
        with pytest.raises(RuntimeError, match="pass the mask of all tokens"):
            model(tokens(1, 1), past_key_values=cache)


def test_padding_of_a_stacked_cache_is_remembered() -> None:
    model, mask = compiled(), torch.ones(1, 30, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        plain = model(tokens(1, 30), attention_mask=torch.ones_like(mask), use_cache=True).past_key_values
        padded = model(tokens(1, 30), attention_mask=mask, use_cache=True).past_key_values
        for a, b in zip(plain.layers, padded.layers, strict=True):
            a.keys, a.values = torch.cat((a.keys, b.keys)), torch.cat((a.values, b.values))
        with pytest.raises(RuntimeError, match="pass the mask of all tokens"):
            model(tokens(2, 1), past_key_values=plain)


def test_rows_selected_with_a_new_index_for_keys_and_for_values_stay_one_cache() -> None:
    model, dense = compiled(), build("llama")
    prompt, step = tokens(3, 30), tokens(2, 1, seed=1)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[2, 0]], layer.values[[2, 0]]
        out = model(step, past_key_values=cache, position_ids=torch.full((2, 1), 30)).logits[:, -1]
        torch.testing.assert_close(out, dense(torch.cat((prompt[[2, 0]], step), 1)).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_a_copy_of_one_layer_does_not_tie_later_copies_together() -> None:
    model, dense, prompt = compiled(), build("llama"), tokens(1, 30)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        stray = cache.layers[0].keys.clone(), cache.layers[0].values.clone()
        copies = [[(layer.keys.clone(), layer.values.clone()) for layer in cache.layers] for _ in range(2)]
        for token, held in zip((5, 6), copies, strict=True):
            for layer, (k, v) in zip(cache.layers, held, strict=True):
                layer.keys, layer.values = k, v
            out = model(torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[30]])).logits[:, -1]
            whole = torch.cat((prompt, torch.tensor([[token]])), 1)
            torch.testing.assert_close(out, dense(whole).logits[:, -1], atol=1e-5, rtol=1e-5)
    assert stray[0].shape[2] == 30 and stray[0].store.timeline.length == 30


def test_decode_keeps_one_timeline_for_all_layers_and_steps() -> None:
    model = compiled()
    with torch.no_grad():
        cache = model(tokens(1, 30), use_cache=True).past_key_values
        timeline = cache.layers[0].keys.store.timeline
        for at in range(30, 50):
            model(torch.tensor([[at]]), past_key_values=cache, position_ids=torch.tensor([[at]]))
        assert {id(x.store.timeline) for layer in cache.layers for x in (layer.keys, layer.values)} == {id(timeline)}


@pytest.mark.parametrize("window", [None, 50, 290])
def test_a_mask_too_large_to_be_computed_is_still_known(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Past 16384 tokens the mask of a prompt could not be probed, and decode then refused the cache."""
    monkeypatch.setattr(masks, "_CELLS", 1 << 15)
    monkeypatch.setattr(masks, "_FEWEST", 257)
    torch.manual_seed(0)
    config = hf.MistralConfig(**GROUPED, sliding_window=window) if window else hf.LlamaConfig(**GROUPED)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    prompt = tokens(2, 600)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = model(prompt, attention_mask=mask).logits
        sc.reset()
        model.compile(backend=sc.spectral, options={"preset": "exact", "inner": "eager", **WINDOWS})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", report.SpectralWarning)
            out = model(prompt, attention_mask=mask, use_cache=True)
        torch.testing.assert_close(out.logits[1], expected[1], atol=1e-4, rtol=1e-4)
        if window is None:
            assert [(graph.kind, graph.matched) for graph in sc.reports()] == [("prefill", 2)]
            step = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
            model(tokens(2, 1), attention_mask=step, past_key_values=out.past_key_values)
            assert sc.reports()[-1].kind == "decode"


def test_a_second_model_with_other_heads_is_compressed_too() -> None:
    """Dynamo varies what differs between two models of one class, and so the scale of attention was no number any more."""
    for head_dim in (16, 32, 64):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, head_dim=head_dim)).eval()
        prompt = tokens(1, 40)
        expected = model.generate(prompt, max_new_tokens=20, **GREEDY)
        model.compile(backend=sc.spectral, options=EXACT)
        out = generated(model, prompt, 20)
        assert torch.equal(out.sequences, expected)
        assert all(isinstance(layer.keys, SpectralTensor) for layer in out.past_key_values.layers)


def test_attention_to_what_attention_gives() -> None:
    def model(x: torch.Tensor, cache: hf.DynamicCache) -> torch.Tensor:
        for layer in range(2):
            x = torch.nn.functional.scaled_dot_product_attention(
                x, *cache.update(x.clone(), x, layer), is_causal=x.shape[2] > 1
            )
        return x

    compiled = torch.compile(model, backend=sc.spectral, options=EXACT)
    dense, cache = hf.DynamicCache(), hf.DynamicCache()
    with torch.no_grad():
        for count in (9, 1, 1):
            x = torch.randn(1, 2, count, 16, generator=torch.Generator().manual_seed(count))
            torch.testing.assert_close(compiled(x, cache), model(x, dense))
    assert {(graph.kind, graph.matched, graph.sites) for graph in sc.reports()} == {("prefill", 2, 2), ("decode", 2, 2)}


def test_layers_on_another_device_stay_dense_with_a_reason() -> None:
    def model(*inputs: torch.Tensor) -> list[torch.Tensor]:
        out = []
        for x in inputs:
            key, value = (torch.cat((x[:, :, :0], x + n), 2) for n in range(2))
            out += [torch.nn.functional.scaled_dot_product_attention(x, key, value, is_causal=True), key, value]
        return out

    x = torch.randn(1, 2, 9, 16)
    with torch.no_grad():
        out = torch.compile(model, backend=sc.spectral, options={**EXACT, "strict": False})(x, x.to("meta"))
    (graph,) = sc.reports()
    assert (graph.matched, graph.sites) == (1, 2)
    assert "it is on meta and the graph's first on cpu: load the model onto one device" in str(graph)
    assert [isinstance(held, SpectralTensor) for held in out] == [False, True, True, False, False, False]
