"""Attention over a compressed past, in Triton.

The tokens of a row are split among programs. Most take coded tokens: a tile of codes times the basis gives keys in registers,
which are rotated and scored; values stay in the latent until a split ends. The others take what is exact: sinks, window and
chunk. A second kernel merges all of them by log-sum-exp.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Layout, Tiers
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import COLUMNS, books
from spectral_compile.kernels.rotary import TILE, sincos, tables

_LEAST = 16  # the smallest extent of a matrix product
_PROGRAMS = 264  # two for each multiprocessor of an H100
_SCRATCH = 1 << 24  # numbers that the splits of one launch may leave for the merge


class _Packed(NamedTuple):
    """Instructions on two numbers at a time; what Triton makes of the same arithmetic takes several times as many."""

    unpack: str  # four bytes to sixteen digits
    rotate: str  # two pairs turned


def _packed(kind: str, eight: int, mantissa: int) -> _Packed:
    """``kind`` is bf16 or f16, which has so many bits of ``mantissa``; ``eight`` are the bits of 8.0.

    A digit is written into the mantissa of 8.0, and 9.5 is subtracted.
    """

    def pair(bits: int) -> str:
        return f"0x{bits:04x}{bits:04x}"

    unit = mantissa - 3  # the place of a one in the mantissa of 8.0
    unpack = [
        "{ .reg .b32 a, b, x, one, middle;",
        f"mov.b32 one, {pair(eight - (3 << mantissa))}; mov.b32 middle, {pair(0x8000 | eight | 3 << (unit - 1))};",
        "prmt.b32 a, $8, 0, 0x4140; prmt.b32 b, $8, 0, 0x4342;",
    ]
    for field in range(4):
        left = unit - 2 * field
        for i, half in enumerate("ab"):
            unpack.append(f"{'shl' if left >= 0 else 'shr'}.b32 x, {half}, {abs(left)};")
            unpack.append(f"lop3.b32 x, x, {pair(3 << unit)}, {pair(eight)}, 0xEA;")
            unpack.append(f"fma.rn.{kind}x2 ${2 * field + i}, x, one, middle;")
    rotate = f"""{{ .reg .b32 a, b, t, n, z;
        mov.b32 z, {pair(0x8000)};
        cvt.rn.{kind}x2.f32 a, $3, $2; cvt.rn.{kind}x2.f32 b, $5, $4;
        neg.{kind}x2 n, $7;
        fma.rn.{kind}x2 t, b, n, z; fma.rn.{kind}x2 $0, a, $6, t;
        fma.rn.{kind}x2 t, a, $7, z; fma.rn.{kind}x2 $1, b, $6, t; }}"""
    return _Packed("\n".join([*unpack, "}"]), rotate)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ASM = {torch.bfloat16: _packed("bf16", 0x4100, 7), torch.float16: _packed("f16", 0x4800, 10)}


@functools.cache
def pieces(tiers: Tiers) -> tuple[tuple[int, int, int, int], ...]:
    """A row of codes as parts whose extents are powers of two: (first byte, bytes, padded bytes, digits a byte).

    Where all codes have 8 bits a byte is one digit to the base 256, else it is four to the base 4.
    """
    digits = 4 if tiers.bits4 + tiers.bits2 else 1
    parts, at, least = [], 0, _LEAST // digits
    while at < tiers.row_bytes:
        left = tiers.row_bytes - at
        padded = max(least, triton.next_power_of_2(left))
        if padded > least and left < padded * 3 // 4:
            padded //= 2  # two parts with little padding instead of one with much
        parts.append((at, min(left, padded), padded, digits))
        at += padded
    return tuple(parts)


@triton.jit
def _pair(a, b):
    """[N, K] and [N, K] side by side: [N, 2 * K]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _four(a, b, c, d):
    return _pair(_pair(a, b), _pair(c, d))


