"""Coded tokens as dense keys and values, for a long chunk that attends to them by a library's kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from spectral_compile.kernels.arguments import Geometry
from spectral_compile.kernels.attend.coded import unit_of
from spectral_compile.kernels.attend.plan import Arithmetic, Rope, keys_in
from spectral_compile.kernels.digits import digits, load, matrix
from spectral_compile.kernels.rotary import TILE, sincos, tables
from spectral_compile.kernels.values import Past

_CHANNELS = 64  # of a program, which it makes for ``_TILES`` tiles of tokens, so that it prepares its part of the basis once
_TILES = 8


@triton.jit
def _to_channels(basis, affine, channels, live, S: tl.constexpr, A: tl.constexpr):
    """The matrix from digits to channels times their weights, in units of ``unit_of``."""
    SCALED: tl.constexpr = A.keys_scaled
    return matrix(basis, affine, channels, live, 1.0 / unit_of(affine, S, A), S, A.of_keys, SCALED)


@triton.jit
def _rebuilt(codes, to_channels, affine, slots, ok, channels, live, S: tl.constexpr, A: tl.constexpr):
    """Channels of tokens [N, channels], in float32."""
    UNPACK: tl.constexpr = A.unpack_keys
    x = digits(load(codes, slots, ok, S), S, A.of_keys, UNPACK)
    out = tl.zeros([slots.shape[0], channels.shape[0]], tl.float32)
    for i in tl.static_range(len(S.fields)):
        out = tl.dot(x[i], to_channels[i], out, input_precision=A.precision)
    return out * (unit_of(affine, S, A) / tl.load(affine + 2 * S.rank + channels, mask=live, other=1.0))[None, :]


@triton.jit
def rebuild_kernel(
    key, value, store, positions, turns, row, segment, low, high, coded_slots, segments,
    G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Slots from ``low`` to ``high`` of a row, in a segment: keys (rotated) and values [H, high - low, D].

    A program makes a part of the channels of one head: of RoPE pairs, of keys' channels that are not turned, or of values.
    """
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    RESTS: tl.constexpr = (G.dim - 2 * R.pairs + CHANNELS - 1) // CHANNELS
    head, kind = tl.program_id(1).to(tl.int64), tl.program_id(2)
    of_keys, own = (row * K.groups + head // K.heads).to(tl.int64), head % K.heads * G.dim
    of_values, own_value = (row * V.groups + head // V.heads).to(tl.int64), head % V.heads * G.dim
    k_at, v_at = of_keys * segments + segment, of_values * segments + segment
    begin = low + tl.program_id(0) * TILES * N
    end = tl.minimum(high, begin + TILES * N)
    keys, values = store.k_codes + of_keys * coded_slots * K.halfwords, store.v_codes + of_values * coded_slots * V.halfwords
    k_affine, v_affine = store.k_affine + k_at * (2 * K.rank + K.width), store.v_affine + v_at * (2 * V.rank + V.width)
    k_basis, v_basis = store.k_basis + k_at * (K.width * K.rank), store.v_basis + v_at * (V.width * V.rank)
    key, value = key + head * (high - low) * G.dim, value + head * (high - low) * G.dim
    if kind < R.parts:
        half, column = kind * R.AT_ONCE + tl.arange(0, R.AT_ONCE), tl.arange(0, 2 * R.AT_ONCE)
        pair, second = kind * R.AT_ONCE + column % R.AT_ONCE, column // R.AT_ONCE
        channel = own + (pair * 2 + second if R.interleaved else pair + second * R.pairs)
        first = half * 2 if R.interleaved else half
        OTHER: tl.constexpr = 1 if R.interleaved else R.pairs
        turn = tl.load(turns + half, mask=half < R.pairs, other=0)[None, :]
        to_channels = _to_channels(k_basis, k_affine, channel, pair < R.pairs, K, A)
        for slot in range(begin, end, N):
            slots = slot + tl.arange(0, N)
            ok = slots < end
            x = _rebuilt(keys, to_channels, k_affine, slots, ok, channel, pair < R.pairs, K, A)
            a, b = tl.split(tl.permute(tl.reshape(x, (N, 2, R.AT_ONCE)), (0, 2, 1)))
            s, c = sincos(tl.load(positions + G.first_exact + slots, mask=ok, other=0)[:, None], turn)
            to = key + (slots - low)[:, None] * G.dim + first[None, :]
            held = ok[:, None] & (half < R.pairs)[None, :]
            tl.store(to, ((a * c - b * s) * R.scaling).to(key.dtype.element_ty), mask=held)
            tl.store(to + OTHER, ((b * c + a * s) * R.scaling).to(key.dtype.element_ty), mask=held)
    elif kind < R.parts + RESTS:
        rest = 2 * R.pairs + (kind - R.parts) * CHANNELS + tl.arange(0, CHANNELS)
        to_rest = _to_channels(k_basis, k_affine, own + rest, rest < G.dim, K, A)
        for slot in range(begin, end, N):
            slots = slot + tl.arange(0, N)
            y = _rebuilt(keys, to_rest, k_affine, slots, slots < end, own + rest, rest < G.dim, K, A)
            held = (slots < end)[:, None] & (rest < G.dim)[None, :]
            tl.store(key + (slots - low)[:, None] * G.dim + rest[None, :], y.to(key.dtype.element_ty), mask=held)
    else:
        d = (kind - R.parts - RESTS) * CHANNELS + tl.arange(0, CHANNELS)
        to_values = _to_channels(v_basis, v_affine, own_value + d, d < G.dim, V, A)
        for slot in range(begin, end, N):
            slots = slot + tl.arange(0, N)
            z = _rebuilt(values, to_values, v_affine, slots, slots < end, own_value + d, d < G.dim, V, A)
            if G.normalised:
                norm = tl.load(store.v_norms + of_values * coded_slots + slots, mask=slots < end, other=128).to(tl.float32)
                z = z * tl.exp2((norm - 128) * 0.125)[:, None]
            held = (slots < end)[:, None] & (d < G.dim)[None, :]
            tl.store(value + (slots - low)[:, None] * G.dim + d[None, :], z.to(value.dtype.element_ty), mask=held)


def rebuild(row: int, segment: int, slots: slice, past: Past) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated) and values [H, n, D] in the model's dtype, of coded tokens in one segment of a row."""
    layout, buffers = past.layout, past.buffers
    dtype, device, count = buffers.k_exact.dtype, buffers.k_exact.device, slots.stop - slots.start
    key, value = buffers.k_exact.new_empty(2, layout.kv_heads, count, layout.head_dim)
    rope, geometry = Rope.of(layout.rotary, layout.head_dim), Geometry.of(layout, layout.kv_heads)
    turns, _ = tables(layout.rotary, device, keys_in(dtype))
    kinds = rope.parts + triton.cdiv(layout.head_dim - 2 * rope.pairs, _CHANNELS) + triton.cdiv(layout.head_dim, _CHANNELS)
    store: Any = buffers._replace(k_codes=buffers.k_codes.view(torch.int16), v_codes=buffers.v_codes.view(torch.int16))
    rebuild_kernel[(triton.cdiv(count, TILE * _TILES), layout.kv_heads, kinds)](
        key, value, store, past.positions[row], turns, row, segment, slots.start, slots.stop, buffers.k_codes.shape[2],
        buffers.starts.shape[1],
        G=geometry, R=rope, A=Arithmetic.of(dtype), N=TILE, TILES=_TILES, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return key, value
