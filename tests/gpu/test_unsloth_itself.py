"""Unsloth itself, in processes of its own: importing it assigns to the classes of transformers, peft and bitsandbytes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(find_spec("unsloth") is None, reason="needs pip install 'spectral-compile[unsloth]'"),
]

LOAD = """
from unsloth import FastLanguageModel
import sys, warnings, torch, spectral_compile as sc
folder, kind = sys.argv[1:]
model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=512, dtype=torch.bfloat16, load_in_4bit=kind == "4bit")
if kind in ("lora", "merged"):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, target_modules=names)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.02)
    if kind == "merged":
        model.merge_adapter()
FastLanguageModel.for_inference(model)
ids = torch.randint(2, 128, (1, 300), generator=torch.Generator().manual_seed(0)).cuda()
seen = torch.ones_like(ids)
given = {"attention_mask": seen, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
"""
STANDARD = """
from spectral_compile.unsloth import standard_forward
with torch.no_grad():
    theirs = model(input_ids=ids, attention_mask=seen).logits.float()
plain = standard_forward(model)
with torch.no_grad():
    ours = plain(input_ids=ids, attention_mask=seen).logits.float()
assert (theirs - ours).norm() < 2e-2 * ours.norm(), (theirs - ours).norm() / ours.norm()
expected = plain.generate(ids, **given)
torch.compiler.set_stance("default")
plain.compile(backend="spectral", options={"preset": "exact", "strict": True})
found = plain.generate(ids, **given)
print("equal tokens", int((expected == found).sum()) - 300, "of 24")
assert torch.equal(expected[:, :301], found[:, :301])
graphs = [(graph.kind, graph.matched, graph.sites) for graph in sc.reports()]
assert graphs == [("prefill", 2, 2), ("decode", 2, 2)], sc.reports()
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


def run(folder: Path, kind: str, then: str) -> str:
    done = subprocess.run([sys.executable, "-c", LOAD + then, folder, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["16bit", "4bit", "lora", "merged"])
def test_the_standard_forward_is_compressed_and_right(kind: str, tiny_folder: Path) -> None:
    assert "equal tokens" in run(tiny_folder, kind, STANDARD)


def test_a_model_of_its_own_stays_dense_with_a_reason(tiny_folder: Path) -> None:
    run(tiny_folder, "16bit", PATCHED)
