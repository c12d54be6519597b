"""``spectral-compile``: the verbs of the command line, one a file."""

from __future__ import annotations

from typing import Annotated

import typer

import spectral_compile
from spectral_compile.bench.verb import bench
from spectral_compile.command import Verbs
from spectral_compile.doctor import doctor
from spectral_compile.evaluation.calibrate import verb as calibrate
from spectral_compile.evaluation.verb import evaluate
from spectral_compile.generate import generate

app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(generate)
app.command("eval")(evaluate)
app.command("calibrate")(calibrate)
app.command()(bench)
app.command()(doctor)


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


if __name__ == "__main__":
    app()
