"""What all verbs of the command line share: how mistakes are said, options read, and what is shown."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Mistake, mistakes

WIDTH = 200  # of tables that go to a file


class Verbs(TyperGroup):
    """Verbs that say a ``Mistake`` in one sentence and exit with its status; any other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Mistake as error:
            mistake = error
        except torch._dynamo.exc.BackendCompilerFailed as error:  # options that do not fit a model are found while it compiles
            if not isinstance(error.inner_exception, Mistake):
                raise
            mistake = error.inner_exception
        Console(stderr=True).print(f"error: {mistake}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(mistake.status)


def parse_options(given: dict[str, Any], pairs: list[str]) -> SpectralConfig:
    """The config of ``given`` options and every ``key=value``; ``Mistake`` where it is none."""
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise Mistake(f"--options takes key=value, not {pair!r}")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            given[key] = value
    with mistakes(ValueError):
        return SpectralConfig.parse(given)


def count(text: str) -> int:
    """A count of tokens; ``Mistake`` where it is none."""
    if not text.isdecimal() or len(text) > 12 or int(text) < 1:
        raise Mistake(f"{text!r} is no count of tokens, such as 4096")
    return int(text)


def need_matplotlib() -> None:
    """``Mistake`` where plots cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise Mistake("--plot needs matplotlib: pip install 'spectral-compile[bench]'")


def output() -> Console:
    """Where tables go: a terminal, as wide as it is, or a file."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def phases(screen: Console, *columns: ProgressColumn) -> Progress:
    """A display of what is going on and since when, which disappears afterwards."""
    shown = (SpinnerColumn(), TextColumn("{task.description}"), *columns, TimeElapsedColumn())
    return Progress(*shown, console=screen, transient=True)