@triton.jit
def _digits(ptr, slots, ok, ROW: tl.constexpr, PIECES: tl.constexpr, DTYPE: tl.constexpr, UNPACK: tl.constexpr):
    """Codes of some tokens as digits, one tensor [N, digits] a piece, lowest digits first, each less the middle of its range.

    All tiers look alike so: a code of 2k bits stands for the sum of 4**i * (digit_i - 1.5) over its k digits, in steps.
    """
    out = ()
    for i in tl.static_range(len(PIECES)):
        byte = tl.arange(0, PIECES[i][2])
        at = slots[:, None] * ROW + (PIECES[i][0] + byte)[None, :]
        held = ok[:, None] & (byte < PIECES[i][1])[None, :]
        x = tl.load(ptr + at, mask=held, other=0)
        if PIECES[i][3] == 1:
            out = out + ((x.to(tl.float32) - 127.5).to(DTYPE),)
        elif UNPACK is None:
            a, b, c, d = x & 3, (x >> 2) & 3, (x >> 4) & 3, x >> 6
            out = out + ((_four(a, b, c, d).to(tl.float32) - 1.5).to(DTYPE),)
        else:
            if DTYPE == tl.bfloat16:
                a, b, c, d = tl.inline_asm_elementwise(
                    UNPACK, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 4
                )
            else:
                a, b, c, d = tl.inline_asm_elementwise(
                    UNPACK, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x], (tl.float16, tl.float16, tl.float16, tl.float16), True, 4
                )
            out = out + (_four(a, b, c, d),)
    return out


