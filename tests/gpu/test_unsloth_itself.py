"""Unsloth itself, in processes of its own: importing it assigns to the classes of transformers, peft and bitsandbytes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(find_spec("unsloth") is None, reason="needs pip install 'spectral-compile[unsloth]'"),
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(2, 128, (1, 300), generator=torch.Generator().manual_seed(0))
NEAR = 2e-2  # of the norm of logits: what 16 bits leave
LOAD = f"""
from unsloth import FastLanguageModel
import sys, warnings, torch, spectral_compile as sc
folder, kind, work = sys.argv[1:]
dtype = torch.float32 if kind == "32bit" else torch.bfloat16
model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=512, dtype=dtype, load_in_4bit=kind == "4bit")
if kind in ("lora", "merged"):
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, target_modules={TARGETS})
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.02)
    model.save_pretrained(work)
    if kind == "merged":
        model.merge_adapter()
FastLanguageModel.for_inference(model)
ids = torch.tensor({IDS.tolist()}).cuda()
seen = torch.ones_like(ids)
given = {{"attention_mask": seen, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}}
"""
STANDARD = """
from spectral_compile.unsloth import standard_forward
plain = standard_forward(model)
expected = plain.generate(ids, **given)
with torch.no_grad():
    theirs = model(input_ids=ids, attention_mask=seen).logits.float().cpu()
    ours = plain(input_ids=ids, attention_mask=seen).logits.float().cpu()
    seconds = plain(input_ids=expected, attention_mask=torch.ones_like(expected)).logits.float()
torch.compiler.set_stance("default")
plain.compile(backend="spectral", options={"preset": "exact", "strict": True})
found = plain.generate(ids, **given)
graphs = [(graph.kind, graph.matched, graph.sites) for graph in sc.reports()]
assert graphs == [("prefill", 2, 2), ("decode", 2, 2)], sc.reports()
torch.save((theirs, ours, seconds.cpu(), expected.cpu(), found.cpu()), f"{work}/found")
"""
PATCHED = """
torch.compiler.set_stance("default")
model.compile(backend="spectral")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.generate(ids, **given)
assert not any(graph.matched for graph in sc.reports()), sc.reports()
assert any("standard_forward" in str(warning.message) for warning in caught), [str(w.message) for w in caught]
"""


def run(folder: Path, kind: str, work: Path, then: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD + then, folder, kind, work], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def without_unsloth(folder: Path, kind: str, adapter: Path) -> torch.Tensor:
    """Logits of the same weights in transformers, which nobody has assigned to in this process."""
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    quantised = BitsAndBytesConfig(load_in_4bit=True, **how) if kind == "4bit" else None
    dtype = torch.float32 if kind == "32bit" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantised, device_map="cuda")
    if kind in ("lora", "merged"):
        from peft import PeftModel  # not on every machine with a GPU

        model = PeftModel.from_pretrained(model, adapter)
        if kind == "merged":
            model.merge_adapter()
    with torch.no_grad():
        return model(input_ids=IDS.cuda()).logits.float().cpu()


@pytest.mark.parametrize("kind", ["32bit", "16bit", "4bit", "lora", "merged"])
def test_the_standard_forward_is_compressed_and_right(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    run(tiny_folder, kind, tmp_path, STANDARD)
    theirs, ours, seconds, expected, found = torch.load(tmp_path / "found")
    plain = without_unsloth(tiny_folder, kind, tmp_path)
    for other in (theirs, plain):
        assert (other - ours).norm() < NEAR * ours.norm()
    assert torch.equal(expected[:, : IDS.shape[1] + 1], found[:, : IDS.shape[1] + 1])
    differ = (expected != found).nonzero()
    if len(differ):  # 16 bits leave ties, which dense may break otherwise
        at = int(differ[0, 1])
        choices = seconds[0, at - 1]
        assert kind != "32bit" and choices.max() - choices[found[0, at]] < NEAR * choices.abs().max()


def test_a_model_of_its_own_stays_dense_with_a_reason(tiny_folder: Path, tmp_path: Path) -> None:
    run(tiny_folder, "16bit", tmp_path, PATCHED)
