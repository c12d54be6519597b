"""``model.generate`` with random weights, beside dense caches: over prompts of several lengths, and over many new tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from transformers import Cache, CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from spectral_compile.backend import reset
from spectral_compile.backend import spectral as spectral_backend
from spectral_compile.bench.measure import (
    GEOMETRIES,
    GIB,
    Column,
    Measurement,
    Row,
    Settings,
    build,
    compile_seconds,
    fixed,
    quotient,
    table,
    times,
    wait,
)
from spectral_compile.evaluation.contenders import preset_options, require_matched
from spectral_compile.evaluation.size import weigh
from spectral_compile.outputs import cache_of
from spectral_compile.report import recordings as recorded_steps
from spectral_compile.report import reports
from spectral_compile.tensor import SpectralTensor

SPECTRAL = "spectral"
VARIANTS = ("eager", "inductor", "static", SPECTRAL)
DEFAULT = ("llama-3-8b",)
STEADY_DEFAULT = ("smollm2",)
STEADY: dict[str, tuple[str, dict[str, Any]]] = {  # by title: variant, and options of the backend
    "spectral": (SPECTRAL, {}),
    "dense, static cache": ("static", {}),
    "spectral, no CUDA graphs": (SPECTRAL, {"cudagraphs": False}),
}
DROPPED = 8  # new tokens, the first ones, that no statistic of steps counts
SLOW = 1.5  # times the median
LESS_IS_BETTER = ("first_token_s", "step_median_ms", "step_slowest_ms", "peak_bytes", "cache_bytes")
MORE_IS_BETTER = ("tokens_per_s", "tokens_per_s_mean")


def measurements(settings: Settings) -> list[Measurement]:
    """For each geometry and prompt each variant."""
    return [
        Measurement(
            {"geometry": name, "cached": cached, "variant": variant},
            partial(generate, partial(build, GEOMETRIES[name], settings), settings, cached, settings.new_tokens, variant),
        )
        for name in settings.geometries or DEFAULT
        for cached in settings.cached
        for variant in settings.variants
    ]


def steady_measurements(settings: Settings) -> list[Measurement]:
    """For each geometry many new tokens from the compressed cache, with CUDA graphs and without, and from a dense one."""
    cached, new_tokens = settings.cached[0], settings.steady_tokens
    return [
        Measurement(
            {"geometry": name, "cached": cached, "new_tokens": new_tokens, "variant": title},
            partial(generate, partial(build, GEOMETRIES[name], settings), settings, cached, new_tokens, *how, keep=True),
        )
        for name in settings.geometries or STEADY_DEFAULT
        for title, how in STEADY.items()
    ]


class TokenClock(StoppingCriteria):
    """When each new token was there, in seconds; it never stops a text."""

    def __init__(self, prompt: torch.Tensor) -> None:
        self.device = prompt.device
        self.moments: list[float] = []
        self.done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        wait(self.device)
        self.moments.append(time.perf_counter())
        return self.done


@dataclass(frozen=True)
class Run:
    """One text: seconds to its first token and of each step after it, the new tokens, and the cache that is left."""

    first: float
    steps: list[float]
    tokens: list[int]
    cache: Cache

    @classmethod
    def of(cls, model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, how: dict[str, Any]) -> Run:
        clock = TokenClock(prompt)
        wait(prompt.device)
        started = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            **how,
        )
        steps = [b - a for a, b in pairwise(clock.moments)]
        return cls(clock.moments[0] - started, steps, out.sequences[0, prompt.shape[1] :].tolist(), cache_of(out))


def prepare(model: PreTrainedModel, settings: Settings, variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """Compile ``model`` as ``variant`` asks, the spectral backend with more ``options``; what ``generate`` must be told.

    Any name but ``inductor`` and ``spectral`` leaves the model as it is; with ``static``, ``generate`` itself compiles the
    decode step.
    """
    if variant == "static":
        return {"cache_implementation": "static", "compile_config": static_config(settings)}
    if variant == "inductor":
        model.compile(backend=settings.inner)
    elif variant == SPECTRAL:
        given = {**preset_options(settings.presets[0]), "strict": True, "inner": settings.inner, **options}
        model.compile(backend=spectral_backend, options=given)
    return {}


def static_config(settings: Settings) -> CompileConfig:
    """How ``generate`` compiles the decode step of a static cache: by Inductor with CUDA graphs."""
    return CompileConfig(backend=settings.inner, mode="reduce-overhead" if settings.inner == "inductor" else None)


def generate(
    make: Callable[[], PreTrainedModel],
    settings: Settings,
    cached: int,
    new_tokens: int,
    variant: str,
    options: dict[str, Any] | None = None,
    keep: bool = False,
) -> Row:
    """Generate twice from ``cached`` random tokens with what ``make`` gives: compile the first time, measure the second.

    Memory counts what is beyond weights. With ``keep`` the row has the new tokens and the milliseconds of all steps.
    """
    reset()
    counters.clear()
    model = make()
    prompt = random_prompt(model.config.vocab_size, settings, cached)
    how = prepare(model, settings, variant, options or {})
    if settings.chunk:
        how["prefill_chunk_size"] = settings.chunk

    compiled, recorded, started = [compile_seconds()], [recordings(settings.device)], time.perf_counter()
    Run.of(model, prompt, new_tokens, how)
    first_call = time.perf_counter() - started
    compiled.append(compile_seconds())
    recorded.append(recordings(settings.device))

    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(settings.device)
    run = Run.of(model, prompt, new_tokens, how)
    compiled.append(compile_seconds())
    recorded.append(recordings(settings.device))

    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    steps = settled(run.steps)
    row = {
        "first_token_s": run.first,
        "first_call_s": first_call,
        "compile_s": [b - a for a, b in pairwise(compiled)],
        "step_median_ms": 1e3 * median(steps),
        "step_p99_ms": 1e3 * torch.tensor(steps).quantile(0.99).item(),
        "step_slowest_ms": 1e3 * max(steps),
        "tokens_per_s": 1 / median(steps),
        "tokens_per_s_mean": len(steps) / sum(steps),
        "peak_bytes": torch.cuda.max_memory_allocated(settings.device) - weights if on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(settings.device) - weights if on_gpu else None,
        "cache_bytes": weigh(run.cache).stored_bytes if isinstance(run.cache, Cache) else None,
        "recordings": [b - a for a, b in pairwise(recorded)],
    }
    if variant == SPECTRAL:
        row |= {"preset": settings.presets[0], "sites": matched_sites(run.cache, chunked=cached > (settings.chunk or cached))}
    if keep:
        row |= {"tokens": run.tokens, "steps_ms": [round(1e3 * step, 4) for step in run.steps]}
    return row


def settled(steps: list[float]) -> list[float]:
    """Without the first steps."""
    return steps[min(DROPPED, (len(steps) + 1) // 2) - 1 :]


def random_prompt(vocabulary: int, settings: Settings, count: int) -> torch.Tensor:
    """Random tokens, int64 [1, count]."""
    return torch.randint(1, vocabulary, (1, count), generator=settings.generator(), device=settings.device)


def matched_sites(cache: Cache, chunked: bool = False) -> dict[str, list[int]]:
    """Matched sites and all sites of each graph; RuntimeError unless all matched in each and the cache is compressed."""
    require_matched({"prefill", "decode"} | ({"extend"} if chunked else set()))
    if not all(isinstance(layer.keys, SpectralTensor) for layer in cache.layers):
        raise RuntimeError("the cache is dense, so its figures would be those of another cache")
    return {report.kind: [report.matched, report.sites] for report in reports()}


def recordings(device: torch.device) -> int:
    """How many CUDA graphs were recorded: of Inductor's those that are alive, of ours all since the last ``reset()``."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    manager = cudagraph_trees.get_manager(index, create_if_none_exists=False)
    nodes, count = list(manager.get_roots()) if manager else [], recorded_steps()
    while nodes:
        count += 1
        nodes += [child for children in nodes.pop().children.values() for child in children]
    return count


