"""Tiny random models some of whose layers keep a state instead of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf
from transformers import PreTrainedModel

from tests.tiny import GROUPED, SMALL

MIXED = {**GROUPED, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
HYBRIDS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3.5": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**MIXED, **LINEAR)),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**MIXED, **LINEAR, **EXPERTS)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])),
    "granite4": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            **GROUPED, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=64
        )
    ),
    "nemotron-h": lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            **{name: value for name, value in GROUPED.items() if name != "num_hidden_layers"},
            layers_block_type=["mamba", "attention", "mlp"],
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
            head_dim=16,
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4
        )
    ),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(**GROUPED, **MAMBA, attn_layer_indices=[1])),
    "zamba2": lambda: hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **{**SMALL, "num_hidden_layers": 3},
            layers_block_type=["mamba", "mamba", "hybrid"],
            n_mamba_heads=8,
            mamba_d_state=16,
            num_mem_blocks=1,
        )
    ),
    "minimax": lambda: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**MIXED, num_local_experts=2)),
}  # fmt: skip  # fmt: skip
