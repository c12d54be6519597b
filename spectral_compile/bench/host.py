"""What a decode step costs the host: the call of the compiled model while the GPU has nothing to do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import Cache, DynamicCache, StaticCache

from spectral_compile.backend import reset
from spectral_compile.bench.generation import SPECTRAL, matched_sites, prepare, random_prompt, recordings, static_config
from spectral_compile.bench.measure import GEOMETRIES, Column, Geometry, Measurement, Row, Settings, build, fixed, table, wait
from spectral_compile.outputs import cache_argument
from spectral_compile.replay import Replay
from spectral_compile.runtime import BoundGraph

DEFAULT = ("smollm2",)
WARM_UP = 8  # steps
TIMED = 50  # steps
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # by title: variant of ``generate``, and options of the backend
    "inductor, static cache, CUDA graphs": ("static", {}),
    "spectral, CUDA graphs": (SPECTRAL, {"strict": False}),
    "inductor, growing cache": ("inductor", {}),
    "spectral, no CUDA graphs": (SPECTRAL, {"strict": False, "cudagraphs": False}),
}


def measurements(settings: Settings) -> list[Measurement]:
    """For each geometry dense and compressed caches with CUDA graphs and without."""
    return [
        Measurement(
            {"geometry": name, "cached": settings.cached[0], "variant": title},
            partial(host, GEOMETRIES[name], settings, settings.cached[0], *how),
        )
        for name in settings.geometries or DEFAULT
        for title, how in VARIANTS.items()
    ]


# What the host does in a step of ours, by column, and the methods that do it. The rest of the call is Dynamo's: guards, and
# the Python around a graph.
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "ours_ms": ((BoundGraph, "__call__"),),
    "unwrapping_ms": ((BoundGraph, "_resume"), (BoundGraph, "_feed")),
    "replay_ms": ((Replay, "__call__"),),
    "wrapping_ms": ((BoundGraph, "_wrap"),),
}


@torch.no_grad()
def host(geometry: Geometry, settings: Settings, cached: int, variant: str, options: dict[str, Any]) -> Row:
    """Decode steps as ``generate`` makes them, each begun when the device is idle and timed until the call returns."""
    reset()
    before = recordings(settings.device)
    model = build(geometry, settings)
    total = cached + WARM_UP + 2 * TIMED
    ids = random_prompt(geometry.vocabulary, settings, total)
    mask = torch.ones_like(ids)
    prepare(model, settings, variant, options)
    cache: Cache = DynamicCache(config=model.config)
    forward: Any = model
    if variant == "static":
        cache = StaticCache(config=model.config, max_cache_len=total)
        forward = model.get_compiled_call(static_config(settings))

    def inputs(length: int, new: int | None) -> dict[str, Any]:
        given = {**cache_argument(cache), "attention_mask": mask[:, :length], "use_cache": True, "logits_to_keep": 1}
        return model.prepare_inputs_for_generation(
            ids[:, :length], next_sequence_length=new, is_first_iteration=new is None, **given
        )

    def timed(first: int, last: int) -> list[float]:
        """Seconds of each step, after which there are so many columns."""
        seconds = []
        for length in range(first, last):
            step = inputs(length, 1)
            wait(settings.device)
            started = time.perf_counter()
            forward(**step, return_dict=True)
            seconds.append(time.perf_counter() - started)
        return seconds

    model(**inputs(cached, None), return_dict=True)
    timed(cached + 1, cached + 1 + WARM_UP)
    steps = timed(cached + 1 + WARM_UP, total + 1 - TIMED)
    row: Row = {"milliseconds": 1e3 * median(steps), "least_ms": 1e3 * min(steps), "slowest_ms": 1e3 * max(steps)}
    if variant == SPECTRAL:
        with watched() as spent:
            whole = sum(timed(total + 1 - TIMED, total + 1))
        row |= {name: 1e3 * seconds / TIMED for name, seconds in spent.items()}
        row["guards_ms"] = 1e3 * whole / TIMED - row["ours_ms"]
        matched_sites(cache)
    return row | {"recordings": recordings(settings.device) - before}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds that are spent within it in each of ``PARTS``."""
    spent: dict[str, float] = defaultdict(float)
    methods = [(part, of, name, getattr(of, name)) for part, all_of in PARTS.items() for of, name in all_of]

    def timing(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*given)
            finally:
                spent[part] += time.perf_counter() - started

        return run

    for part, of, name, method in methods:
        setattr(of, name, timing(part, method))
    try:
        yield spent
    finally:
        for _, of, name, method in methods:
            setattr(of, name, method)


def derive(rows: list[Row]) -> None:
    """Nothing: the figures speak for themselves."""


def show(rows: list[Row]) -> Table:
    labels = [Column("geometry", "geometry"), Column("cached", "prompt"), Column("variant", "variant")]
    figures = [
        Column("milliseconds", "median ms", fixed(3)),
        Column("least_ms", "least ms", fixed(3)),
        Column("slowest_ms", "slowest ms", fixed(3)),
        Column("guards_ms", "Dynamo", fixed(3)),
        Column("unwrapping_ms", "unwrapping", fixed(3)),
        Column("replay_ms", "replay", fixed(3)),
        Column("wrapping_ms", "wrapping", fixed(3)),
        Column("ours_ms", "ours in all", fixed(3)),
        Column("recordings", "recordings"),
    ]
    caption = (
        f"Of {TIMED} steps after {WARM_UP}, each a call of the compiled model on an idle device; not waited for."
        f" Parts: mean of {TIMED} more."
    )
    return table("Host time of a decode step", rows, labels, figures, caption)
