"""``spectral-compile``: the verbs of the command line, one a file."""

from __future__ import annotations

import typer

from spectral_compile.bench.verb import bench
from spectral_compile.doctor import doctor
from spectral_compile.evaluation.calibrate import verb as calibrate
from spectral_compile.evaluation.verb import evaluate
from spectral_compile.generate import generate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(generate)
app.command("eval")(evaluate)
app.command("calibrate")(calibrate)
app.command()(bench)
app.command()(doctor)


@app.callback()
def main() -> None:
    """Keep the KV cache of a transformers model compressed, and see what that does."""


if __name__ == "__main__":
    app()