@triton.jit
def _basis(
    basis, affine, channels, live, R: tl.constexpr, W: tl.constexpr, TIERS: tl.constexpr, PIECES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The matrix from digits to some channels, one tensor [digits, channels] a piece, zero where there is padding."""
    weight = 1.0 / tl.load(affine + 2 * R + channels, mask=live, other=1.0)
    out = ()
    for i in tl.static_range(len(PIECES)):
        digit = tl.arange(0, PIECES[i][2] * PIECES[i][3])
        real = digit % PIECES[i][2] < PIECES[i][1]
        if PIECES[i][3] == 1:
            r, power = PIECES[i][0] + digit, 1.0
        else:
            byte, field = PIECES[i][0] + digit % PIECES[i][2], digit // PIECES[i][2]
            in8, in4 = byte < TIERS[0], byte < TIERS[0] + (TIERS[1] + 1) // 2
            nibble, pair = (byte - TIERS[0]) * 2 + field // 2, (byte - TIERS[0] - (TIERS[1] + 1) // 2) * 4 + field
            real = real & (in8 | (in4 & (nibble < TIERS[1])) | (~in4 & (pair < TIERS[2])))
            r = tl.where(in8, byte, TIERS[0] + tl.where(in4, nibble, TIERS[1] + pair))
            power = tl.where(in8, 1 << (2 * field), tl.where(in4, 1 << (2 * (field % 2)), 1)).to(tl.float32)
        scale = tl.load(affine + r, mask=real, other=0.0) * tl.load(affine + R + r, mask=real, other=0.0) * power
        x = tl.load(basis + r[:, None] * W + channels[None, :], mask=real[:, None] & live[None, :], other=0)
        out = out + ((x.to(tl.float32) * scale[:, None] * weight[None, :]).to(DTYPE),)
    return out


@triton.jit
def _product(codes, basis, FIRST: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    x = tl.dot(codes[0], basis[FIRST], input_precision=PRECISION)
    for i in tl.static_range(1, COUNT):
        x = tl.dot(codes[i], basis[FIRST + i], x, input_precision=PRECISION)
    return x


@triton.jit
def _merge_max(s, m):
    """The new maxima of scores [N, M], what to scale the old sums by, and exponentials; all of them 0 where nothing is seen."""
    new = tl.maximum(m, tl.max(s, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(m - safe), tl.exp2(s - safe[None, :])


@triton.jit
def _own(x, head, h: tl.constexpr, HEADS: tl.constexpr):
    """Rows of ``x`` that belong to a head of the group, and zeros for the others."""
    return x if HEADS == 1 else tl.where((head == h)[:, None], x, tl.zeros_like(x))


@triton.jit
def _rotated(k, cos, sin, PP: tl.constexpr, ROTATE: tl.constexpr, DTYPE: tl.constexpr):
    """Keys [N, 2 * PP], first halves of the pairs before second ones, turned by [N, PP]."""
    k1, k2 = tl.split(tl.permute(tl.reshape(k, (k.shape[0], 2, PP)), (0, 2, 1)))
    if ROTATE is None:
        r1, r2 = (k1 * cos - k2 * sin).to(DTYPE), (k2 * cos + k1 * sin).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        r1, r2 = tl.inline_asm_elementwise(
            ROTATE, "=r,=r,f,f,f,f,r,r", [k1, k2, cos, sin], (tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        r1, r2 = tl.inline_asm_elementwise(
            ROTATE, "=r,=r,f,f,f,f,r,r", [k1, k2, cos, sin], (tl.float16, tl.float16), True, 2
        )
    return _pair(r1, r2)


@triton.jit
def _past(
    q1, q2, q3, head, live, own, low, high, b, g, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine, starts,
    row_positions, seen_row, turn, table, coded_cap, segments, slide,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, K_PIECES: tl.constexpr, V_PIECES: tl.constexpr, K_TIERS: tl.constexpr,
    V_TIERS: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    NORMALISED: tl.constexpr, SINKS: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_SEGMENTS: tl.constexpr, SLIDES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UNPACK: tl.constexpr,
    ROTATE: tl.constexpr, STAGES: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """Attention to coded tokens from ``low`` to ``high``: sums [M, DP], their maxima [M] and weights [N, M].

    Without ``GAPS`` positions run on by one: keys are turned by their distance from the first token of their tile, which a
    table knows, and queries by the rest.
    """
    KN: tl.constexpr = len(K_PIECES)
    K_ROTATED: tl.constexpr = KN if P > 0 else 0
    PER: tl.constexpr = K_ROTATED + (KN if RESTP > 0 else 0)
    p, d, t = tl.arange(0, PP), tl.arange(0, DP), tl.arange(0, N)
    real = p < P
    rest = 2 * P + tl.arange(0, RESTP if RESTP > 0 else 1)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([N, M], tl.float32)
    out = tl.zeros([M, DP], tl.float32)
    if P > 0:
        channel = tl.arange(0, 2 * PP)
        half = channel % PP
        rotated = half * 2 + channel // PP if INTERLEAVED else half + channel // PP * P
        if not GAPS:
            step_sin, step_cos = sincos(tl.full([1], N, tl.int32), turn[None, :])
            cos = tl.load(table + t[:, None] * P + p[None, :], mask=real[None, :], other=0.0)
            sin = tl.load(table + (N + t)[:, None] * P + p[None, :], mask=real[None, :], other=0.0)
    segment = 0
    while segment + 1 < segments and tl.load(starts + b * segments + tl.minimum(segment + 1, segments - 1)) <= low:
        segment += 1
    while low < high:
        end = high
        if segment + 1 < segments:
            end = tl.minimum(high, tl.load(starts + b * segments + segment + 1))
        at = (b * GROUPS + g) * segments + segment
        side, affine = k_basis + at * (HEADS * D * RK), k_affine + at * (2 * RK + HEADS * D)
        basis = ()
        for h in tl.static_range(HEADS):
            if P > 0:
                basis = basis + _basis(side, affine, h * D + rotated, half < P, RK, HEADS * D, K_TIERS, K_PIECES, DTYPE)
            if RESTP > 0:
                basis = basis + _basis(side, affine, h * D + rest, rest < D, RK, HEADS * D, K_TIERS, K_PIECES, DTYPE)
        latent = ()
        for i in tl.static_range(len(V_PIECES)):
            latent = latent + (tl.zeros([M, V_PIECES[i][2] * V_PIECES[i][3]], tl.float32),)
        rows = (b * GROUPS + g).to(tl.int64) * coded_cap
        if P > 0:
            qb1, qb2 = q1, q2
            if not GAPS:
                s, c = sincos(tl.load(row_positions + low), turn[None, :])
                qb1, qb2 = q1 * c + q2 * s, q2 * c - q1 * s
        for start in tl.range(low, end, N, num_stages=STAGES):
            slots = start + t
            ok = slots < end
            if NORMALISED:
                norm = tl.load(v_norms + rows + slots, mask=ok, other=128)
            codes = _digits(k_codes + rows * K_ROW, slots, ok, K_ROW, K_PIECES, DTYPE, UNPACK)
            if P > 0 and GAPS:
                sin32, cos32 = sincos(tl.load(row_positions + slots, mask=ok, other=0)[:, None], turn[None, :])
                cos, sin = cos32.to(DTYPE), sin32.to(DTYPE)
            if P > 0:
                turned = _pair(qb1.to(DTYPE), qb2.to(DTYPE))
            scores = tl.zeros([N, M], tl.float32)
            for h in tl.static_range(HEADS):
                if P > 0:
                    k = _product(codes, basis, h * PER, KN, PRECISION)
                    k = _rotated(k, cos, sin, PP, ROTATE, DTYPE)
                    scores = tl.dot(k, tl.trans(_own(turned, head, h, HEADS)), scores, input_precision=PRECISION)
                if RESTP > 0:
                    k = _product(codes, basis, h * PER + K_ROTATED, KN, PRECISION).to(DTYPE)
                    scores = tl.dot(k, tl.trans(_own(q3.to(DTYPE), head, h, HEADS)), scores, input_precision=PRECISION)
            if P > 0 and not GAPS:
                qb1, qb2 = qb1 * step_cos + qb2 * step_sin, qb2 * step_cos - qb1 * step_sin
            visible = ok[:, None] & live[None, :]
            if SLIDES:
                visible = visible & ((SINKS + slots)[:, None] > (own - slide)[None, :])
            if HAS_SEEN:
                visible = visible & (tl.load(seen_row[None, :] + (SINKS + slots)[:, None], mask=visible, other=0) != 0)
            highest, alpha, weights = _merge_max(tl.where(visible, scores, float("-inf")), highest)
            total = total * alpha[None, :] + weights
            if HAS_SEGMENTS:
                out = out * alpha[:, None]
            if NORMALISED:
                weights = weights * tl.exp2((norm.to(tl.float32) - 128) * 0.125)[:, None]
            weights = weights.to(DTYPE)
            values = _digits(v_codes + rows * V_ROW, slots, ok, V_ROW, V_PIECES, DTYPE, UNPACK)
            grown = ()
            for i in tl.static_range(len(V_PIECES)):
                part = tl.dot(tl.trans(weights), values[i], latent[i] * alpha[:, None], input_precision=PRECISION)
                grown = grown + (part,)
            latent = grown
        side, affine = v_basis + at * (HEADS * D * RV), v_affine + at * (2 * RV + HEADS * D)
        for h in tl.static_range(HEADS):
            matrix = _basis(side, affine, h * D + d, d < D, RV, HEADS * D, V_TIERS, V_PIECES, DTYPE)
            for i in tl.static_range(len(V_PIECES)):
                out = tl.dot(_own(latent[i].to(DTYPE), head, h, HEADS), matrix[i], out, input_precision=PRECISION)
        low = end
        segment += 1
    return out, highest, total


@triton.jit
def _exact(coded, exact, new, is_code, is_kept, is_new, channels, live, LOSSLESS: tl.constexpr):
    """Channels [N, channels] of tokens that are held as they are, in float32."""
    live = live[None, :]
    x = tl.load(exact[:, None] + channels[None, :], mask=is_kept[:, None] & live, other=0.0).to(tl.float32)
    x += tl.load(new[:, None] + channels[None, :], mask=is_new[:, None] & live, other=0.0).to(tl.float32)
    if LOSSLESS:
        x += tl.load(coded[:, None] + channels[None, :], mask=is_code[:, None] & live, other=0.0).to(tl.float32)
    return x


@triton.jit
def _present(
    q1, q2, q3, head, live, own, part, b, g, n, before, coded, k_ptr, v_ptr, k_codes, v_codes, k_exact, v_exact,
    row_positions, index, seen_row, turn, coded_cap, exact_cap, slide, k_b, k_h, k_n, v_b, v_h, v_n,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, LOSSLESS: tl.constexpr, SINKS: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_SEEN: tl.constexpr, SLIDES: tl.constexpr, EXACT_SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention to one part of what is held exactly: sums [M, DP], their maxima [M] and weights [N, M].

    In this order: codes of a lossless store, sinks, window, chunk.
    """
    p, d, t = tl.arange(0, PP), tl.arange(0, DP), tl.arange(0, N)
    real = p < P
    first, second = (p * 2, p * 2 + 1) if INTERLEAVED else (p, p + P)
    rest = 2 * P + tl.arange(0, RESTP if RESTP > 0 else 1)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([N, M], tl.float32)
    out = tl.zeros([M, DP], tl.float32)
    codes_first = coded if LOSSLESS else 0
    in_sinks = tl.minimum(before, SINKS)
    ring_first = codes_first + in_sinks
    new_first = ring_first + tl.maximum(before - SINKS - coded, 0)
    count = new_first + n
    share = tl.cdiv(tl.cdiv(count, N), EXACT_SPLITS) * N
    low = part * share
    ring = exact_cap - SINKS
    oldest = coded % ring
    for start in tl.range(low, tl.minimum(low + share, count), N, num_stages=1):
        e = start + t
        is_code, is_new, ok = e < codes_first, e >= new_first, e < count
        is_kept = (e >= codes_first) & (e < new_first)
        column = e - new_first
        place = oldest + e - ring_first
        kept = tl.where(e < ring_first, e - codes_first, SINKS + tl.where(place < ring, place, place - ring))
        token = tl.where(e < ring_first, e - codes_first, SINKS + coded + e - ring_first)
        token = tl.where(is_code, SINKS + e, token)
        if HAS_INDEX:
            rank = tl.load(index + b * n + column, mask=is_new & ok, other=-1)
            previous = tl.load(index + b * n + column - 1, mask=is_new & ok & (column > 0), other=-1)
            token = tl.where(is_new, before + rank, token)
            ok = ok & (~is_new | (rank > previous))
        else:
            token = tl.where(is_new, before + column, token)
        is_new, is_code, is_kept = is_new & ok, is_code & ok, is_kept & ok
        if P > 0:
            where = tl.load(row_positions + token, mask=ok, other=0)
            sin, cos = sincos(where[:, None], turn[None, :])
        scores = tl.zeros([N, M], tl.float32)
        for h in tl.static_range(HEADS):
            kv = g * HEADS + h
            coded_k = k_codes + ((b * GROUPS + g).to(tl.int64) * coded_cap + e) * (HEADS * D) + h * D
            exact_k = k_exact + ((b * GROUPS * HEADS + kv) * exact_cap + kept) * D
            new_k = k_ptr + b * k_b + kv * k_h + column * k_n
            if P > 0:
                k1 = _exact(coded_k, exact_k, new_k, is_code, is_kept, is_new, first, real, LOSSLESS)
                k2 = _exact(coded_k, exact_k, new_k, is_code, is_kept, is_new, second, real, LOSSLESS)
                r1, r2 = (k1 * cos - k2 * sin).to(DTYPE), (k2 * cos + k1 * sin).to(DTYPE)
                scores = tl.dot(r1, tl.trans(_own(q1.to(DTYPE), head, h, HEADS)), scores, input_precision=PRECISION)
                scores = tl.dot(r2, tl.trans(_own(q2.to(DTYPE), head, h, HEADS)), scores, input_precision=PRECISION)
            if RESTP > 0:
                k3 = _exact(coded_k, exact_k, new_k, is_code, is_kept, is_new, rest, rest < D, LOSSLESS).to(DTYPE)
                scores = tl.dot(k3, tl.trans(_own(q3.to(DTYPE), head, h, HEADS)), scores, input_precision=PRECISION)
        if HAS_SEEN:
            visible = ok[:, None] & live[None, :]
            visible = visible & (tl.load(seen_row[None, :] + token[:, None], mask=visible, other=0) != 0)
        else:
            visible = ok[:, None] & (token[:, None] <= own[None, :])
            if SLIDES:
                visible = visible & (token[:, None] > (own - slide)[None, :])
        highest, alpha, weights = _merge_max(tl.where(visible, scores, float("-inf")), highest)
        total = total * alpha[None, :] + weights
        out = out * alpha[:, None]
        mixing = tl.trans(weights.to(DTYPE))
        for h in tl.static_range(HEADS):
            kv = g * HEADS + h
            coded_v = v_codes + ((b * GROUPS + g).to(tl.int64) * coded_cap + e) * (HEADS * D) + h * D
            exact_v = v_exact + ((b * GROUPS * HEADS + kv) * exact_cap + kept) * D
            new_v = v_ptr + b * v_b + kv * v_h + column * v_n
            x = _exact(coded_v, exact_v, new_v, is_code, is_kept, is_new, d, d < D, LOSSLESS).to(DTYPE)
            out = tl.dot(_own(mixing, head, h, HEADS), x, out, input_precision=PRECISION)
    return out, highest, total


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine, k_exact, v_exact, starts,
    ledger, positions, index, seen, turns, table, out_ptr, max_ptr, sum_ptr,
    n, first_tile, coded_cap, exact_cap, segments, slots_cap, seen_cap, slide, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, SCALING: tl.constexpr,
    K_PIECES: tl.constexpr, V_PIECES: tl.constexpr, K_TIERS: tl.constexpr, V_TIERS: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    NORMALISED: tl.constexpr, LOSSLESS: tl.constexpr, SINKS: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_SEGMENTS: tl.constexpr, ONE: tl.constexpr, SLIDES: tl.constexpr,
    SPLITS: tl.constexpr, EXACT_SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, UNPACK: tl.constexpr, ROTATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of the tokens of one group of KV heads, for M (query, head) pairs."""
    split, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = pair // GROUPS, pair % GROUPS
    ROWS: tl.constexpr = HEADS * GQA
    m = (first_tile + tile) * M + tl.arange(0, M)
    live = m < n * ROWS
    qi, qh = m // ROWS, m % ROWS
    head = qh // GQA
    before, coded, after, _coded_after = books(ledger, b)
    if ONE:
        own = tl.zeros([M], tl.int32) + (after - 1)
    elif HAS_INDEX:
        own = before + tl.load(index + b * n + qi, mask=live, other=0)
    else:
        own = before + qi
    own = tl.where(live, own, -1)
    seen_row = qi
    if HAS_SEEN:
        seen_row = seen + (b * n + qi) * seen_cap

    p = tl.arange(0, PP)
    real = p < P
    first, second = (p * 2, p * 2 + 1) if INTERLEAVED else (p, p + P)
    q_row = q_ptr + b * q_b + (g * ROWS + qh) * q_h + qi * q_n
    turn = tl.load(turns + p, mask=real, other=0)
    scale = scale * 1.4426950408889634
    q1, q2, q3 = 0.0, 0.0, 0.0
    if P > 0:
        held = live[:, None] & real[None, :]
        q1 = tl.load(q_row[:, None] + first[None, :], mask=held, other=0.0).to(tl.float32) * (scale * SCALING)
        q2 = tl.load(q_row[:, None] + second[None, :], mask=held, other=0.0).to(tl.float32) * (scale * SCALING)
    if RESTP > 0:
        rest = 2 * P + tl.arange(0, RESTP)
        q3 = tl.load(q_row[:, None] + rest[None, :], mask=live[:, None] & (rest < D)[None, :], other=0.0).to(tl.float32) * scale

    row_positions = positions + b * slots_cap
    if not LOSSLESS and split < SPLITS:
        low = 0
        if SLIDES:
            low = tl.maximum(tl.min(tl.where(live, own, 2147483647)) - slide + 1 - SINKS, 0) // N * N
        share = tl.cdiv(tl.cdiv(tl.maximum(coded - low, 0), N), SPLITS) * N
        low += split * share
        high = tl.minimum(low + share, coded)
        if tl.load(ledger + b * COLUMNS + 5) == 0:
            out, highest, total = _past(
                q1, q2, q3, head, live, own, low, high, b, g, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine,
                starts, row_positions + SINKS, seen_row, turn, table, coded_cap, segments, slide, GROUPS, HEADS, D, DP, P, PP,
                RESTP, INTERLEAVED, K_PIECES, V_PIECES, K_TIERS, V_TIERS, RK, RV, K_ROW, V_ROW, NORMALISED, SINKS, HAS_SEEN,
                HAS_SEGMENTS, SLIDES, M, N, DTYPE, PRECISION, UNPACK, ROTATE, STAGES, False,
            )
        else:
            out, highest, total = _past(
                q1, q2, q3, head, live, own, low, high, b, g, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine,
                starts, row_positions + SINKS, seen_row, turn, table, coded_cap, segments, slide, GROUPS, HEADS, D, DP, P, PP,
                RESTP, INTERLEAVED, K_PIECES, V_PIECES, K_TIERS, V_TIERS, RK, RV, K_ROW, V_ROW, NORMALISED, SINKS, HAS_SEEN,
                HAS_SEGMENTS, SLIDES, M, N, DTYPE, PRECISION, UNPACK, ROTATE, STAGES, True,
            )
    else:
        out, highest, total = _present(
            q1, q2, q3, head, live, own, split - SPLITS, b, g, n, before, coded, k_ptr, v_ptr, k_codes, v_codes, k_exact,
            v_exact, row_positions, index, seen_row, turn, coded_cap, exact_cap, slide, k_b, k_h, k_n, v_b, v_h, v_n, GROUPS,
            HEADS, D, DP, P, PP, RESTP, INTERLEAVED, LOSSLESS, SINKS, HAS_INDEX, HAS_SEEN, SLIDES, EXACT_SPLITS, M, N, DTYPE,
            PRECISION,
        )

    d = tl.arange(0, DP)
    row = (pair.to(tl.int64) * tl.num_programs(1) + tile) * M + tl.arange(0, M)
    at = row * (SPLITS + EXACT_SPLITS) + split
    tl.store(out_ptr + at[:, None] * DP + d[None, :], out)
    tl.store(max_ptr + at, highest)
    tl.store(sum_ptr + at, tl.sum(total, 0))


@triton.jit
def _merge_kernel(
    out_ptr, max_ptr, sum_ptr, result, n, first, rows,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one (query, head) pair, counted from ``first``, into ``result`` [B, n, Hq, D]."""
    m, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = pair // GROUPS, pair % GROUPS
    s, d = tl.arange(0, SP), tl.arange(0, DP)
    at = (pair * rows + m) * S + s
    m += first
    highest = tl.load(max_ptr + at, mask=s < S, other=float("-inf"))
    top = tl.max(highest, 0)
    weight = tl.exp2(highest - tl.where(top == float("-inf"), 0.0, top))
    norm = tl.sum(weight * tl.load(sum_ptr + at, mask=s < S, other=0.0), 0)
    parts = tl.load(out_ptr + at[:, None] * DP + d[None, :], mask=(s < S)[:, None], other=0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.where(norm == 0, 1.0, norm)
    place = ((b * n + m // ROWS) * GROUPS + g) * ROWS + m % ROWS
    tl.store(result + place * D + d, mixed.to(result.dtype.element_ty), mask=d < D)


def _tiers(tiers: Tiers) -> tuple[int, int, int]:
    return tiers.bits8, tiers.bits4, tiers.bits2


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    columns: torch.Tensor | None,
    ledger: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
    scale: float,
    window: int,
) -> torch.Tensor:
    """``reference.attend`` by kernels; nothing waits for the device, and the grid depends on shapes alone."""
    batch, q_heads, count, dim = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    groups, heads, gqa = layout.groups, layout.head_group, q_heads // layout.kv_heads
    rows = count * heads * gqa
    coded_cap, exact_cap, segments = buffers.k_codes.shape[2], buffers.k_exact.shape[2], buffers.starts.shape[1]
    plan = _plan(layout, batch, rows, coded_cap, exact_cap + count, query.dtype)
    tile = plan["M"]
    tiles = triton.cdiv(rows, tile)
    splits = plan["SPLITS"] + plan["EXACT_SPLITS"]
    padded = triton.next_power_of_2(dim)
    out = query.new_empty(batch, count, q_heads, dim)
    index = valid.cumsum(1, dtype=torch.int32) - 1 if valid is not None and count > 1 else None
    seen = None if mask is None else _seen(mask, columns, valid, positions.shape[1], count)
    turns, table = tables(layout.rotary, query.device, query.dtype)
    pairs = layout.rotary.dim // 2 if layout.rotary else 0
    rest = dim - 2 * pairs
    most = max(1, _SCRATCH // (batch * groups * tile * splits * padded))  # tiles of queries at a time
    for first in range(0, tiles, most):
        held = min(most, tiles - first)
        part = query.new_empty(batch * groups, held * tile, splits, padded, dtype=torch.float32)
        top, total = query.new_empty(2, *part.shape[:-1], dtype=torch.float32)
        _attend_kernel[(splits, held, batch * groups)](
            query, key, value, buffers.k_codes, buffers.v_codes, buffers.v_norms, buffers.k_basis, buffers.v_basis,
            buffers.k_affine, buffers.v_affine, buffers.k_exact, buffers.v_exact, buffers.starts,
            ledger, positions, index, seen, turns, table, part, top, total,
            count, first, coded_cap, exact_cap, segments, positions.shape[1],
            0 if seen is None else seen.shape[2], window, scale,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            GROUPS=groups, HEADS=heads, GQA=gqa, D=dim, DP=padded,
            P=pairs, PP=max(_LEAST, triton.next_power_of_2(max(pairs, 1))),
            RESTP=max(_LEAST, triton.next_power_of_2(rest)) if rest else 0,
            INTERLEAVED=bool(layout.rotary and layout.rotary.interleaved),
            SCALING=layout.rotary.scaling if layout.rotary else 1.0,
            K_PIECES=pieces(layout.key), V_PIECES=pieces(layout.value),
            K_TIERS=_tiers(layout.key), V_TIERS=_tiers(layout.value), RK=layout.key.rank, RV=layout.value.rank,
            K_ROW=layout.key.row_bytes, V_ROW=layout.value.row_bytes,
            NORMALISED=layout.normalised, LOSSLESS=layout.lossless, SINKS=layout.sinks,
            HAS_INDEX=index is not None, HAS_SEEN=seen is not None, HAS_SEGMENTS=segments > 1,
            ONE=count == 1, SLIDES=window > 0, N=TILE, **plan,
        )  # fmt: skip
        _merge_kernel[(min(held * tile, rows - first * tile), batch * groups)](
            part, top, total, out, count, first * tile, held * tile,
            GROUPS=groups, ROWS=heads * gqa, D=dim, DP=padded, S=splits, SP=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out.transpose(1, 2)


def _plan(layout: Layout, batch: int, rows: int, coded: int, exact: int, dtype: torch.dtype) -> dict[str, Any]:
    """How the work is split: programs along the coded tokens and along the exact ones, and query rows a program."""
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    others = batch * layout.groups * triton.cdiv(rows, tile)
    most = max(2, _PROGRAMS // others)  # all programs run at once: the last ones would wait for the first to end
    if layout.lossless:
        splits, exact_splits = 0, min(triton.cdiv(exact + coded, 2 * TILE), most)
    else:
        exact_splits = min(triton.cdiv(exact, 2 * TILE), max(1, most // 4))
        splits = min(triton.cdiv(coded, TILE), most - exact_splits)
    fast = None if dtype == torch.float32 or INTERPRETED else _ASM[dtype]
    return {
        "M": tile,
        "SPLITS": splits,
        "EXACT_SPLITS": exact_splits,
        "DTYPE": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "UNPACK": fast and fast.unpack,
        "ROTATE": fast and fast.rotate,
        "STAGES": 3,
        "num_warps": 4,
    }


def _seen(mask: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor | None, slots: int, count: int) -> torch.Tensor:
    """A mask over columns [B or 1, 1, n, columns] as one over tokens, uint8 [B, n, slots], in which padding is left out."""
    batch, past = columns.shape[0], mask.shape[-1] - count
    held = columns.new_ones(batch, mask.shape[-1])
    held[:, :past] = columns[:, :past]
    if valid is not None:
        held[:, past:] = valid
    token = torch.where(held, held.cumsum(1) - 1, slots)  # padding goes to a slot that is cut off
    wide = torch.zeros(batch, count, slots + 1, dtype=torch.uint8, device=mask.device)
    given = mask[:, 0].expand(batch, -1, -1).to(torch.uint8)
    return wide.scatter_(2, token[:, None].expand_as(given), given)[..., :slots].contiguous()
