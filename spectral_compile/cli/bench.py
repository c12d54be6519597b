"""``spectral-compile bench``: the run of all parts, and where their figures go."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table
from typer import Option

from spectral_compile.bench import attention, encode, generation, host, second, waits
from spectral_compile.bench.measure import GEOMETRIES, Measurement, Row, Settings, tidy
from spectral_compile.bench.plot import draw
from spectral_compile.cli.console import need_matplotlib, output, phases
from spectral_compile.cli.options import count, parse_pairs
from spectral_compile.codec import PRESETS
from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Mistake, mistakes
from spectral_compile.evaluation.contenders import preset_options, split
from spectral_compile.files import check_writable, write_whole
from spectral_compile.models import device_of


class Part(NamedTuple):
    """What one part measures, what follows from its rows, and how they are shown."""

    measurements: Callable[[Settings], list[Measurement]]
    derive: Callable[[list[Row]], None]
    show: Callable[[list[Row]], Table]


PARTS = {
    "attention": Part(attention.measurements, attention.derive, attention.show),
    "encode": Part(encode.measurements, encode.derive, encode.show),
    "generate": Part(generation.measurements, generation.derive, generation.show),
    "steady": Part(generation.steady_measurements, generation.steady_derive, generation.steady_show),
    "host": Part(host.measurements, host.derive, host.show),
    "waits": Part(waits.measurements, waits.derive, waits.show),
    "second": Part(second.measurements, second.derive, second.show),
}


class Sizes(NamedTuple):
    """What is measured where nothing else was asked for; ``geometry`` None is each part's own choice."""

    geometry: str | None
    pairs: str
    cached: str
    new_tokens: int
    steady_tokens: int
    inner: str


ON_A_GPU = Sizes(None, "1x4096,1x8192,1x32768,1x131072,8x16384", "4096,32768,131072", 64, 2000, "inductor")
ON_A_CPU = Sizes("tiny", "1x2048", "2048", 8, 32, "eager")  # seconds a part; it says little about a GPU


def by_device(name: str) -> str:
    """The defaults of an option, for its help."""
    return f"{getattr(ON_A_GPU, name)}; on a CPU {getattr(ON_A_CPU, name)}"


