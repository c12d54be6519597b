"""The picture of loss against bytes: every cache is drawn or named, and ours are told from rivals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from spectral_compile.evaluation.plot import GREY, OURS, WITH_PROFILE, Point, draw, picture

NAMES = ("dense", "exact", "balanced", "compact+profile", "balanced-margin", '{"preset": "quality"}', "seed", "kivi-4", "fp8")
SOME = [Point("dense", 1.0, 0.0), Point("quality", 6.0, 0.007), Point("compact", 14.2, 0.04), Point("balanced", 8.5, 0.01)]
SOME += [Point("balanced+profile", 8.5, 0.008), Point("fp8", 2.0, 0.02), Point("balanced-margin", 8.4, 0.02)]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.axes[0].texts}


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0.5, 40), st.sampled_from([0.0, -1e-9, 1e-5, 0.3, 8.0]))))
def test_every_cache_is_drawn_with_its_name_or_named_as_left_out(given: list[tuple[str, float, float]]) -> None:
    points = [Point(*each) for each in given]
    figure = picture(points, "a title")
    drawn = sum(len(line.get_xdata()) for line in figure.axes[0].lines)
    assert drawn == sum(point.kl > 0 for point in points)
    assert texts(figure) == {"better", *(point.name for point in points if point.kl > 0)}
    note = figure.get_supxlabel()
    assert all(point.name in note for point in points if point.kl <= 0)


def test_presets_are_joined_and_rivals_are_grey() -> None:
    lines = {line.get_label(): line for line in picture(SOME, "a title").axes[0].lines}
    assert set(lines) == {"presets", "presets with a profile", "variants of presets", "rivals"}
    assert list(lines["presets"].get_xdata()) == [6.0, 8.5, 14.2]
    assert (lines["presets"].get_linestyle(), lines["rivals"].get_linestyle()) == ("-", "None")
    colours = {name: to_hex(line.get_color()).upper() for name, line in lines.items()}
    assert colours["presets"] == colours["variants of presets"] == OURS
    assert colours["presets with a profile"] == WITH_PROFILE and colours["rivals"] == to_hex(GREY)


def test_ticks_are_plain_numbers() -> None:
    figure = picture(SOME, "a title")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2x", "4x", "8x", "16x"]
    assert {"0.01", "0.02"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_names_do_not_cover_each_other() -> None:
    """Two points in one place have names in two."""
    figure = picture([Point("kivi-4", 3.0, 0.1), Point("turbo-4", 3.0, 0.1), Point("quality", 6.0, 0.1)], "a title")
    first, second = (t.get_window_extent() for t in figure.axes[0].texts if t.get_text().endswith("-4"))
    assert not first.overlaps(second)


def test_a_file_says_what_was_drawn(tmp_path: Path) -> None:
    draw(SOME, "a title", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert [Point(**each) for each in json.loads(image.info["Description"])] == SOME


def test_no_file_is_left_where_drawing_fails(tmp_path: Path) -> None:
    no_points: Any = [("balanced", 8.5, 0.01)]
    with pytest.raises(AttributeError):
        draw(no_points, "a title", tmp_path / "out.png")
    assert not list(tmp_path.iterdir())