def dense_beside(row: Row, rows: list[Row]) -> list[Row]:
    """The rows of dense variants with the geometry and the prompt of ``row``, but for those that failed."""
    dense = (other for other in rows if other["variant"] != SPECTRAL and not other["error"])
    return [other for other in dense if (other["geometry"], other["cached"]) == (row["geometry"], row["cached"])]


def derive(rows: list[Row]) -> None:
    """How many times better each spectral row is than the best dense one, figure by figure."""
    for row in rows:
        if row["variant"] != SPECTRAL or row["error"] or not (rivals := dense_beside(row, rows)):
            continue
        best = {name: min((r[name] for r in rivals if r[name] is not None), default=None) for name in LESS_IS_BETTER}
        most = {name: max(r[name] for r in rivals) for name in MORE_IS_BETTER}
        row["against_best_dense"] = {
            **{name: quotient(best[name], row[name]) for name in LESS_IS_BETTER},
            **{name: quotient(row[name], most[name]) for name in MORE_IS_BETTER},
        }


def steady_derive(rows: list[Row]) -> None:
    """Slowest step over the median, steps that are ``SLOW``, and how many first tokens all compressed rows have in common."""
    first: dict[str, list[int]] = {}
    for row in rows:
        if row["error"]:
            continue
        row["slowest_over_median"] = quotient(row["step_slowest_ms"], row["step_median_ms"])
        row["slow_steps"] = sum(step > SLOW * row["step_median_ms"] for step in settled(row["steps_ms"]))
        if STEADY[row["variant"]][0] == SPECTRAL:
            tokens = first.setdefault(row["geometry"], row["tokens"])
            equal = (a == b for a, b in zip(tokens, row["tokens"], strict=True))
            row["equal_leading"] = sum(takewhile(bool, equal))


