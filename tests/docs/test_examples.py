"""Every Python example of README and the documentation runs, page by page, as a reader would who types one after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spectral_compile as sc
from spectral_compile import backend
from spectral_compile.codec import PRESETS
from tests.docs.markdown import DOCS, PAGES, ROOT, blocks, name
from tests.tiny import tokens

WITH_EXAMPLES = [page for page in PAGES if blocks(page, "python")]
PRINTED = {"README.md", "docs/troubleshooting.md"}  # pages whose examples print reports


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
def test_examples_run(
    page: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))  # where a profile is kept
    monkeypatch.setattr(backend, "compile_inner", lambda gm, *rest: gm.forward)  # a compiler takes a minute, and is torch's
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    unsloth = SimpleNamespace(FastLanguageModel=SimpleNamespace(from_pretrained=lambda name, **_: (model, None)))
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)  # it needs a GPU to be imported
    sc.reset()
    names: dict[str, Any] = {
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_folder, eos_token="<pad>"),
        "inputs": {"input_ids": tokens(1, 40) % 128, "max_new_tokens": 4, "do_sample": False},
    }
    with patch.dict(PRESETS):  # to which a recipe adds
        for number, block in enumerate(blocks(page, "python")):
            recompilable(names["model"])
            code = block.replace('from_pretrained("..."', f"from_pretrained({str(tiny_folder)!r}")
            code = code.replace(", max_new_tokens=2000", "")  # there are some in ``inputs``
            code = code.replace('"contract.cache"', repr(str(tmp_path / "contract.cache")))
            code = code.replace("calibrate_once(model, tokenizer)", "calibrate_once(model, tokenizer, 1124, 16)")
            exec(compile(code, f"{name(page)}, Python block {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert ("decode: 2 of 2 attention sites compressed" in shown) == (name(page) in PRINTED)


def recompilable(model: PreTrainedModel) -> None:
    """The model as it was before ``model.compile``: each example compiles one of its own."""
    model._compiled_call_impl = None


def test_the_pages_that_should_have_examples_do() -> None:
    expected = [DOCS / f"{page}.md" for page in ("api", "format", "lm-eval", "unsloth")]
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *expected} <= set(WITH_EXAMPLES)
