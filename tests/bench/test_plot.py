"""The panels of ``bench --plot``: every row is drawn or named, and ours are told from dense caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from spectral_compile.bench.attention import COPY, GQA
from spectral_compile.bench.encode import DENSE
from spectral_compile.bench.plot import PANELS, picture, tokens
from spectral_compile.cli.bench import PARTS
from spectral_compile.evaluation.plot import GREY

FACTS = {"device": "cpu", "torch": "2", "transformers": "5", "command": "spectral-compile bench"}


def row(error: str | None = None, **values: Any) -> dict[str, Any]:
    return {"geometry": "tiny", **values, "error": error}


BATCHES = {"": [256, 8192], ", batch 8": [1024]}
ROWS = {
    "attention": [
        {"method": COPY, "bytes_per_s": 1e12, "error": None},
        *(row(batch=1, cached=n, method=method, microseconds=n / 9) for n in (256, 8192) for method in (GQA, "seed")),
        *(row(batch=8, cached=1024, method=method, microseconds=9.0) for method in (GQA, "seed")),
        row(batch=1, cached=4096, method="balanced", error="out of memory"),
    ],
    "encode": [
        row(cached=4096, what=DENSE, milliseconds=3.0),
        row(cached=4096, what="balanced", milliseconds=1.0, percent=33.0),
        row(cached=8192, what="balanced", milliseconds=1.0, percent=None),
    ],
    "generate": [row(cached=4096, variant=v, step_median_ms=9.0) for v in ("static", "spectral")],
    "steady": [
        row(cached=4096, new_tokens=20, variant=v, steps_ms=[2.0] * 20) for v in ("spectral", "dense, static cache")
    ],
    "host": [row(cached=4096, variant=v, milliseconds=1.0) for v in ("spectral, CUDA graphs", "inductor, growing cache")],
    "waits": [row(cached=4096, variant=v, first_ms=9.0) for v in ("spectral", "inductor")],
    "second": [row(cached=4096, variant=v, second_first_token_s=9.0) for v in ("spectral", "inductor")],
}  # fmt: skip


@pytest.fixture(scope="module")
def figure() -> Figure:
    return picture(ROWS, FACTS)


def test_each_part_has_a_panel(figure: Figure) -> None:
    assert set(PANELS) == set(PARTS) == set(ROWS)
    assert len(figure.axes) == len(ROWS)
    assert all("better" in [text.get_text() for text in axes.texts] for axes in figure.axes)


def test_rows_that_are_not_drawn_are_named_with_the_reason(figure: Figure) -> None:
    left_out = figure.get_supxlabel()
    assert "attention: tiny, 1, 4096, balanced (out of memory)" in left_out
    assert f"attention: {COPY} (a bandwidth)" in left_out
    assert "encode: tiny, 8192, balanced (without a dense forward to compare with)" in left_out
    assert left_out.count("; ") == 2


def test_batches_have_lines_of_their_own(figure: Figure) -> None:
    lines = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
    assert lines == {f"tiny, {method}{batch}": lengths for method in (GQA, "seed") for batch, lengths in BATCHES.items()}


def test_only_dense_caches_are_grey(figure: Figure) -> None:
    for axes in figure.axes[:-3]:
        lines = {str(line.get_label()): to_hex(line.get_color()) for line in axes.lines}
        assert len(lines) > 1
        for name, colour in lines.items():
            assert (colour == to_hex(GREY)) == any(dense in name for dense in (GQA, DENSE, "static"))
    for axes in figure.axes[-3:]:
        assert [to_hex(bar.get_facecolor()) == to_hex(GREY) for bar in axes.patches] == [False, True]


def test_lengths_are_ticks_that_one_can_read(figure: Figure) -> None:
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["256", "1024", "8K"]
    assert [tokens(n) for n in (256, 1300, 4096, 5000, 131072)] == ["256", "1300", "4K", "5000", "128K"]
