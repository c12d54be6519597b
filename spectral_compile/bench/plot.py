"""``bench --plot``: a panel for each part, compressed caches coloured and dense ones grey."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from spectral_compile.bench import attention, encode
from spectral_compile.bench.generation import DROPPED, SPECTRAL
from spectral_compile.bench.measure import SHOWN, Row
from spectral_compile.evaluation.plot import GREY, OURS, WITH_PROFILE, better, note_left_out, plain, save

_COLOURS = (OURS, WITH_PROFILE, "#009E73", "#CC79A7", "#E69F00")
_LABELS = ("geometry", "batch", "cached", "new_tokens", "method", "what", "variant")  # of a row, as opposed to its figures


def draw(measured: dict[str, list[Row]], facts: dict[str, str], path: Path) -> None:
    """Write ``picture`` as PNG."""
    save(picture(measured, facts), path, facts["command"])


def picture(measured: dict[str, list[Row]], facts: dict[str, str]) -> Any:
    """A figure of matplotlib with a panel for each part of ``measured``, and below the rows that are not drawn, and why."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(measured), 5.5), layout="constrained")
    left_out = []
    for axes, (part, rows) in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True):
        PANELS[part](axes, [row for row in rows if _obstacle(row) is None])
        left_out += [f"{part}: {_labels(row)} ({why})" for row in rows if (why := _obstacle(row)) is not None]
        axes.grid(which="major", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}", fontsize="small")
    note_left_out(figure, left_out)
    return figure


def _obstacle(row: Row) -> str | None:
    """Why a row has no place in its panel, if so."""
    if row["error"]:
        return row["error"][:SHOWN]
    if row.get("method") == attention.COPY:
        return "a bandwidth"
    if "what" in row and row["what"] != encode.DENSE and row.get("percent") is None:
        return "without a dense forward to compare with"
    return None


def _labels(row: Row) -> str:
    return ", ".join(str(row[label]) for label in _LABELS if label in row)


def _attention(axes: Any, rows: list[Row]) -> None:
    """Microseconds by cached tokens, a line for each batch and method."""

    def name(row: Row) -> str:
        return f"{row['geometry']}, {row['method']}" + ("" if row["batch"] == 1 else f", batch {row['batch']}")

    axes.set(title="decode attention of one layer", ylabel="microseconds", yscale="log")
    _by_tokens(axes, rows, name, "microseconds", lambda row: row["method"] in (attention.GQA, attention.REPEATED))
    plain(axes.yaxis)


def _encode(axes: Any, rows: list[Row]) -> None:
    """Percent of the dense forward by tokens; that one is 100 itself."""
    axes.set(title="storing a prompt", ylabel="% of the layer's dense forward")
    rows = [{"percent": 100.0, **row} for row in rows]
    _by_tokens(axes, rows, lambda row: f"{row['geometry']}, {row['what']}", "percent", lambda row: row["what"] == encode.DENSE)
    axes.set_ylim(0, None)


def _generate(axes: Any, rows: list[Row]) -> None:
    """Milliseconds a token by the length of the prompt."""
    axes.set(title="generate, batch 1", ylabel="median ms a token")
    name, dense = lambda row: f"{row['geometry']}, {row['variant']}", lambda row: row["variant"] != SPECTRAL
    _by_tokens(axes, rows, name, "step_median_ms", dense)
    axes.set_ylim(0, None)


def _steady(axes: Any, rows: list[Row]) -> None:
    """Milliseconds of each step."""
    colours = cycle(_COLOURS)
    for row in rows:
        colour = next(colours) if row["variant"].startswith(SPECTRAL) else GREY
        axes.plot(row["steps_ms"][DROPPED:], linewidth=0.6, color=colour, label=f"{row['geometry']}, {row['variant']}")
    axes.set(title="many new tokens", xlabel="new token", ylabel="ms", yscale="log")
    plain(axes.yaxis)
    better(axes, (0.05, 0.05), (0.05, 0.2))


def _host(axes: Any, rows: list[Row]) -> None:
    """Milliseconds by variant."""
    colours = [OURS if row["variant"].startswith(SPECTRAL) else GREY for row in rows]
    names, times = [f"{row['geometry']}, {row['variant']}" for row in rows], [row["milliseconds"] for row in rows]
    axes.barh(names, times, color=colours)
    axes.set(title="host time of a decode step", xlabel="ms, median", xlim=(0, 1.3 * max(times, default=1.0)))
    better(axes, (0.82, 0.5), (0.95, 0.5))


def _waits(axes: Any, rows: list[Row]) -> None:
    """Milliseconds to the first token by variant and prompt."""
    _by_variant(axes, rows, "first_ms", "first token", "ms, median")


def _second(axes: Any, rows: list[Row]) -> None:
    """Seconds to the first token of a second process by variant."""
    _by_variant(axes, rows, "second_first_token_s", "first token of a second process", "s")


def _by_variant(axes: Any, rows: list[Row], figure: str, title: str, unit: str) -> None:
    colours = [OURS if row["variant"] == SPECTRAL else GREY for row in rows]
    names = [f"{row['geometry']}, {tokens(row['cached'])}, {row['variant']}" for row in rows]
    axes.barh(names, [row[figure] for row in rows], color=colours)
    axes.set(title=title, xlabel=unit, xlim=(0, 1.3 * max((row[figure] for row in rows), default=1.0)))
    better(axes, (0.82, 0.5), (0.95, 0.5))


PANELS: dict[str, Callable[[Any, list[Row]], None]] = {
    "attention": _attention,
    "encode": _encode,
    "generate": _generate,
    "steady": _steady,
    "host": _host,
    "waits": _waits,
    "second": _second,
}


def _by_tokens(axes: Any, rows: list[Row], name: Callable[[Row], str], figure: str, dense: Callable[[Row], bool]) -> None:
    """A figure of rows over their numbers of cached tokens, a line for each name; less is better."""
    lines: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((dense(row), name(row)), []).append(row)
    colours, looks = cycle(_COLOURS), cycle(zip(("-", "--", ":", "-."), "s^vD", strict=True))
    for (is_dense, label), some in sorted(lines.items(), key=lambda line: line[0][0]):
        some.sort(key=lambda row: row["cached"])
        x, y = [row["cached"] for row in some], [row[figure] for row in some]
        if is_dense:
            line, marker = next(looks)
            axes.plot(x, y, color=GREY, linestyle=line, marker=marker, label=label, zorder=1)
        else:
            axes.plot(x, y, color=next(colours), marker="o", label=label)
    axes.set(xlabel="tokens in the cache", xscale="log")
    plain(axes.xaxis, tokens, sorted({row["cached"] for row in rows}))
    better(axes, (0.05, 0.05), (0.05, 0.2))


def tokens(count: float) -> str:
    """A number of tokens as one reads it: 256, 1300, 4K, 128K."""
    return f"{count / 1024:g}K" if count >= 4096 and count % 1024 == 0 else f"{count:g}"
