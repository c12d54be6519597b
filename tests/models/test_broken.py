"""Models that break into several graphs, and steps that stay dense: nothing is decoded at every step, nothing is wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.tensor import SpectralTensor
from tests.tiny import EXACT, GREEDY, GROUPED, TEXT, build, tokens

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
EXPERTS = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
HEADS = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
BREAKING = {
    "dynamic-ntk": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=DYNAMIC)),
    "dbrx": lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=256, attn_config=HEADS, ffn_config=EXPERTS, **TEXT)
    ),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


@pytest.mark.parametrize("name", BREAKING)
def test_a_graph_that_reads_only_sizes_decodes_nothing(name: str) -> None:
    """A piece before attention reads the number of cached elements, and used to have the whole cache decoded at every step."""
    torch.manual_seed(0)
    model = BREAKING[name]().eval()
    want = model.generate(tokens(1, 40), max_new_tokens=10, **GREEDY)
    model.compile(backend=sc.spectral, options=EXACT)
    out = model.generate(tokens(1, 40), max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, want)
    assert report.decodes() == 0
    assert all(isinstance(layer.keys, SpectralTensor) for layer in out.past_key_values.layers)
    assert {graph.kind for graph in sc.reports() if graph.sites} == {"prefill", "decode"}


@pytest.mark.parametrize("read", [lambda k: k.mT + 1, lambda k: k.data * 1.0, lambda k: (k.shape[2], k * 2)[1]])
def test_attributes_that_hold_values_are_no_shapes(read) -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = model(tokens(2, 30), use_cache=True).past_key_values.layers[0].keys
        got = torch.compile(read, backend=sc.spectral, options={**EXACT, "strict": False})(keys)
        torch.testing.assert_close(got, read(keys.dense()), atol=0, rtol=0)


def test_prompts_stay_dense_where_steps_cannot_be_compressed() -> None:
    """Else each conversation would be compressed and then decoded, which costs more than a dense one."""
    model, dense, prompt = build("llama"), build("llama"), tokens(1, 40)
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    bias = torch.zeros(1, 1, 1, 41)
    bias[..., 3] = -1.0
    step = {"attention_mask": bias, "position_ids": torch.tensor([[40]])}

    def talk(model: hf.PreTrainedModel) -> tuple[object, torch.Tensor]:
        with torch.no_grad():
            cache = model(prompt, use_cache=True).past_key_values
            kind = type(cache.layers[0].keys)
            return kind, model(prompt[:, :1], past_key_values=cache, **step).logits

    with pytest.warns(sc.SpectralWarning, match="are not compressed, so prompts stay dense too: its mask adds"):
        first = talk(model)
    second, want = talk(model), talk(dense)[1]
    assert [kind for kind, _ in (first, second)] == [SpectralTensor, torch.Tensor]
    assert report.decodes() == 4
    assert any("prompts stay dense" in str(graph) for graph in sc.reports())
    for _, got in (first, second):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_one_step_that_cannot_be_compressed_costs_other_conversations_nothing() -> None:
    model, prompt = build("llama"), tokens(1, 40)
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    model.generate(prompt, max_new_tokens=3, **GREEDY)
    with torch.no_grad(), pytest.warns(sc.SpectralWarning, match="its mask adds numbers"):
        cache = model(prompt, use_cache=True).past_key_values
        given = {"attention_mask": torch.zeros(1, 1, 1, 41), "position_ids": torch.tensor([[40]])}
        model(prompt[:, :1], past_key_values=cache, **given)
    out = model.generate(prompt, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    assert all(isinstance(layer.keys, SpectralTensor) for layer in out.past_key_values.layers)
