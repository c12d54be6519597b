"""``eval --plot``: loss against bytes as one picture, presets coloured and joined, rivals grey with their names."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from spectral_compile.codec import PRESETS
from spectral_compile.evaluation.contenders import PROFILED
from spectral_compile.files import write_whole

OURS, WITH_PROFILE, GREY = "#0072B2", "#D55E00", "0.45"  # blue and orange that nobody takes for each other
_RATIOS = [2.0**power for power in range(-4, 12)]  # that have a tick
_STEPS = 64  # boxes along a line between two points
_COMPARISON = "seed"  # the preset that is there to be compared with, and so is drawn as a rival
# where a name may stand beside its point: offset in points, and the corner of the text that lies there
_PLACES = [
    *((5, 4, "left", "bottom"), (5, -4, "left", "top"), (-5, 4, "right", "bottom"), (-5, -4, "right", "top")),
    *((0, 7, "center", "bottom"), (0, -7, "center", "top"), (14, 12, "left", "bottom"), (14, -12, "left", "top")),
    *((-14, 12, "right", "bottom"), (-14, -12, "right", "top"), (0, 18, "center", "bottom"), (0, -18, "center", "top")),
]


class Point(NamedTuple):
    """A cache: dense bytes over all bytes held, and its mean KL divergence from the dense cache in nats a token."""

    name: str
    ratio: float
    kl: float


class _Look(NamedTuple):
    """How points of one kind are drawn."""

    label: str
    colour: str
    filled: bool
    joined: bool


_LOOKS = {
    "preset": _Look("presets", OURS, True, True),
    "profile": _Look("presets with a profile", WITH_PROFILE, True, True),
    "variant": _Look("variants of presets", OURS, False, False),
    "rival": _Look("rivals", GREY, True, False),
}


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Write ``picture`` as PNG; the figures that were drawn stand in the file's ``Description``, as JSON."""
    save(picture(points, title), path, json.dumps([point._asdict() for point in points]))


def picture(points: Sequence[Point], title: str) -> Any:
    """A figure of matplotlib with a point for each cache, and below the names of those that have no place on its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = sorted((point for point in points if point.ratio > 0 and point.kl > 0), key=lambda point: point.ratio)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(
        title=title, xscale="log", yscale="log", xlabel="dense bytes over all bytes held", ylabel="KL to dense, nats a token"
    )
    axes.title.set_fontsize("medium")
    axes.grid(which="major", alpha=0.3)
    axes.margins(0.08)
    groups = [(look, [point for point in drawn if _look(point.name) is look]) for look in _LOOKS.values()]
    for look, group in groups:
        x, y = [point.ratio for point in group], [point.kl for point in group]
        line, face = ("-" if look.joined else "none"), (look.colour if look.filled else "none")
        if group:
            axes.plot(x, y, color=look.colour, ls=line, marker="o", markersize=5, markerfacecolor=face, label=look.label)
    if drawn:
        plain(axes.xaxis, "{:g}x".format, [ratio for ratio in _RATIOS if axes.get_xlim()[0] <= ratio <= axes.get_xlim()[1]])
        plain(axes.yaxis)
    note_left_out(figure, [f"{point.name} (KL {point.kl:g})" for point in points if point not in drawn])
    others = [better(axes, (0.97, 0.05), (0.87, 0.15))] + ([axes.legend(fontsize="small")] if drawn else [])
    figure.draw_without_rendering()  # only then is it known what lies where
    _name(axes, drawn, [other.get_window_extent() for other in others] + _boxes(axes, groups))
    return figure


def _look(name: str) -> _Look:
    base = name.removesuffix(PROFILED)
    if base in PRESETS and base != _COMPARISON:
        return _LOOKS["preset" if base == name else "profile"]
    variant = name.startswith("{") or (base not in PRESETS and base.split("-")[0] in PRESETS)
    return _LOOKS["variant" if variant else "rival"]


def _name(axes: Any, points: Sequence[Point], taken: list[Any]) -> None:
    """Write the name of each point where none of the boxes ``taken`` is, or at the first place if none is free."""
    renderer, inside = axes.figure.canvas.get_renderer(), axes.get_window_extent()

    def write(point: Point, place: tuple[int, int, str, str]) -> Any:
        dx, dy, side, corner = place
        return axes.annotate(
            point.name, (point.ratio, point.kl), xytext=(dx, dy), textcoords="offset points", ha=side, va=corner,
            fontsize="x-small", color=_look(point.name).colour, in_layout=False,
        )  # fmt: skip

    for point in points:
        for place in _PLACES:
            text = write(point, place)
            box = text.get_window_extent(renderer)
            if not box.count_overlaps(taken) and inside.containsx(box.x0) and inside.containsx(box.x1):
                break
            text.remove()
        else:
            box = write(point, _PLACES[0]).get_window_extent(renderer)
        taken.append(box)


def _boxes(axes: Any, groups: list[tuple[_Look, list[Point]]]) -> list[Any]:
    """What names must not cover: small boxes around points, and along the lines that join them."""
    from matplotlib.transforms import Bbox

    boxes = []
    for look, group in groups:
        places = [axes.transData.transform((point.ratio, point.kl)) for point in group]
        boxes += [Bbox.from_extents(*(place - 6), *(place + 6)) for place in places]
        for start, end in pairwise(places) if look.joined else ():
            along = [start + (end - start) * i / _STEPS for i in range(_STEPS)]
            boxes += [Bbox.from_extents(*(place - 1), *(place + 1)) for place in along]
    return boxes


def plain(axis: Any, shown: Callable[[float], str] = "{:g}".format, ticks: Sequence[float] | None = None) -> None:
    """Numbers without exponents on a logarithmic axis: at ``ticks``, or else at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: shown(value))


def better(axes: Any, tip: tuple[float, float], tail: tuple[float, float]) -> Any:
    """An arrow from ``tail`` to ``tip``, in fractions of the axes, that says which way is better."""
    return axes.annotate(
        "better", tip, xytext=tail, xycoords="axes fraction", textcoords="axes fraction", ha="center", va="center",
        fontsize="small", color="0.3", arrowprops={"arrowstyle": "->", "color": "0.3"},
    )  # fmt: skip


def note_left_out(figure: Any, names: Sequence[str]) -> None:
    """Say below the axes which rows that were measured are not drawn."""
    if names:
        figure.supxlabel("not drawn: " + "; ".join(names), fontsize="x-small", wrap=True)


def save(figure: Any, path: Path, description: str) -> None:
    """Write a figure of matplotlib as PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Description": description})
    write_whole(path, content.getvalue())