STEPS = [
    Column("step_median_ms", "median ms", fixed(3)),
    Column("step_slowest_ms", "slowest ms", fixed(3)),
    Column("tokens_per_s", "tok/s", fixed(1)),
    Column("tokens_per_s_mean", "tok/s, mean", fixed(1)),
]
COUNTS = [
    Column("recordings", "recordings", lambda x: " + ".join(map(str, x))),
    Column("sites", "sites", lambda x: ", ".join(f"{kind} {a}/{b}" for kind, (a, b) in x.items())),
]


def show(rows: list[Row]) -> Table:
    """A row for each variant; after a spectral one how it compares."""
    labels = [Column("geometry", "geometry"), Column("cached", "prompt"), Column("variant", "variant")]
    figures = [
        Column("first_token_s", "first token, s", _either(fixed(3))),
        Column("compile_s", "compile s, both calls", lambda x: " + ".join(map(fixed(1), x))),
        *(Column(column.field, column.header, _either(column.show)) for column in STEPS),
        Column("peak_bytes", "peak GiB", _either(GIB)),
        Column("cache_bytes", "cache GiB", _either(GIB)),
        *COUNTS,
    ]
    lines = []
    for row in rows:
        lines.append(row)
        if ratios := row.get("against_best_dense"):
            shown = {name: None if ratio is None else times(ratio) for name, ratio in ratios.items()}
            lines.append({"geometry": "", "cached": "", "variant": "  against best dense", **shown})
    caption = (
        f"The second call, first {DROPPED} new tokens dropped; peak beyond weights; recordings of CUDA graphs in both calls."
        " Ratios are times better than the best dense variant."
    )
    return table("generate, greedy, random weights, batch 1", lines, labels, figures, caption)


def _either(show: Any) -> Any:
    """Shows figures by ``show``, and text, such as a ratio, as it is."""
    return lambda x: x if isinstance(x, str) else show(x)


def steady_show(rows: list[Row]) -> Table:
    labels = [
        Column("geometry", "geometry"),
        Column("cached", "prompt"),
        Column("new_tokens", "new tokens"),
        Column("variant", "variant"),
    ]
    figures = [
        *STEPS,
        Column("step_p99_ms", "99 % ms", fixed(3)),
        Column("slowest_over_median", "slowest / median", times),
        Column("slow_steps", f"above {SLOW} x"),
        Column("equal_leading", "same tokens"),
        *COUNTS,
    ]
    return table("Many new tokens", rows, labels, figures)
