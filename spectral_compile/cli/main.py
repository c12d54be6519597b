"""``spectral-compile``: the commands of the command line, one a file."""

from __future__ import annotations

from typing import Annotated

import typer

import spectral_compile
from spectral_compile.cli import bench, calibrate, demo, doctor, generate
from spectral_compile.cli.console import Commands
from spectral_compile.cli.eval import evaluate
from spectral_compile.cli.warm import warm

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo.demo)
app.command()(generate.generate)
app.command("eval")(evaluate)
app.command("calibrate")(calibrate.calibrate_model)
app.command()(bench.bench)
app.command()(doctor.doctor)
app.command()(warm)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"spectral-compile {spectral_compile.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    """Keep the KV cache of a transformers model compressed, and see what that does."""
