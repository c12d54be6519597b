"""``spectral-compile warm``: what a later process asks for has been compiled."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

import spectral_compile as sc
from tests import shell

TINY = ("--dtype", "float32", "--device", "cpu", "--tokens", "700")
invoke = partial(shell.invoke, "warm")


def counts(output: str) -> tuple[int, int]:
    """Graphs that were compiled, and that were found, of the first stage."""
    row = re.search(r"700 tokens, steps, second turns[ │]+[\d.]+[ │]+(\d+)[ │]+(\d+)", output)
    assert row is not None, output
    return int(row[1]), int(row[2])


def test_what_was_warmed_is_found_by_the_next_run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = ("--options", "warmup=64", "--options", "recent=32")
    first = invoke(tiny_folder, *TINY, *options)
    assert first.exit_code == 0, first.output
    assert {graph.kind for graph in sc.reports()} == {"prefill", "decode", "extend"}
    assert all(graph.matched == graph.sites == 2 for graph in sc.reports())
    made, found = counts(first.stdout)
    assert made >= 3 and str(tmp_path) in first.stdout
    again = invoke(tiny_folder, *TINY, *options)
    assert again.exit_code == 0, again.output
    assert counts(again.stdout) == (0, made + found)


def test_texts_of_several_lengths_are_warmed_too(tiny_folder: Path) -> None:
    done = invoke(tiny_folder, *TINY, "--inner", "eager", "--batch", "1,2", "--options", "warmup=64", "--options", "recent=32")
    assert done.exit_code == 0, done.output
    assert "2 texts of 700 tokens" in done.stdout


def test_a_length_that_is_none_is_said(tiny_folder: Path) -> None:
    done = invoke(tiny_folder, "--tokens", "many")
    assert done.exit_code == 2 and "no count of tokens" in done.output
