"""``spectral-compile demo``: that it shows both caches, and that it fails where it does not show what it is there for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_compile.cli import demo
from spectral_compile.cli.session import about
from spectral_compile.evaluation.tasks import Question
from tests import shell
from tests.tiny import build, tokens

invoke = partial(shell.invoke, "demo", "--device", "cpu", "--preset", "exact", "--options", "strict=True")
ASKED, BEGUN = "What is the word?", "The word is"


def ask(monkeypatch: pytest.MonkeyPatch, answer: str, count: int = 700) -> None:
    """Let the demo's question have this ``answer``, after ``count`` random tokens."""
    question = Question("key", tokens(1, count) % 126 + 2, answer, 0.5, ASKED, BEGUN)
    monkeypatch.setattr(demo, "questions", lambda *_, **__: [question])


def answer_of(folder: Path, count: int = 700) -> str:
    """What the dense model says, in bfloat16 as the demo loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    said = model.generate(tokens(1, count) % 126 + 2, max_new_tokens=1, do_sample=False)
    return AutoTokenizer.from_pretrained(folder).decode(said[0, -1])


def test_both_caches_answer_side_by_side(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = answer_of(tiny_folder)
    ask(monkeypatch, answer)
    result = invoke("--model", tiny_folder)
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert shown.index("two graphs") < shown.index(f"{BEGUN}{answer}")  # what is compiled is said beforehand
    assert shown.count(BEGUN) == 2 and ASKED in shown
    assert "2 of 2" in shown and "right answer" in shown and "Both answers are right" in shown
    assert "dense" in result.stderr and "spectral (exact)" in result.stderr


def test_a_wrong_answer_is_a_failure(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "w1000")
    result = invoke("--model", tiny_folder)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: the dense cache answers 'The word is")
    assert "Both answers are right" not in result.stdout


def test_a_model_that_is_compressed_in_part_is_a_failure(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("gemma3").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    ask(monkeypatch, "", count=60)
    result = invoke("--model", tmp_path)
    assert result.exit_code == 1
    assert "error: not every attention is compressed: 1 of 2 in prefill" in result.stderr


def test_the_built_in_question_fits_any_tokenizer(tiny_folder: Path) -> None:
    """Words that a tokenizer does not know are no reason to fail before the model has answered."""
    result = invoke("--model", tiny_folder, "--tokens", 100)
    assert result.exit_code == 1 and "instead of 52511" in result.stderr


@pytest.mark.parametrize(("seconds", "said"), [(1, "5 seconds"), (18, "20 seconds"), (60, "60 seconds"), (300, "5 minutes")])
def test_times_are_rough(seconds: float, said: str) -> None:
    assert about(seconds) == f"about {said}"
