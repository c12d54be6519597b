"""What a decode step costs the host: the call of the compiled model while the GPU has nothing to do."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import Cache, DynamicCache, StaticCache

from spectral_compile.backend import reset
from spectral_compile.bench.generation import SPECTRAL, matched_sites, prepare, random_prompt, recordings, static_config
from spectral_compile.bench.measure import GEOMETRIES, Column, Geometry, Measurement, Row, Settings, build, fixed, table, wait
from spectral_compile.outputs import cache_argument

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


@torch.no_grad()
def host(geometry: Geometry, settings: Settings, cached: int, variant: str, options: dict[str, Any]) -> Row:
    """Decode steps as ``generate`` makes them, each begun when the device is idle and timed until the call returns."""
    reset()
    before = recordings(settings.device)
    model = build(geometry, settings)
    total = cached + WARM_UP + TIMED
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

    model(**inputs(cached, None), return_dict=True)
    seconds = []
    for length in range(cached + 1, total + 1):
        step = inputs(length, 1)
        wait(settings.device)
        started = time.perf_counter()
        forward(**step, return_dict=True)
        seconds.append(time.perf_counter() - started)
    if variant == SPECTRAL:
        matched_sites(cache)
    timed = seconds[WARM_UP:]
    spread = {"least_ms": 1e3 * min(timed), "slowest_ms": 1e3 * max(timed)}
    return {"milliseconds": 1e3 * median(timed), **spread, "recordings": recordings(settings.device) - before}


def derive(rows: list[Row]) -> None:
    """Nothing: the figures speak for themselves."""


def show(rows: list[Row]) -> Table:
    labels = [Column("geometry", "geometry"), Column("cached", "prompt"), Column("variant", "variant")]
    figures = [
        Column("milliseconds", "median ms", fixed(3)),
        Column("least_ms", "least ms", fixed(3)),
        Column("slowest_ms", "slowest ms", fixed(3)),
        Column("recordings", "recordings"),
    ]
    caption = f"Of {TIMED} steps after {WARM_UP}, each a call of the compiled model on an idle device; not waited for."
    return table("Host time of a decode step", rows, labels, figures, caption)
