"""``standard_forward`` on models whose public classes are assigned to as Unsloth does, by code that must never run."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile.report import SpectralWarning, stance_warning
from spectral_compile.unsloth import standard_forward
from tests.patching import assert_compressed, generated, in_four_bits
from tests.tiny import DEVICE, GROUPED, build, tokens

WINDOWED = {"matched": 1, "decodes": 2}  # one of two layers, and a graph more once the window is full
GEMMA = hf.GemmaConfig(**GROUPED, head_dim=16)
PATCHED: dict[str, Any] = {}
exec(
    compile(
        "def forward(*args, **kwargs):\n    raise AssertionError('a forward of Unsloth ran')",
        "/site-packages/unsloth/models/llama.py",
        "exec",
    ),
    PATCHED,
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


@pytest.fixture
def assign(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], None]:
    """Assign to all that Unsloth assigns to around a model, and more."""

    def assign(model: PreTrainedModel) -> None:
        modeling = sys.modules[type(model).__module__]
        for cls in [x for x in vars(modeling).values() if inspect.isclass(x) and issubclass(x, torch.nn.Module)]:
            if "forward" in vars(cls) and cls.__module__ == modeling.__name__:
                monkeypatch.setattr(cls, "forward", PATCHED["forward"])
        for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
            for module in (modeling, hf.masking_utils):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, PATCHED["forward"])
        monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", PATCHED["forward"])
        model.generate = PATCHED["forward"]
        for layer in model.model.layers:
            layer.mlp.forward = PATCHED["forward"]
            layer.self_attn.apply_qkv = PATCHED["forward"]
        model.model.rotary_emb = torch.nn.Module()

    return assign


@pytest.mark.parametrize(
    "name", ["llama", "llama-scaled-rope", "mistral", "qwen2", "qwen3", "gemma", "gemma2-softcapping", "gemma3"]
)
def test_it_is_compressed_and_right(name: str, assign: Callable[[PreTrainedModel], None]) -> None:
    torch.manual_seed(0)
    model = (hf.GemmaForCausalLM(GEMMA).eval() if name == "gemma" else build(name)).to(DEVICE)
    expected = generated(model)
    assign(model)
    with pytest.raises(AssertionError, match="a forward of Unsloth ran"):
        model(tokens(1, 3))
    assert_compressed(standard_forward(model), expected, **(WINDOWED if name == "gemma3" else {}))


def test_weights_are_shared_and_what_is_trained_is_seen() -> None:
    model = build("qwen2").train()
    new = standard_forward(model)
    shared = {x.data_ptr() for x in model.parameters()}
    assert {x.data_ptr() for x in new.parameters()} == shared
    assert new.model.layers[1].self_attn.q_proj is model.model.layers[1].self_attn.q_proj
    assert new.model.norm.weight is model.model.norm.weight
    assert new.generation_config is model.generation_config and new.config is not model.config
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.5)
        ids = tokens(1, 20)
        torch.testing.assert_close(new(ids).logits, model.eval()(ids).logits)


def test_nothing_public_is_assigned_to() -> None:
    def public() -> dict[tuple[str, str], Any]:
        modules = (hf.models.llama.modeling_llama, hf.masking_utils, peft.tuners.lora.layer, torch.nn.modules.linear)
        held = {(module.__name__, name): x for module in modules for name, x in vars(module).items()}
        classes = {path: cls for path, cls in held.items() if inspect.isclass(cls)}
        return held | {(".".join(path), name): x for path, cls in classes.items() for name, x in vars(cls).items()}

    model = build("llama")
    copy.deepcopy(model.config)  # Python notes the slots of a class at the first copy of one of its objects, in the class
    before = public()
    own = [dict(vars(module)) for module in model.modules()]
    standard_forward(model)
    after = public()
    assert [path for path in before.keys() | after.keys() if before.get(path, path) is not after.get(path, path)] == []
    assert own == [dict(vars(module)) for module in model.modules()]


def with_adapter(model: PreTrainedModel) -> peft.PeftModel:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if "lora_B" in name:
                x.normal_(generator=torch.Generator(x.device).manual_seed(1))
    return adapted.eval()


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_compressed_and_right(merged: bool, assign: Callable[[PreTrainedModel], None]) -> None:
    plain = generated(build("llama").to(DEVICE))
    model = with_adapter(build("llama").to(DEVICE))
    expected = generated(model.get_base_model())
    assert not torch.equal(expected, plain)
    if merged:
        model.merge_adapter()
    assign(model.get_base_model())
    new = standard_forward(model)
    assert_compressed(new, expected)
    layer, held = new.model.layers[0].self_attn.q_proj, model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A is held.lora_A and layer.base_layer is held.base_layer


def test_weights_of_four_bits_are_compressed_and_right(tmp_path: Path, assign: Callable[[PreTrainedModel], None]) -> None:
    model = in_four_bits(tmp_path)
    expected = generated(model)
    assign(model)
    new = standard_forward(model)
    assert new.model.layers[0].self_attn.q_proj is model.model.layers[0].self_attn.q_proj
    assert_compressed(new, expected)


def test_what_has_no_code_in_transformers_is_refused_with_a_reason() -> None:
    class Config(hf.LlamaConfig):
        pass

    model = hf.LlamaForCausalLM(Config(**GROUPED))
    with pytest.raises(ValueError, match="the code of LlamaForCausalLM is not part of transformers: compile"):
        standard_forward(model)
    with pytest.raises(ValueError, match="Linear is no transformers model: give what from_pretrained returned"):
        standard_forward(torch.nn.Linear(2, 2))


def test_other_modules_than_transformers_has_are_refused_with_a_reason() -> None:
    model = build("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"has no model.layers.1.mlp.up_proj, which transformers' own has"):
        standard_forward(model)


def test_adapters_of_prompts_are_refused_with_a_reason() -> None:
    model = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="its adapter learns prompts"):
        standard_forward(model)


def test_a_stance_that_compiles_nothing_new_is_warned_of() -> None:
    assert stance_warning() is None
    with torch.compiler.set_stance("eager_on_recompile"):
        with pytest.warns(SpectralWarning, match='call torch.compiler.set_stance\\("default"\\) first'):
            standard_forward(build("llama"))
        assert "eager_on_recompile" in sc.explain(build("llama"), input_ids=tokens(1, 20))
