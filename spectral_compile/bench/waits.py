"""What a user waits for beside what the GPU does: first tokens, and steps of ``generate``'s loop and of ``run_ahead``."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from spectral_compile.ahead import run_ahead
from spectral_compile.backend import reset
from spectral_compile.bench.generation import SPECTRAL, Run, matched_sites, prepare, random_prompt
from spectral_compile.bench.measure import (
    GEOMETRIES,
    Column,
    Geometry,
    Measurement,
    Row,
    Settings,
    build,
    fixed,
    quotient,
    table,
    times,
    wait,
)

DEFAULT = ("qwen3-0.6b",)
VARIANTS = ("inductor", "static", SPECTRAL)
CALLS = 7  # of which the median is shown


def measurements(settings: Settings) -> list[Measurement]:
    """For each geometry and prompt each variant."""
    return [
        Measurement(
            {"geometry": name, "cached": cached, "variant": variant},
            partial(waits, GEOMETRIES[name], settings, cached, variant),
        )
        for name in settings.geometries or DEFAULT
        for cached in settings.cached
        for variant in VARIANTS
    ]


def waits(geometry: Geometry, settings: Settings, cached: int, variant: str) -> Row:
    """Times of ``generate`` once all is compiled, and how long the GPU was busy meanwhile."""
    reset()
    model = build(geometry, settings)
    prompt = random_prompt(geometry.vocabulary, settings, cached)
    how = prepare(model, settings, variant, {})
    for _ in range(2):
        Run.of(model, prompt, 4, how)
    first = median(Run.of(model, prompt, 2, how).first for _ in range(CALLS))
    of_first, of_steps = (_busy(model, prompt, count, how) for count in (1, 1 + settings.new_tokens))
    row = {
        "first_ms": 1e3 * first,
        "first_busy_ms": of_first[0],
        "first_kernels": of_first[1],
        "step_ms": _step(model, prompt, settings, how),
        "step_busy_ms": None if of_first[0] is None else (of_steps[0] - of_first[0]) / settings.new_tokens,
    }
    if variant == SPECTRAL:
        row["ahead_ms"] = _step(model, prompt, settings, {**how, "custom_generate": run_ahead})
        row["sites"] = matched_sites(Run.of(model, prompt, 2, how).cache)
    return row


def _step(model: PreTrainedModel, prompt: torch.Tensor, settings: Settings, how: dict[str, Any]) -> float:
    """Milliseconds of a step: what a text of many new tokens takes longer than one of few, with nothing that asks for each."""

    def seconds(count: int) -> float:
        wait(prompt.device)
        started = time.perf_counter()
        _generate(model, prompt, count, how)
        wait(prompt.device)
        return time.perf_counter() - started

    few, many = 2, 2 + settings.new_tokens
    seconds(many)  # steps are recorded as CUDA graphs
    return 1e3 * median(seconds(many) - seconds(few) for _ in range(3)) / settings.new_tokens


def _busy(model: PreTrainedModel, prompt: torch.Tensor, count: int, how: dict[str, Any]) -> tuple[Any, Any]:
    """Milliseconds in which the GPU runs something of a text of ``count`` new tokens, and how many kernels; None on a CPU."""
    if prompt.device.type != "cuda":
        return None, None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        _generate(model, prompt, count, how)
        wait(prompt.device)
    spans = sorted((e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == DeviceType.CUDA)
    total, last = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total / 1e3, len(spans)


def _generate(model: PreTrainedModel, prompt: torch.Tensor, count: int, how: dict[str, Any]) -> None:
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False, **how)


def derive(rows: list[Row]) -> None:
    """The first token over the fastest dense one, and the faster loop's step over what the GPU does in it."""
    for row in rows:
        if row["error"] or row["variant"] != SPECTRAL:
            continue
        dense = [
            other["first_ms"]
            for other in rows
            if not other["error"] and other["variant"] != SPECTRAL
            if (other["geometry"], other["cached"]) == (row["geometry"], row["cached"])
        ]
        row["first_over_dense"] = quotient(row["first_ms"], min(dense, default=None))
        row["step_over_busy"] = quotient(min(row["step_ms"], row["ahead_ms"]), row["step_busy_ms"])


def show(rows: list[Row]) -> Table:
    labels = [Column("geometry", "geometry"), Column("cached", "prompt"), Column("variant", "variant")]
    figures = [
        Column("first_ms", "first token, ms", fixed(2)),
        Column("first_over_dense", "over dense", times),
        Column("first_busy_ms", "GPU busy", fixed(2)),
        Column("first_kernels", "kernels"),
        Column("step_ms", "step, ms", fixed(3)),
        Column("ahead_ms", "by run_ahead", fixed(3)),
        Column("step_busy_ms", "GPU busy", fixed(3)),
        Column("step_over_busy", "step over busy", times),
    ]
    caption = f"The first token is the median of {CALLS} calls; the GPU is watched in calls of their own."
    return table("What is waited for, greedy, random weights, batch 1", rows, labels, figures, caption)
