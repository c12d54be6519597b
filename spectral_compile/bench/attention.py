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
FP8 = "fp8, by bytes"  # dense, at the bandwidth of a copy: no kernel is faster, and most are slower
COPIED = {"cuda": 2**30, "cpu": 2**24}  # bytes


def measurements(settings: Settings) -> list[Measurement]:
    """The bandwidth of the device, and for each geometry, batch and length each way to attend."""
    made = [Measurement({"method": COPY}, partial(bandwidth, settings))]
    for name in settings.geometries or DEFAULT:
        for batch, cached in settings.pairs:
            labels = {"geometry": name, "batch": batch, "cached": cached}
            sizes = (GEOMETRIES[name], settings, batch, cached)
            ways = [(GQA, dense), (REPEATED, dense), (FP8, in_fp8), *((preset, spectral) for preset in settings.presets)]
            made += [Measurement({**labels, "method": method}, partial(way, *sizes, method)) for method, way in ways]
    return made


def bandwidth(settings: Settings) -> Row:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(COPIED[settings.device.type], dtype=torch.int8, device=settings.device)
    target = torch.empty_like(source)
    return {"bytes_per_s": 2 * source.nbytes / clock(lambda: target.copy_(source), settings.device).seconds}


def dense(geometry: Geometry, settings: Settings, batch: int, cached: int, method: str) -> Row:
    """A step over ``cached`` dense keys and values and its own."""
    count = settings.columns
    tokens = draw(geometry, settings, batch, cached + count)
    query, key, value = tokens.query[:, :, -count:].clone(), tokens.key.contiguous(), tokens.value.contiguous()
    del tokens
    mask = causal(count, cached, settings.device).expand(batch, 1, -1, -1)
    repeats = geometry.query_heads // geometry.kv_heads

    def repeated() -> torch.Tensor:
        return sdpa(query, repeat_kv(key, repeats), repeat_kv(value, repeats), attn_mask=mask)

    def grouped() -> torch.Tensor:
        return sdpa(query, key, value, attn_mask=mask if count > 1 else None, enable_gqa=True)

    return timed(repeated if method == REPEATED else grouped, settings, key.nbytes + value.nbytes)


def in_fp8(geometry: Geometry, settings: Settings, batch: int, cached: int, method: str) -> Row:
    """What a dense cache of a byte a channel would read; the time follows from it."""
    channels = 2 * batch * geometry.kv_heads * geometry.head_dim
    return {"bytes_read": channels * (cached + settings.columns), "timed": "bytes / copy"}


def causal(count: int, cached: int, device: torch.device) -> torch.Tensor:
    """Which of ``cached`` + ``count`` tokens the last ``count`` see: bool [count, cached + count]."""
    return torch.ones(count, cached + count, dtype=torch.bool, device=device).tril(cached)


def spectral(geometry: Geometry, settings: Settings, batch: int, cached: int, preset: str) -> Row:
    """A step over a store of ``cached`` tokens and itself, as ``generate`` calls it."""
    count = settings.columns
    tokens = draw(geometry, settings, batch, cached + count)
    layer = Layer(geometry, settings, preset, batch, cached)
    layer.prefill(tokens.columns(0, cached))
    wanted = over_decoded(layer, tokens, cached, count)
    step = {name: x.clone() for name, x in tokens.columns(cached, cached + count).items()}
    del tokens
    layer.begin_step(step["key"])
    error = float((layer.attend(step).float() - wanted).norm() / wanted.norm())
    row = {**timed(lambda: layer.attend(step), settings, layer.bytes_read()), "relative_error": error}
    if settings.device.type == "cuda":
        from spectral_compile.kernels.attend.kernel import taken  # Triton is there only where a GPU is

        taken.clear()
        layer.attend(step)
        row["keys"] = next(iter(taken), None)
    return row


def over_decoded(layer: Layer, tokens: Tokens, cached: int, count: int) -> torch.Tensor:
    """Attention [B, Hq, count, D] in float32 of the last tokens over the decoded store and themselves."""
    single = copy(layer.store)
    single.cast(torch.float32)
    key, value = (single.dense(role, cached) for role in ("key", "value"))
    at = torch.arange(cached, cached + count, device=key.device)
    query, new_key, new_value = (x[:, :, -count:].float() for x in (tokens.query, tokens.key, tokens.value))
    mask = causal(count, cached, key.device)
    key = torch.cat((key, rotate(new_key, at, layer.layout.rotary)), 2)
    value = torch.cat((value, new_value), 2)
    with sdpa_kernel(SDPBackend.MATH):
        rows = zip(query, key, value, strict=True)
        return torch.cat([sdpa(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True) for q, k, v in rows])


def timed(call: Any, settings: Settings, bytes_read: int) -> Row:
    seconds, how = clock(call, settings.device, graph=True)
    return {"microseconds": 1e6 * seconds, "timed": how, "bytes_read": bytes_read}


def derive(rows: list[Row]) -> None:
    """Ratios to the dense rows of the same sizes, and the time in which the bytes could be copied, in microseconds."""
    bandwidth = next((row.get("bytes_per_s") for row in rows if row["method"] == COPY), None)
    for row in rows:
        if row["method"] == FP8 and not row["error"] and bandwidth:
            row["microseconds"] = 1e6 * row["bytes_read"] / bandwidth
    found = {(row.get("geometry"), row.get("batch"), row.get("cached"), row["method"]): row.get("microseconds") for row in rows}
    for row in rows:
        if row["method"] == COPY or row["error"]:
            continue
        sizes = (row["geometry"], row["batch"], row["cached"])
        row["speedup_gqa"] = quotient(found.get((*sizes, GQA)), row.get("microseconds"))
        row["speedup_repeat_kv"] = quotient(found.get((*sizes, REPEATED)), row.get("microseconds"))
        row["speedup_fp8"] = quotient(found.get((*sizes, FP8)), row.get("microseconds"))
        row["floor_microseconds"] = quotient(1e6 * row["bytes_read"], bandwidth)


def show(rows: list[Row]) -> Table:
    (copied,) = (row for row in rows if row["method"] == COPY)
    bandwidth = copied["error"] or f"{copied['bytes_per_s'] / 1e12:.3f} TB/s"
    labels = [Column(name, name) for name in ("geometry", "batch", "cached", "method")]
    figures = [
        Column("microseconds", "us", fixed(1)),
        Column("speedup_gqa", "than enable_gqa", times),
        Column("speedup_repeat_kv", "than repeat_kv", times),
        Column("speedup_fp8", "than fp8", times),
        Column("bytes_read", "MB read", fixed(3, 1e6)),
        Column("floor_microseconds", "floor, us", fixed(1)),
        Column("relative_error", "error", lambda x: f"{x:.1e}"),
        Column("keys", "keys"),
        Column("timed", "timed"),
    ]
    caption = (
        f"How much faster than each dense way. Floor: bytes over the bandwidth of a copy, {bandwidth}."
        " Error: against float32 attention to the decoded store."
    )
    measured = [row for row in rows if row is not copied]
    return table("Decode attention of one layer", measured, labels, figures, caption)
