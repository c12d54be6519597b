"""Decode attention of one layer: the operation on the compressed cache beside PyTorch's on a dense one."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.models.llama.modeling_llama import repeat_kv

from spectral_compile.bench.measure import (
    GEOMETRIES,
    Column,
    Geometry,
    Measurement,
    Row,
    Settings,
    clock,
    fixed,
    quotient,
    table,
    times,
)
from spectral_compile.bench.store import Layer, Tokens, draw
from spectral_compile.kernels.dense import rotate

DEFAULT = ("llama-3-8b",)
COPY, GQA, REPEATED = "copy", "SDPA enable_gqa", "SDPA after repeat_kv, bool mask"
COPIED = {"cuda": 2**30, "cpu": 2**24}  # bytes


def measurements(settings: Settings) -> list[Measurement]:
    """The bandwidth of the device, and for each geometry, batch and length each way to attend."""
    made = [Measurement({"method": COPY}, partial(bandwidth, settings))]
    for name in settings.geometries or DEFAULT:
        for batch, cached in settings.pairs:
            labels = {"geometry": name, "batch": batch, "cached": cached}
            sizes = (GEOMETRIES[name], settings, batch, cached)
            ways = [(method, dense) for method in (GQA, REPEATED)] + [(preset, spectral) for preset in settings.presets]
            made += [Measurement({**labels, "method": method}, partial(way, *sizes, method)) for method, way in ways]
    return made


def bandwidth(settings: Settings) -> Row:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(COPIED[settings.device.type], dtype=torch.int8, device=settings.device)
    target = torch.empty_like(source)
    return {"bytes_per_s": 2 * source.nbytes / clock(lambda: target.copy_(source), settings.device).seconds}


def dense(geometry: Geometry, settings: Settings, batch: int, cached: int, method: str) -> Row:
    """One query over ``cached`` + 1 dense keys and values."""
    tokens = draw(geometry, settings, batch, cached + 1)
    query, key, value = tokens.query[:, :, -1:].clone(), tokens.key.contiguous(), tokens.value.contiguous()
    del tokens
    mask = torch.ones(batch, 1, 1, cached + 1, dtype=torch.bool, device=settings.device)
    repeats = geometry.query_heads // geometry.kv_heads

    def repeated() -> torch.Tensor:
        return sdpa(query, repeat_kv(key, repeats), repeat_kv(value, repeats), attn_mask=mask)

    call = repeated if method == REPEATED else lambda: sdpa(query, key, value, enable_gqa=True)
    return timed(call, settings, key.nbytes + value.nbytes)


def spectral(geometry: Geometry, settings: Settings, batch: int, cached: int, preset: str) -> Row:
    """One query over a store of ``cached`` tokens and itself, as a decode step calls it."""
    tokens = draw(geometry, settings, batch, cached + 1)
    layer = Layer(geometry, settings, preset, batch, cached)
    layer.prefill(tokens.columns(0, cached))
    wanted = over_decoded(layer, tokens, cached)
    step = {name: x.clone() for name, x in tokens.columns(cached, cached + 1).items()}
    del tokens
    layer.begin_step(step["key"])
    error = float((layer.attend(step).float() - wanted).norm() / wanted.norm())
    return {**timed(lambda: layer.attend(step), settings, layer.bytes_read()), "relative_error": error}


def over_decoded(layer: Layer, tokens: Tokens, cached: int) -> torch.Tensor:
    """Attention [B, Hq, 1, D] in float32 of the last token over the decoded store and itself."""
    single = copy(layer.store)
    single.cast(torch.float32)
    key, value = (single.dense(role, cached) for role in ("key", "value"))
    at = torch.tensor([cached], device=key.device)
    query, new_key, new_value = (x[:, :, -1:].float() for x in (tokens.query, tokens.key, tokens.value))
    key = torch.cat((key, rotate(new_key, at, layer.layout.rotary)), 2)
    value = torch.cat((value, new_value), 2)
    with sdpa_kernel(SDPBackend.MATH):
        rows = zip(query, key, value, strict=True)
        return torch.cat([sdpa(q[None], k[None], v[None], enable_gqa=True) for q, k, v in rows])


def timed(call: Any, settings: Settings, bytes_read: int) -> Row:
    seconds, how = clock(call, settings.device, graph=True)
    return {"microseconds": 1e6 * seconds, "timed": how, "bytes_read": bytes_read}


def derive(rows: list[Row]) -> None:
    """Ratios to the dense rows of the same sizes, and the time in which the bytes could be copied, in microseconds."""
    bandwidth = next((row.get("bytes_per_s") for row in rows if row["method"] == COPY), None)
    found = {(row.get("geometry"), row.get("batch"), row.get("cached"), row["method"]): row.get("microseconds") for row in rows}
    for row in rows:
        if row["method"] == COPY or row["error"]:
            continue
        sizes = (row["geometry"], row["batch"], row["cached"])
        row["speedup_gqa"] = quotient(found.get((*sizes, GQA)), row["microseconds"])
        row["speedup_repeat_kv"] = quotient(found.get((*sizes, REPEATED)), row["microseconds"])
        row["floor_microseconds"] = quotient(1e6 * row["bytes_read"], bandwidth)


def show(rows: list[Row]) -> Table:
    (copied,) = (row for row in rows if row["method"] == COPY)
    bandwidth = copied["error"] or f"{copied['bytes_per_s'] / 1e12:.3f} TB/s"
    labels = [Column(name, name) for name in ("geometry", "batch", "cached", "method")]
    figures = [
        Column("microseconds", "us", fixed(1)),
        Column("speedup_gqa", "faster than enable_gqa", times),
        Column("speedup_repeat_kv", "than repeat_kv", times),
        Column("bytes_read", "MB read", fixed(3, 1e6)),
        Column("floor_microseconds", "floor, us", fixed(1)),
        Column("relative_error", "relative error", lambda x: f"{x:.1e}"),
        Column("timed", "timed as"),
    ]
    caption = f"Floor: bytes over the bandwidth of a copy, {bandwidth}. Error: against float32 attention to the decoded store."
    measured = [row for row in rows if row is not copied]
    return table("Decode attention of one layer", measured, labels, figures, caption)