def bench(
    parts: Annotated[str, Option(help="What to measure, by comma")] = ",".join(PARTS),
    geometry: Annotated[
        str | None,
        Option(
            help=f"Sizes, by comma: {', '.join(GEOMETRIES)}",
            show_default="llama-3-8b; steady and host: smollm2; waits and second: qwen3-0.6b; tiny on a CPU",
        ),
    ] = None,
    pairs: Annotated[
        str | None, Option(help="attention: batch x cached tokens, by comma", show_default=by_device("pairs"))
    ] = None,
    presets: Annotated[
        str, Option(help="Codecs, by comma, named as for eval; the parts with a whole model take the first")
    ] = "balanced,seed",
    layers: Annotated[int | None, Option(min=1, help="Of whole models", show_default="all")] = None,
    columns: Annotated[int, Option(min=1, help="attention: of a step, such as 4 in speculative decoding")] = 1,
    cached: Annotated[
        str | None,
        Option(help="Lengths of prompts, by comma; steady, host and second take the first", show_default=by_device("cached")),
    ] = None,
    variants: Annotated[str, Option(help="generate, waits and second: by comma")] = ",".join(generation.VARIANTS),
    chunk: Annotated[
        int | None, Option(min=1, help="generate: tokens of a prompt at a time (prefill_chunk_size)", show_default="all")
    ] = None,
    new_tokens: Annotated[
        int | None, Option(min=2, help="generate and waits: tokens to generate", show_default=by_device("new_tokens"))
    ] = None,
    steady_tokens: Annotated[
        int | None, Option(min=2, help="steady: tokens to generate", show_default=by_device("steady_tokens"))
    ] = None,
    minutes: Annotated[float | None, Option(help="Begin no measurement after that many minutes", show_default="no end")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and dense caches")] = "bfloat16",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
    inner: Annotated[
        str | None, Option(help="Compiler of graphs: inductor, aot_eager or eager", show_default=by_device("inner"))
    ] = None,
    plan: Annotated[list[str] | None, Option(help="key=value, of the kernels' AttendPlan, on a GPU; repeatable")] = None,
    seed: Annotated[int, Option(help="Of weights, keys, values and prompts")] = 0,
    json_: Annotated[
        Path | None, Option("--json", callback=check_writable, help="File to write every figure to, after each measurement")
    ] = None,
    plot: Annotated[Path | None, Option(callback=check_writable, help="PNG file to draw the figures in")] = None,
) -> None:
    """Measure the time and memory of the compressed cache beside dense ones, with random weights.

    A measurement that fails shows its error in the table, and the others go on.
    """
    screen = Console(stderr=True)
    chosen = by_comma("part", parts, PARTS)
    where = device_of(device)
    override_plan(parse_pairs(plan or [], "--plan"), where)
    asked: dict[str, Any] = {"geometry": geometry, "pairs": pairs, "cached": cached}
    asked |= {"new_tokens": new_tokens, "steady_tokens": steady_tokens, "inner": inner}
    usual = ON_A_CPU if where.type == "cpu" else ON_A_GPU
    sizes = usual._replace(**{name: value for name, value in asked.items() if value is not None})
    settings = Settings(
        geometries=tuple(by_comma("geometry", sizes.geometry, GEOMETRIES)) if sizes.geometry else None,
        pairs=tuple(pair(text) for text in sizes.pairs.split(",")),
        presets=tuple(by_comma("preset", presets, PRESETS, others=True)),
        cached=tuple(count(text) for text in sizes.cached.split(",")),
        variants=tuple(by_comma("variant", variants, generation.VARIANTS)),
        chunk=chunk,
        new_tokens=sizes.new_tokens,
        steady_tokens=sizes.steady_tokens,
        dtype=getattr(torch, dtype),
        device=where,
        inner=sizes.inner,
        seed=seed,
        columns=columns,
        layers=layers,
    )
    with mistakes(ValueError):
        for preset in settings.presets:
            SpectralConfig.parse({**preset_options(preset), "inner": sizes.inner})
    if plot:
        need_matplotlib()
    transformers.logging.set_verbosity_error()

    facts = header(settings)
    out = output()
    small = [f"--{name.replace('_', '-')} {value}" for name, value in usual._asdict().items() if asked[name] is None]
    if usual is ON_A_CPU and small:
        screen.print(
            f"On a CPU the defaults are small: {', '.join(small)}; give these options to measure more.", soft_wrap=True
        )
    out.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False, soft_wrap=True)
    ends = time.monotonic() + 60 * minutes if minutes else float("inf")
    measured: dict[str, list[Row]] = {}

    def write() -> None:
        if json_:
            write_whole(json_, json.dumps({"header": facts, "parts": measured}, indent=1).encode())

    for name in chosen:
        part = PARTS[name]
        rows = measured[name] = []
        planned = part.measurements(settings)
        tidy()
        with phases(screen, BarColumn(), MofNCompleteColumn()) as display:
            task = display.add_task(name, total=len(planned))
            for measurement in planned:
                what = f"{name}: {', '.join(str(label) for label in measurement.labels.values())}"
                display.update(task, description=what)
                late = {**measurement.labels, "error": "not begun: the time was up", "seconds": 0.0}
                row = late if time.monotonic() > ends else measurement.row()
                rows.append(row)
                write()
                screen.print(f"{row['seconds']:7.1f} s  {what}  {row['error'] or ''}", markup=False, soft_wrap=True)
                display.advance(task)
        part.derive(rows)
        write()
        out.print(part.show(rows))
    if plot:
        draw(measured, facts, plot)


def override_plan(values: dict[str, Any], device: torch.device) -> None:
    """Plan attention with these values of ``AttendPlan``; ``Mistake`` where there is none, or no kernel to plan."""
    if not values:
        return
    if device.type == "cpu":
        raise Mistake("--plan is of the kernels of a GPU: leave it out, or give --device cuda")
    from spectral_compile.kernels.attend.plan import override  # Triton is there only where a GPU is

    override(values)


def by_comma(what: str, given: str, known: Iterable[str], others: bool = False) -> list[str]:
    """The names in ``given``, each of which must be ``known`` unless there may be ``others``."""
    names = split(given)
    for name in names:
        if not others and name not in known:
            raise Mistake(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    if not names:
        raise Mistake(f"name at least one {what}: choose from {', '.join(known)}")
    return names


def pair(text: str) -> tuple[int, int]:
    """Batch and cached tokens, out of such as 8x16384."""
    batch, _, cached = text.partition("x")
    try:
        return count(batch), count(cached)
    except Mistake:
        raise Mistake(f"{text!r} is no batch and count of tokens, such as 8x16384") from None


def header(settings: Settings) -> dict[str, str]:
    """What ran where."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else str(settings.device)
    versions = {"torch": torch.__version__, "triton": triton, "transformers": transformers.__version__}
    return {"device": name, **versions, "dtype": str(settings.dtype), "command": shlex.join(sys.argv)}
