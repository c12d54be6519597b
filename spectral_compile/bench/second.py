"""The first minute: how long a process takes to its first token, the first one on a machine, and the second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

from rich.table import Table

from spectral_compile.bench.generation import SPECTRAL, dense_beside
from spectral_compile.bench.measure import Column, Measurement, Row, Settings, fixed, quotient, table, times

DEFAULT = ("qwen3-0.6b",)
NEW_TOKENS = 12  # of which a block is coded, and a step recorded as a CUDA graph
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def measurements(settings: Settings) -> list[Measurement]:
    """For each geometry each variant, with the first length of prompts."""
    return [
        Measurement(
            {"geometry": name, "cached": settings.cached[0], "variant": variant}, partial(processes, name, settings, variant)
        )
        for name in settings.geometries or DEFAULT
        for variant in settings.variants
    ]


def processes(geometry: str, settings: Settings, variant: str) -> Row:
    """Two processes, one after the other, that begin with empty caches of compilers."""
    asked = {
        "geometry": geometry,
        "layers": settings.layers,
        "cached": settings.cached[0],
        "variant": variant,
        "presets": settings.presets,
        "new_tokens": NEW_TOKENS,
        "inner": settings.inner,
        "seed": settings.seed,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": str(settings.device),
    }
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **{name: os.path.join(folder, name) for name in CACHES}}
        for name in ("first", "second"):
            row |= {f"{name}_{what}": seconds for what, seconds in _process(asked, environment).items()}
    return row


def _process(asked: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "spectral_compile.bench.process", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    if "error" in seconds:
        raise RuntimeError(seconds["error"])
    return seconds


def derive(rows: list[Row]) -> None:
    """The second process' first token over that of the fastest dense variant."""
    for row in rows:
        if row["error"] or row["variant"] != SPECTRAL:
            continue
        dense = [other["second_first_token_s"] for other in dense_beside(row, rows)]
        row["over_dense"] = quotient(row["second_first_token_s"], min(dense, default=None))


def show(rows: list[Row]) -> Table:
    labels = [Column("geometry", "geometry"), Column("cached", "prompt"), Column("variant", "variant")]
    figures = [
        Column("first_first_token_s", "first process: first token, s", fixed(1)),
        Column("first_last_token_s", "all tokens", fixed(1)),
        Column("second_model_s", "second process: model, s", fixed(1)),
        Column("second_first_token_s", "first token", fixed(1)),
        Column("second_last_token_s", "all tokens", fixed(1)),
        Column("over_dense", "first token over dense", times),
    ]
    caption = f"Seconds since the process began, imports and random weights included; {NEW_TOKENS} new tokens."
    return table("The first minute", rows, labels, figures, caption)
