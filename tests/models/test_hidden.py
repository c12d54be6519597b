"""Masks of any shape, padding on the right, hidden tokens, and layers that share a cache: all as dense attention has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.kernels.advance import kernel
from spectral_compile.kernels.advance.hide import HIDES, REVEALS, hide
from spectral_compile.kernels.values import Hidden
from tests.budget import FULL, examples
from tests.stores import PlainStore, Step, by_kernels
from tests.tiny import DEVICE, EXACT, GREEDY, TEXT, WINDOWS, build, tokens

HOW = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense model, and the same one compiled."""
    sc.reset()
    model = build("llama")
    model.compile(backend=sc.spectral, options=EXACT)
    return build("llama"), model


def asks(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the last ``count`` columns see a token, bool [B, count]; of the others nobody reads what comes out."""
    return mask.cumsum(1)[:, -count:] > 0


def talk(model: PreTrainedModel, masks: list[torch.Tensor], seed: int) -> torch.Tensor:
    """Logits of every column that sees a token: a prompt, and then chunks; each mask is of all columns so far."""
    cache, out, known = None, [], 0
    for mask in masks:
        count = mask.shape[1] - known
        given = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            ids = torch.arange(known, known + count)[None]
            step = model(tokens(len(mask), count, seed=seed + known), position_ids=ids, **given)
        out.append(step.logits[asks(mask, count)])
        cache, known = step.past_key_values, mask.shape[1]
    return torch.cat(out)


@settings(max_examples=examples(6, 25))
@given(st.data())
def test_any_mask_is_as_in_dense_attention(pair: tuple[PreTrainedModel, PreTrainedModel], data: st.DataObject) -> None:
    """Each step's mask pads its own columns anywhere, and hides any of the tokens before them."""
    rows, counts = 2, data.draw(st.lists(st.sampled_from([1, 1, 5]), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 1 << 20))
    draw = torch.Generator().manual_seed(seed)
    masks, shown = [], torch.zeros(rows, 0, dtype=torch.int64)
    for count in (33, *counts):
        new = (torch.rand(rows, count, generator=draw) < data.draw(st.sampled_from([0.5, 0.9, 1.0]))).long()
        hidden = (torch.rand(shown.shape, generator=draw) < data.draw(st.sampled_from([0.0, 0.2]))).long()
        shown = torch.cat((shown, new), 1)  # what was never shown stays so
        masks.append(torch.cat((shown[:, : hidden.shape[1]] * (1 - hidden), new), 1))
    dense, model = pair
    torch.testing.assert_close(talk(model, masks, seed), talk(dense, masks, seed), atol=1e-4, rtol=1e-4)
    assert report.decodes() == 0


@pytest.mark.parametrize("padded", [slice(25, 40), slice(0, 15), slice(10, 20)], ids=["right", "left", "middle"])
def test_a_padded_batch_continues_as_the_dense_model_does(pair: tuple[PreTrainedModel, PreTrainedModel], padded: slice) -> None:
    """``generate`` reads what follows the last column, which is padding where a tokenizer pads on the right."""
    prompt, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, padded] = 0
    dense, model = (torch.stack(m.generate(prompt, attention_mask=mask, max_new_tokens=6, **HOW).logits) for m in pair)
    torch.testing.assert_close(model, dense, atol=1e-4, rtol=1e-4)


