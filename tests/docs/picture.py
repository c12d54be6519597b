"""README's picture, drawn from the first table of docs/measured.md by what ``spectral-compile eval --plot`` calls."""

from __future__ import annotations

from pathlib import Path

from spectral_compile.evaluation.plot import Point, draw
from tests.docs.markdown import DOCS, table

PAGE, PNG = DOCS / "measured.md", DOCS / "loss-against-bytes.png"
TITLE = "SmolLM2-135M-Instruct in bfloat16: 4096 tokens cached, 512 scored, 8 texts"


def points() -> list[Point]:
    """The rows of the table."""
    return [Point(name, float(ratio), float(kl)) for name, ratio, _, _, kl, _ in table(PAGE, "cache")]


def write(path: Path = PNG) -> None:
    """Draw them."""
    draw(points(), TITLE, path)
