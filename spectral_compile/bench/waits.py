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
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from spectral_compile.ahead import run_ahead
from spectral_compile.backend import reset
from spectral_compile.bench.generation import SPECTRAL, Run, dense_beside, matched_sites, prepare, random_prompt
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
CALLS = (2, 7)  # to a median, at least and at most
SPENT = 5.0  # seconds of calls to a median


def measurements(settings: Settings) -> list[Measurement]:
    """For each geometry and variant each prompt, of one model that is compiled once."""
    return [
        Measurement(
            {"geometry": name, "variant": variant, "cached": cached},
            partial(waits, compiled, settings, cached, variant),
            leaves=cached != settings.cached[-1],
        )
        for name in settings.geometries or DEFAULT
        for variant in settings.variants
        for compiled in [Compiled(GEOMETRIES[name], settings, variant)]
        for cached in settings.cached
    ]


class Compiled:
    """A model with random weights that is built and compiled when it is first asked for."""

    def __init__(self, geometry: Geometry, settings: Settings, variant: str) -> None:
        self.geometry, self.settings, self.variant = geometry, settings, variant
        self.made: tuple[PreTrainedModel, dict[str, Any]] | None = None

    def get(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model, and what ``generate`` must be told."""
        if self.made is None:
            reset()
            model = build(self.geometry, self.settings)
            self.made = model, prepare(model, self.settings, self.variant, {})
        return self.made

    def done(self) -> None:
        """Free its weights."""
        self.made = None


def waits(compiled: Compiled, settings: Settings, cached: int, variant: str) -> Row:
    """Times of ``generate`` once all is compiled, and how long the GPU was busy meanwhile."""
    model, how = compiled.get()
    try:
        return _waits(model, how, settings, cached, variant)
    finally:
        if cached == settings.cached[-1]:
            compiled.done()


def _waits(model: PreTrainedModel, how: dict[str, Any], settings: Settings, cached: int, variant: str) -> Row:
    prompt = random_prompt(model.config.vocab_size, settings, cached)
    for _ in range(2):
        began = Run.of(model, prompt, 4, how)
    calls = min(max(int(SPENT / began.first), CALLS[0]), CALLS[1])
    firsts, seconds = zip(*(_two_tokens(model, prompt, how) for _ in range(calls)), strict=True)
    of_first, of_all = (_busy(model, prompt, count, how) for count in (1, 1 + settings.new_tokens))
    row = {
        "first_ms": 1e3 * median(firsts),
        "second_ms": 1e3 * median(seconds),
        "first_busy_ms": of_first[0],
        "first_kernels": of_first[1],
        "step_ms": _step(model, prompt, settings.new_tokens, how, calls),
        "step_busy_ms": None if of_first[0] is None else (of_all[0] - of_first[0]) / settings.new_tokens,
    }
    if variant == SPECTRAL:
        row["ahead_ms"] = _step(model, prompt, settings.new_tokens, {**how, "custom_generate": run_ahead}, calls)
        row["sites"] = matched_sites(began.cache)
    return row


def _two_tokens(model: PreTrainedModel, prompt: torch.Tensor, how: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token of a text and to the second, before which a short prompt's layers are stored."""
    text = Run.of(model, prompt, 2, how)
    return text.first, text.first + text.steps[0]


class Marks(StoppingCriteria):
    """When the device was done with the first and with the last token that it was asked about; it never stops a text.

    On a GPU nothing waits: an event is recorded after each token.
    """

    def __init__(self, prompt: torch.Tensor) -> None:
        self.on_gpu = prompt.device.type == "cuda"
        self.marks: list[Any] = []
        self.going = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        return self.going

    def milliseconds(self) -> float:
        """Of a step, mean over all but the first."""
        first, last, steps = self.marks[0], self.marks[-1], len(self.marks) - 1
        if self.on_gpu:
            torch.cuda.synchronize()
            return first.elapsed_time(last) / steps
        return 1e3 * (last - first) / steps


def _step(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, how: dict[str, Any], calls: int) -> float:
    """Milliseconds of a step after the first token, where nothing asks for each: the least of a few texts."""
    texts = [Marks(prompt) for _ in range(1 + min(calls, 3))]  # in the first one steps are recorded as CUDA graphs
    for marks in texts:
        _generate(model, prompt, 1 + new_tokens, {**how, "stopping_criteria": StoppingCriteriaList([marks])})
    return min(marks.milliseconds() for marks in texts[1:])


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
        dense = [other["first_ms"] for other in dense_beside(row, rows)]
        row["first_over_dense"] = quotient(row["first_ms"], min(dense, default=None))
        row["step_over_busy"] = quotient(min(row["step_ms"], row["ahead_ms"]), row["step_busy_ms"])


def show(rows: list[Row]) -> Table:
    labels = [Column("geometry", "geometry"), Column("variant", "variant"), Column("cached", "prompt")]
    figures = [
        Column("first_ms", "first token, ms", fixed(2)),
        Column("first_over_dense", "over dense", times),
        Column("second_ms", "second token, ms", fixed(2)),
        Column("first_busy_ms", "GPU busy", fixed(2)),
        Column("first_kernels", "kernels"),
        Column("step_ms", "step, ms", fixed(3)),
        Column("ahead_ms", "by run_ahead", fixed(3)),
        Column("step_busy_ms", "GPU busy", fixed(3)),
        Column("step_over_busy", "step over busy", times),
    ]
    caption = f"First and second token: medians of {CALLS[0]} to {CALLS[1]} calls; the GPU is watched in calls of their own."
    return table("What is waited for, greedy, random weights, batch 1", rows, labels, figures, caption)
