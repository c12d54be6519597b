"""What all commands share: how mistakes are said, and where tables, progress and figures go."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from spectral_compile.errors import Mistake

WIDTH = 200  # of tables that go to a file


class Commands(TyperGroup):
    """Commands that say a ``Mistake`` in one sentence and exit with its status; any other error keeps its traceback."""

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
