"""Every Python example of the README runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

import spectral_compile as sc
from tests.tiny import tokens

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(
    number: int, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sc.reset()
    ids = tokens(1, 40) % 128
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_folder),
        "inputs": {"input_ids": ids, "max_new_tokens": 4, "do_sample": False},
    }
    stand_in = SimpleNamespace(from_pretrained=lambda name, **_: (names["model"], None))
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=stand_in))  # it needs a GPU to be imported
    block = BLOCKS[number].replace('from_pretrained("...")', f"from_pretrained({str(tiny_folder)!r})")
    block = block.replace("**inputs, max_new_tokens=2000", "**inputs")
    if "explain(" in block:
        names["model"].compile(backend="spectral", options={"inner": "eager"})
        block = block.replace("explain(model, **inputs)", "explain(model, input_ids=inputs['input_ids'])")
    exec(compile(block, f"README block {number}", "exec"), names)
    if "print" in block:
        assert "2 of 2 attention sites compressed" in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 3
