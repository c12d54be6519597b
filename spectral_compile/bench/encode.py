"""What a prefill pays for compression: storing a prompt in one layer, beside that layer's dense forward."""

from __future__ import annotations

from functools import partial

import torch
from rich.table import Table

from spectral_compile.bench.measure import (
    GEOMETRIES,
    Column,
    Geometry,
    Measurement,
    Row,
    Settings,
    build,
    clock,
    fixed,
    quotient,
    table,
)
from spectral_compile.bench.store import Layer, draw

DEFAULT = ("llama-3-8b",)
DENSE = "dense forward"


def measurements(settings: Settings) -> list[Measurement]:
    """For each geometry and length the layer, and then each preset."""
    made = []
    for name in settings.geometries or DEFAULT:
        for cached in settings.cached:
            labels, sizes = {"geometry": name, "cached": cached}, (GEOMETRIES[name], settings, cached)
            made.append(Measurement({**labels, "what": DENSE}, partial(dense, *sizes)))
            made += [Measurement({**labels, "what": preset}, partial(encode, *sizes, preset)) for preset in settings.presets]
    return made


@torch.no_grad()
def dense(geometry: Geometry, settings: Settings, cached: int) -> Row:
    """The forward of one decoder layer on [1, cached, hidden], compiled by the inner compiler."""
    decoder = build(geometry, settings, layers=1).model
    layer = torch.compile(decoder.layers[0], backend=settings.inner)
    shape = (1, cached, geometry.hidden)
    hidden = torch.randn(shape, generator=settings.generator(), device=settings.device).to(settings.dtype)
    angles = decoder.rotary_emb(hidden, torch.arange(cached, device=settings.device)[None])
    return {"milliseconds": 1e3 * clock(lambda: layer(hidden, position_embeddings=angles), settings.device).seconds}


def encode(geometry: Geometry, settings: Settings, cached: int, preset: str) -> Row:
    """The ``append_`` of one layer's prompt, bases included."""
    tokens = draw(geometry, settings, 1, cached).columns(0, cached)
    layer = Layer(geometry, settings, preset, 1, cached)
    layer.advance(tokens["key"])
    return {"milliseconds": 1e3 * clock(lambda: layer.append(tokens), settings.device, layer.forget_basis).seconds}


def derive(rows: list[Row]) -> None:
    """Percent of the layer's dense forward."""
    found = {(row["geometry"], row["cached"]): row.get("milliseconds") for row in rows if row["what"] == DENSE}
    for row in rows:
        if row["what"] != DENSE and not row["error"]:
            row["percent"] = quotient(100 * row["milliseconds"], found[row["geometry"], row["cached"]])


def show(rows: list[Row]) -> Table:
    labels = [Column("geometry", "geometry"), Column("cached", "tokens"), Column("what", "what")]
    figures = [Column("milliseconds", "ms", fixed(3)), Column("percent", "of the dense forward", lambda x: f"{x:.1f} %")]
    return table("Prefill of one layer: its dense forward, and storing its keys and values", rows, labels, figures)