def test_a_long_chunk_with_padding_over_a_past_with_hidden_tokens(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """From 512 queries on the past is decoded some tokens at a time, which leave out what is hidden."""
    first, second = torch.ones(2, 90, dtype=torch.int64), torch.ones(2, 690, dtype=torch.int64)
    second[0, 20:50], second[1, 300:400], second[0, 600:] = 0, 0, 0
    dense, model = pair
    torch.testing.assert_close(talk(model, [first, second], 0), talk(dense, [first, second], 0), atol=1e-4, rtol=1e-4)


def test_a_mask_that_hides_more_and_then_less_goes_on_compressed(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Lossy stores too: a turn that is taken back is as if it had not been there, for the others that are."""
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "preset": "balanced", **WINDOWS})
    masks = [torch.ones(2, n, dtype=torch.int64) for n in (60, 61, 66, 67)]
    masks[1][0, 20:33] = masks[2][0, 20:33] = 0
    torch.testing.assert_close(talk(model, masks, 0), talk(pair[0], masks, 0), atol=0.2, rtol=0.2)
    assert report.decodes() == 0


@pytest.mark.newest
@pytest.mark.parametrize("preset", ["balanced", "seed", "exact"])
@pytest.mark.parametrize("count", [1, 3])
def test_kernels_hide_what_the_reference_hides(preset: str, count: int) -> None:
    layout = sc.SpectralConfig.parse({"preset": preset, **WINDOWS}).layout(2, 16, None)
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> Step:
        q, k, v = (torch.randn(2, heads, n, 16, generator=draw) for heads in (4, 2, 2))
        return Step(q, k, v, None, None)

    store = PlainStore.blank(layout, 2, 120)
    past, step = some(90), some(count)
    store.advance(past)
    store.append(past)
    store.advance(step)
    visible = (torch.rand(2, store.positions.shape[1], generator=draw) < 0.6).to(torch.uint8)
    visible[1] = 1
    hidden = Hidden(visible=visible)
    expected, got = store.attend(step, 0.3, hidden), by_kernels(store, step, 0.3, hidden)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-2)
    assert not torch.allclose(expected[0], store.attend(step, 0.3)[0], atol=1e-2)


@settings(max_examples=examples(15, 60))
@given(st.integers(1, 3), st.integers(0, 40), st.integers(0, 9), st.integers(0, 1 << 20))
def test_what_a_mask_hides_and_reveals(batch: int, count: int, more: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    columns = torch.rand(batch, count + more, generator=draw) < 0.7
    columns[:, count:] = False
    shown = (torch.rand(batch, count, generator=draw) < 0.7).long()
    ours, theirs = (torch.full((batch, count + more + 1), 7, dtype=torch.uint8) for _ in range(2))
    our_flags, their_flags = (torch.full((batch,), 7, dtype=torch.int32) for _ in range(2))
    hide(ours, our_flags, columns, shown)
    theirs, their_flags = theirs.to(DEVICE), their_flags.to(DEVICE)
    kernel.hide(theirs, their_flags, columns.to(DEVICE), shown.to(DEVICE))
    for row in range(batch):
        known = columns[row, :count]
        stored = shown[row][known]
        expected = HIDES * bool((stored == 0).any()) + REVEALS * bool((shown[row][~known] != 0).any())
        for visible, flags in ((ours, our_flags), (theirs.cpu(), their_flags.cpu())):
            assert visible[row, : len(stored)].tolist() == stored.tolist()
            assert flags[row] == expected


SHARED = {
    **TEXT,
    **{"vocab_size_per_layer_input": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2},
    **{"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
SHARING: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3n": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(**SHARED, activation_sparsity_pattern=[0.0] * 4, laurel_rank=8)
    )
}
if hasattr(hf, "Gemma4ForCausalLM"):
    SHARING["gemma4"] = lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**SHARED, global_head_dim=32))


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize(("count", "options"), [(90, EXACT), (1300, {"preset": "exact", "inner": "eager"})][: 1 + FULL])
def test_layers_that_read_another_layers_cache_share_its_store(name: str, count: int, options: dict[str, object]) -> None:
    """Each of them used to append the same token: a long prompt crashed, and a second turn was wrong."""
    torch.manual_seed(0)
    model = SHARING[name]().eval()

    def both_turns() -> torch.Tensor:
        first = model.generate(tokens(1, count), max_new_tokens=4, **HOW)
        prompt = torch.cat((first.sequences, tokens(1, 23, seed=1)), 1)
        second = model.generate(prompt, past_key_values=first.past_key_values, max_new_tokens=4, **HOW)
        return torch.stack(first.logits + second.logits)

    expected = both_turns()
    sc.reset()
    model.compile(backend=sc.spectral, options={**options, "strict": False})
    torch.testing.assert_close(both_turns(), expected, atol=1e-3, rtol=1e-3)
    assert {(graph.kind, graph.matched) for graph in sc.reports()} == {("prefill", 2), ("decode", 2), ("extend", 2)}
    assert report.decodes() == 0


def test_one_tensor_given_to_two_layers_grows_for_each_of_them_by_itself() -> None:
    model, dense, prompt = build("llama"), build("llama"), tokens(1, 40)
    model.compile(backend=sc.spectral, options=EXACT)
    out = []
    for each in (dense, model):
        with torch.no_grad():
            cache = each(prompt, use_cache=True).past_key_values
            first, second = cache.layers
            second.keys, second.values = first.keys[:, :, :], first.values[:, :, :]
            for token in (5, 6, 7):
                step = each(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            out.append(step.logits)
    torch.testing.assert_close(out[1], out[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_is_no_number_in_a_cache_is_no_number_in_what_comes_of_it(side: str) -> None:
    """A softmax of it was taken for one that sees nothing, and cleared."""
    model, dense = build("llama"), build("llama")
    name = "k_proj" if side == "keys" else "v_proj"
    model.compile(backend=sc.spectral, options=EXACT)
    for each in (dense, model):
        with torch.no_grad():
            getattr(each.model.layers[1].self_attn, name).weight[0, 0] = float("nan")
            cache = each(tokens(1, 40), use_cache=True).past_key_values
            step = each(tokens(1, 1), past_key_values=cache, use_cache=True)
        assert step.logits.isnan().any()
