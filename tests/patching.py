"""Models as other libraries patch and quantise them, and whether such a model is compressed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import spectral_compile as sc
from tests.tiny import DEVICE, EXACT, GREEDY, build, tokens


def generated(model: PreTrainedModel) -> torch.Tensor:
    """Tokens after two prompts, one of them padded."""
    prompt = tokens(2, 40).to(model.device)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    return model.generate(prompt, attention_mask=mask, max_new_tokens=8, **GREEDY)


def in_four_bits(folder: Path) -> PreTrainedModel:
    """A Llama with weights of bitsandbytes, saved to ``folder`` and loaded from it."""
    build("llama").save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=DEVICE)
    assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
    return model


def assert_compressed(model: PreTrainedModel, expected: torch.Tensor, matched: int = 2, decodes: int = 1) -> None:
    """The compiled model gives these tokens, from graphs of which ``matched`` of two sites are compressed."""
    model.compile(backend=sc.spectral, options={**EXACT, "strict": matched == 2})
    assert torch.equal(generated(model), expected)
    found = [(graph.kind, graph.matched, graph.sites) for graph in sc.reports() if graph.sites]
    assert found == [("prefill", matched, 2)] + [("decode", matched, 2)] * decodes
