"""Tiny random models, one an architecture: the real code of transformers with small sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from hypothesis import strategies as st
from transformers import PreTrainedModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OLDEST = hf.__version__.startswith("5.17")
TEXT = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SMALL = {
    **TEXT,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
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
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 2.0,
    "original_max_position_embeddings": 1024,
}

CAPPED = {**GROUPED, "head_dim": 16, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1, "initializer_range": 0.1}


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """The model with attention written out."""
    model.set_attn_implementation("eager")
    return model


def with_sinks(model: PreTrainedModel) -> PreTrainedModel:
    """The model with sinks that take about half of the attention, of each head another share."""
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.sinks.uniform_(2.0, 4.0)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama-scaled-rope": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "llama-yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=YARN)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=32)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, rotary_pct=0.25)),
    "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_embd=64, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, **TEXT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None)
    ),
    "cohere-interleaved": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)),
    "glm4-partial-interleaved": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**GROUPED, head_dim=16, partial_rotary_factor=0.5)),
    "phi3-long-rope": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**GROUPED, original_max_position_embeddings=1024, rope_parameters=LONG)
    ),
    "gemma4-proportional": lambda: hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(
            **GROUPED,
            head_dim=16,
            global_head_dim=32,
            vocab_size_per_layer_input=256,
            hidden_size_per_layer_input=8,
            layer_types=["full_attention"] * 2,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**GROUPED, head_dim=32, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**GROUPED)),
    "smollm3-without-rope": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0])),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**GROUPED)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **TEXT)),
    "llama-eager": lambda: eager(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))),
    "gpt2-eager": lambda: eager(MODELS["gpt2"]()),
    "gemma2-softcapping": lambda: eager(hf.Gemma2ForCausalLM(hf.Gemma2Config(**CAPPED, layer_types=["full_attention"] * 2))),
    "gpt-oss-sinks": lambda: with_sinks(
        hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
            )
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**{**SMALL, "ffn_dim": 64, "max_position_embeddings": 512, "word_embed_proj_dim": 64})
    ),
}
if OLDEST:
    del MODELS["phi3-long-rope"], MODELS["gpt-j"]  # there its decode step stays dense, and all of GPT-J, as docs/models.md says

WINDOW = {**GROUPED, "sliding_window": 24}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# models of which some layers, or none, are compressed
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral-with-a-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WINDOW)),
    "qwen2-with-windows": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**WINDOW, use_sliding_window=True, max_window_layers=1)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**MIXED, head_dim=16)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**MIXED)),
    "exaone4": lambda: hf.Exaone4ForCausalLM(hf.Exaone4Config(**MIXED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WINDOW, head_dim=16)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**MIXED, head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **TEXT)),
    "deepseek3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16},
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        )
    ),
}

WINDOWS = {"first_exact": 2, "recent": 8, "block": 4, "warmup": 16}  # small enough that a short prompt is coded
EXACT = {"preset": "exact", "strict": True, "inner": "eager", **WINDOWS}  # options under which nothing may differ from dense
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of that name in evaluation mode; the same weights for the same ``seed``."""
    torch.manual_seed(seed)
    return {**MODELS, **OTHERS}[name]().eval()


def smollm2_sized(layers: int, positions: int) -> PreTrainedModel:
    """A random model of SmolLM2's sizes, but for the vocabulary, with ``layers`` layers for up to ``positions`` tokens."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=positions,
    )
    return hf.LlamaForCausalLM(config).eval()


def tokens(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, count] without the padding token."""
    return torch.randint(1, 256, (rows, count), generator=torch.Generator().manual_seed(seed))


# Here, since test files that others import are run twice, and an operation that is defined again takes the first one away.
UNSLOTH = torch.library.Library("unsloth", "FRAGMENT")
UNSLOTH.define("rope_embedding(Tensor x) -> Tensor")
UNSLOTH.impl("rope_embedding", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("unsloth::rope_embedding", torch.empty_like, lib=UNSLOTH)
rope_embedding = torch.ops.unsloth.rope_embedding.default  # stands in for an operation of Unsloth's


@st.composite
def joint_heads(draw: st.DrawFn, kv_heads: int) -> dict[str, int]:
    """How many heads' keys, and values, are coded together: more of one side than of the other, too."""
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    group = draw(st.sampled_from(fitting))
    return {"key_group": group, "value_group": draw(st.sampled_from([n for n in fitting if not n % group or not group % n]))}
