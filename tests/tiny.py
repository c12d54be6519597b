"""Tiny random models, one an architecture: the real code of transformers with small sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PreTrainedModel

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama-scaled-rope": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "llama-yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=YARN)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=32)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, rotary_pct=0.25)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None)
    ),
    "cohere-interleaved": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)),
    "glm4-partial-interleaved": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**GROUPED, head_dim=16, partial_rotary_factor=0.5)),
}

WINDOWS = {"sinks": 2, "recent": 8, "block": 4, "warmup": 16}  # small enough that a short prompt is coded
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of that name in evaluation mode; the same weights for the same ``seed``."""
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def tokens(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, count] without the padding token."""
    return torch.randint(1, 256, (rows, count), generator=torch.Generator().manual_seed(seed))
