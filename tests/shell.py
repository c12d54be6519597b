"""The command line as a shell would call it."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from spectral_compile.cli.main import app


def invoke(*arguments: object) -> Result:
    """``spectral-compile`` with these arguments, on a wide terminal without colours."""
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
