"""Attention over a compressed past, in Triton.

The tokens of a row are split among programs. Most take coded tokens: a tile of codes times the basis gives keys in registers,
which are rotated and scored; values stay in the latent until a split ends or, where one basis serves all tokens, until splits
are merged. The others take what is exact: first tokens, recent ones and the chunk. A second kernel merges all of them by
log-sum-exp. In a step of one column these two launches also store it: the first codes what leaves the recent tokens, the second
writes to them.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Layout, Tiers
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.digits import (
    INTERPRETED,
    PACKED,
    digits,
    load,
    matrix,
    opaque,
    pair,
    pieces,
    rows,
    scaled,
    unpack,
)
from spectral_compile.kernels.encode import COLUMNS, LEAST, Tokens, books, enter_one, recent_size, tiles_of
from spectral_compile.kernels.rotary import TILE, sincos, tables

_PAIRS = 32  # RoPE pairs of keys that are in registers at a time
_PROGRAMS = 264  # two for each multiprocessor of an H100
_PASS = 2  # tiles of codes that take a program as long as a tile of what is exact, if it takes both
_SCRATCH = 1 << 24  # numbers that the splits of one launch may leave for the merge
_MERGED = 1 << 12  # and that one warp of the merge holds at a time
_CODERS = 3  # programs that share the coding of a tile
SEGMENTS_AT_ONCE: tl.constexpr = tl.constexpr(256)  # whose starts are compared; of fewer Triton's code spills more
_LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
_REACH: tl.constexpr = tl.constexpr(2048.0)  # of the first coefficient in float16; keys of 192 such ones end at 28378
_FAR: tl.constexpr = tl.constexpr(80.0)  # powers of two that scores may be off their reference: float32 has 126


# Turn two pairs in float16; what Triton makes of the same arithmetic takes twice as many instructions.
_ROTATE = """{ .reg .b32 t, n, z;
    mov.b32 z, 0x80008000; neg.f16x2 n, $5;
    fma.rn.f16x2 t, $3, n, z; fma.rn.f16x2 $0, $2, $4, t;
    fma.rn.f16x2 t, $2, $5, z; fma.rn.f16x2 $1, $3, $4, t; }"""


@triton.jit
def _product(codes, basis, FIRST: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """Keys in the type of their digits: in float16 there is nothing to round, and sums take half the registers."""
    x = tl.dot(codes[0], basis[FIRST], input_precision=PRECISION, out_dtype=codes[0].dtype)
    for i in tl.static_range(1, COUNT):
        x = tl.dot(codes[i], basis[FIRST + i], x, input_precision=PRECISION, out_dtype=codes[0].dtype)
    return x


@triton.jit
def _capped(s, CAP: tl.constexpr):
    """``CAP * tanh(s / CAP)``, or scores as they are where ``CAP`` is 0; all counted in powers of two."""
    return CAP - 2 * CAP / (tl.exp2(s * (2 * _LOG2E / CAP)) + 1) if CAP > 0 else s


@triton.jit
def _inverse(x):
    """1 / x of numbers near 1; a division takes seven instructions more."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


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
def _rotated(k, cos, sin, ROTATE: tl.constexpr, DTYPE: tl.constexpr):
    """Keys [N, 2 * P], first halves of the pairs before second ones, turned by [N, P]."""
    PAIRS: tl.constexpr = k.shape[1] // 2
    k1, k2 = tl.split(tl.permute(tl.reshape(k, (k.shape[0], 2, PAIRS)), (0, 2, 1)))
    if ROTATE is None:
        r1, r2 = (k1 * cos - k2 * sin).to(DTYPE), (k2 * cos + k1 * sin).to(DTYPE)
    else:
        r1, r2 = tl.inline_asm_elementwise(ROTATE, "=r,=r,r,r,r,r", [k1, k2, cos, sin], (DTYPE.value,) * 2, True, 2)
    return pair(r1, r2)


@triton.jit
def _unit(affine, TIERS: tl.constexpr, DTYPE: tl.constexpr):
    """What keys are counted in, and queries times, so that whatever a model's keys are they fit float16.

    Of no coefficient codes stand for much more than of the first, and the columns of a basis are orthonormal.
    """
    unit = 1.0
    if DTYPE == tl.float16:
        LARGEST: tl.constexpr = 128 if TIERS[0] > 0 else 8 if TIERS[1] > 0 else 2
        unit = tl.maximum(tl.load(affine), 1e-30) * (LARGEST / _REACH)
    return unit


@triton.jit
def _key_basis(
    basis, affine, at, D: tl.constexpr, P: tl.constexpr, PQ: tl.constexpr, PARTS: tl.constexpr, RESTP: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, TIERS: tl.constexpr, PIECES: tl.constexpr,
    DTYPE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Matrices from digits to keys times their weights, in ``_unit``s: of each head, each part of its RoPE pairs and what is
    not rotated, each piece of a row."""
    basis, affine = basis + at * (HEADS * D * R), affine + at * (2 * R + HEADS * D)
    gain = 1.0 / _unit(affine, TIERS, DTYPE)
    out = ()
    for h in tl.static_range(HEADS):
        for i in tl.static_range(PARTS):
            column = tl.arange(0, 2 * PQ)
            half, second = i * PQ + column % PQ, column // PQ
            channel = half * 2 + second if INTERLEAVED else half + second * P
            out = out + matrix(basis, affine, h * D + channel, half < P, gain, R, HEADS * D, TIERS, PIECES, DTYPE, SCALED)
        if RESTP > 0:
            rest = 2 * P + tl.arange(0, RESTP)
            out = out + matrix(basis, affine, h * D + rest, rest < D, gain, R, HEADS * D, TIERS, PIECES, DTYPE, SCALED)
    return out


@triton.jit
def _ahead(norms, visible_row, slots, end, NORMALISED: tl.constexpr, HIDES: tl.constexpr):
    """Of tokens [N]: what their scores lose, all where none is seen, and what their values are times."""
    ok = slots < end
    size = 0.0
    if NORMALISED:
        size = tl.exp2((tl.load(norms + slots, mask=ok, other=128).to(tl.float32) - 128) * 0.125)
    if HIDES:
        # no mask for the load: at 32768 tokens it costs attention 4.5 % instead of 1.7
        ok = ok & (tl.load(visible_row + tl.minimum(slots, end - 1)) != 0)
    return tl.where(ok, 0.0, float("-inf")), size


@triton.jit
def _queries(
    q_row, live, turns, scale,
    D: tl.constexpr, P: tl.constexpr, PQ: tl.constexpr, PARTS: tl.constexpr, RESTP: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALING: tl.constexpr,
):  # fmt: skip
    """Queries [M, pairs], first and second halves, and turns [pairs], each a tuple of parts; and what is not rotated."""
    p = tl.arange(0, PQ)
    q1, q2, q3, turn = (), (), (), ()
    for i in tl.static_range(PARTS):
        half = i * PQ + p
        first, second = (half * 2, half * 2 + 1) if INTERLEAVED else (half, half + P)
        held = live[:, None] & (half < P)[None, :]
        q1 = q1 + (tl.load(q_row[:, None] + first[None, :], mask=held, other=0.0).to(tl.float32) * (scale * SCALING),)
        q2 = q2 + (tl.load(q_row[:, None] + second[None, :], mask=held, other=0.0).to(tl.float32) * (scale * SCALING),)
        turn = turn + (tl.load(turns + half, mask=half < P, other=0),)
    if RESTP > 0:
        rest = 2 * P + tl.arange(0, RESTP)
        held = live[:, None] & (rest < D)[None, :]
        q3 = (tl.load(q_row[:, None] + rest[None, :], mask=held, other=0.0).to(tl.float32) * scale,)
    return q1, q2, q3, turn


@triton.jit
def _distances(table, P: tl.constexpr, PQ: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr):
    """Cosines, then sines, [N, pairs] a part, of the distances within a tile."""
    out = ()
    for i in tl.static_range(2 * PARTS):
        half = i % PARTS * PQ + tl.arange(0, PQ)
        at = table + i // PARTS * (N * P) + tl.arange(0, N)[:, None] * P + half[None, :]
        out = out + (tl.load(at, mask=(half < P)[None, :], other=0.0),)
    return out


@triton.jit
def _past(
    queries, distances, basis, head, live, own, low, high, b, g, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine,
    v_affine, starts, row_positions, seen_row, visible_row, coded_cap, segments, slide,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PQ: tl.constexpr,
    PARTS: tl.constexpr, RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, K_PIECES: tl.constexpr, V_PIECES: tl.constexpr,
    K_TIERS: tl.constexpr, V_TIERS: tl.constexpr, SCALED: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, NORMALISED: tl.constexpr, SINKS: tl.constexpr, HAS_SEEN: tl.constexpr,
    HIDES: tl.constexpr, HAS_SEGMENTS: tl.constexpr, SLIDES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DTYPE: tl.constexpr, K_DTYPE: tl.constexpr, K_SCALED: tl.constexpr, V_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    K_UNPACK: tl.constexpr, V_UNPACK: tl.constexpr, ROTATE: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr,
    CAP: tl.constexpr,
    GAPS: tl.constexpr,
):  # fmt: skip
    """Attention to coded tokens from ``low`` to ``high``: a tuple of sums, references [M] and sums of weights [M].

    Sums are of values, [M, DP], or where ``LATE`` of their digits, [M, digits] a piece.

    Without ``GAPS`` positions run on by one: keys are turned by their distance from the first token of their tile, which a
    table knows, and queries by the rest. Scores count from a reference that stays: no warp waits for another one's maximum.
    Where one turns out to be far off, all is done again from the maximum.
    """
    KN: tl.constexpr = len(K_PIECES)
    VN: tl.constexpr = len(V_PIECES)
    PER: tl.constexpr = PARTS * KN + (KN if RESTP > 0 else 0)
    p, d, t = tl.arange(0, PQ), tl.arange(0, DP), tl.arange(0, N)
    q1, q2, q3, turn = queries
    step_cos, step_sin = (), ()
    for i in tl.static_range(0 if GAPS else PARTS):
        s, c = sincos(tl.full([1], N, tl.int32), turn[i][None, :])
        step_sin, step_cos = step_sin + (s,), step_cos + (c,)
    if RESTP > 0:
        rest = 2 * P + tl.arange(0, RESTP)
    begin, first_row = low, (b * GROUPS + g).to(tl.int64) * coded_cap
    reference, top = tl.zeros([M], tl.float32), tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([N, M], tl.float32)
    sums = ()
    for i in tl.static_range(VN if LATE else 1):
        sums = sums + (tl.zeros([M, V_PIECES[i][2] * (16 // V_PIECES[i][3]) if LATE else DP], tl.float32),)
    again = low < high
    while again:
        low, segment = begin, 0
        highest = tl.full([N, M], float("-inf"), tl.float32)
        total = tl.zeros([N, M], tl.float32)
        if not LATE:
            out = tl.zeros([M, DP], tl.float32)
        if HAS_SEGMENTS:
            for first in range(1, segments, SEGMENTS_AT_ONCE):
                later = first + tl.arange(0, SEGMENTS_AT_ONCE)
                begun = tl.load(starts + b * segments + later, mask=later < segments, other=2147483647) <= low
                segment += tl.sum(begun.to(tl.int32), 0)
        while low < high:
            end = high
            at = (b * GROUPS + g) * segments + segment
            if HAS_SEGMENTS:
                if segment + 1 < segments:
                    end = tl.minimum(high, tl.load(starts + b * segments + segment + 1))
                held_basis = _key_basis(k_basis, k_affine, at, D, P, PQ, PARTS, RESTP, INTERLEAVED, HEADS, RK, K_TIERS,
                                        K_PIECES, K_DTYPE, K_SCALED)  # fmt: skip
            else:
                held_basis = basis
            latent = ()
            for i in tl.static_range(VN):
                latent = latent + (tl.zeros([M, V_PIECES[i][2] * (16 // V_PIECES[i][3])], tl.float32),)
            affine_at = k_affine + at * (2 * RK + HEADS * D)
            weights_at = affine_at + 2 * RK + head * D  # equal in the two channels of a pair
            unit = _unit(affine_at, K_TIERS, K_DTYPE)
            r1, r2 = (), ()
            for i in tl.static_range(PARTS):
                half = i * PQ + p
                channel = half * 2 if INTERLEAVED else half
                held = live[:, None] & (half < P)[None, :]
                even = _inverse(tl.load(weights_at[:, None] + channel[None, :], mask=held, other=1.0)) * unit
                if GAPS:
                    r1, r2 = r1 + (q1[i] * even,), r2 + (q2[i] * even,)
                else:
                    sin0, cos0 = sincos(tl.load(row_positions + low), turn[i][None, :])
                    r1 = r1 + ((q1[i] * cos0 + q2[i] * sin0) * even,)
                    r2 = r2 + ((q2[i] * cos0 - q1[i] * sin0) * even,)
            if RESTP > 0:
                unturned = live[:, None] & (rest < D)[None, :]  # a name of its own: in a loop Triton lets none change its shape
                even = _inverse(tl.load(weights_at[:, None] + rest[None, :], mask=unturned, other=1.0)) * unit
                r3 = (q3[0] * even).to(K_DTYPE)
            # a step ahead: to hide latency, and as Triton lays out an operand for the narrowest type that a step makes it of
            v_rows = load(v_codes + first_row * V_ROW, low + t, low + t < end, V_ROW, V_PIECES)
            gone, size = _ahead(v_norms + first_row, visible_row, low + t, end, NORMALISED, HIDES)
            for start in tl.range(low, end, N, num_stages=STAGES):
                slots = start + t
                ok = slots < end
                codes = digits(load(k_codes + first_row * K_ROW, slots, ok, K_ROW, K_PIECES), K_PIECES, K_DTYPE, K_UNPACK)
                if GAPS:
                    where = tl.load(row_positions + slots, mask=ok, other=0)[:, None]
                scores = tl.zeros([N, M], tl.float32)
                for h in tl.static_range(HEADS):
                    for i in tl.static_range(PARTS):
                        k = _product(codes, held_basis, h * PER + i * KN, KN, PRECISION)
                        if GAPS:
                            s, c = sincos(where, turn[i][None, :])
                            k = _rotated(k, c.to(K_DTYPE), s.to(K_DTYPE), ROTATE, K_DTYPE)
                        else:
                            k = _rotated(k, distances[i], distances[PARTS + i], ROTATE, K_DTYPE)
                        q = _own(pair(r1[i].to(K_DTYPE), r2[i].to(K_DTYPE)), head, h, HEADS)
                        scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
                    if RESTP > 0:
                        k = _product(codes, held_basis, h * PER + PARTS * KN, KN, PRECISION)
                        scores = tl.dot(k, tl.trans(_own(r3, head, h, HEADS)), scores, input_precision=PRECISION)
                if not GAPS:
                    n1, n2 = (), ()
                    for i in tl.static_range(PARTS):
                        n1 = n1 + (r1[i] * step_cos[i] + r2[i] * step_sin[i],)
                        n2 = n2 + (r2[i] * step_cos[i] - r1[i] * step_sin[i],)
                    r1, r2 = n1, n2
                scores = _capped(scores, CAP) + gone[:, None]
                if SLIDES:
                    scores = tl.where((SINKS + slots)[:, None] > (own - slide)[None, :], scores, float("-inf"))
                if HAS_SEEN:
                    asked = ok[:, None] & live[None, :]
                    visible = tl.load(seen_row[None, :] + (SINKS + slots)[:, None], mask=asked, other=0) != 0
                    scores = tl.where(visible, scores, float("-inf"))
                highest = tl.maximum(highest, scores)
                weights = tl.exp2(scores - reference[None, :])
                total += weights
                if NORMALISED:
                    weights = weights * size[:, None]
                gone, size = _ahead(v_norms + first_row, visible_row, slots + N, end, NORMALISED, HIDES)
                mixing = tl.trans(weights.to(V_DTYPE))
                if V_DTYPE != DTYPE:
                    lost = tl.trans((weights - weights.to(V_DTYPE).to(tl.float32)).to(V_DTYPE))
                values = opaque(digits(v_rows, V_PIECES, V_DTYPE, V_UNPACK))
                v_rows = load(v_codes + first_row * V_ROW, slots + N, slots + N < end, V_ROW, V_PIECES)
                grown = ()
                for i in tl.static_range(VN):
                    x = tl.dot(mixing, values[i], latent[i], input_precision=PRECISION)
                    if V_DTYPE != DTYPE:
                        x = tl.dot(lost, values[i], x, input_precision=PRECISION)
                    grown = grown + (x,)
                latent = grown
            if LATE:
                sums = latent
            else:
                side, affine = v_basis + at * (HEADS * D * RV), v_affine + at * (2 * RV + HEADS * D)
                for h in tl.static_range(HEADS):
                    back = matrix(side, affine, h * D + d, d < D, 1.0, RV, HEADS * D, V_TIERS, V_PIECES, DTYPE, SCALED)
                    x = tl.zeros([M, DP], tl.float32)
                    for i in tl.static_range(VN):
                        y = _own(latent[i], head, h, HEADS)
                        if V_DTYPE == DTYPE:
                            x = tl.dot(y.to(DTYPE), back[i], x, input_precision=PRECISION)
                        else:
                            x = tl.dot(y, back[i].to(tl.float32), x, input_precision="tf32")
                    out += x / tl.load(affine + 2 * RV + h * D + d, mask=d < D, other=1.0)[None, :]
                sums = (out,)
            low = end
            segment += 1
        top = tl.max(highest, 0)
        far = ((top > reference + _FAR) | (top < reference - _FAR)) & (top > float("-inf"))
        again = tl.max(far.to(tl.int32), 0) > 0
        reference = tl.where(far, top, reference)
    return sums, tl.where(top == float("-inf"), float("-inf"), reference), tl.sum(total, 0)


@triton.jit
def _leave(sums, highest, total, out_ptr, max_ptr, sum_ptr, at, WIDTH: tl.constexpr, PLACES: tl.constexpr):
    """Store what one split has come to, a row of ``WIDTH`` for each of M pairs, for the merge."""
    tl.store(max_ptr + at, highest)
    tl.store(sum_ptr + at, total)
    for i in tl.static_range(len(sums)):
        tl.store(out_ptr + at[:, None] * WIDTH + (PLACES[i] + tl.arange(0, sums[i].shape[1]))[None, :], sums[i])


@triton.jit
def _exact(at, ok, channels, live, bytes_at, in_bytes, BYTES: tl.constexpr):
    """Channels [N, channels] of tokens that are not coded, in float32; ``at``, or ``bytes_at``, is where each begins."""
    x = tl.load(at[:, None] + channels[None, :], mask=ok[:, None] & live[None, :], other=0.0).to(tl.float32)
    if BYTES:
        x += tl.load(bytes_at[:, None] + channels[None, :], mask=in_bytes[:, None] & live[None, :], other=0).to(tl.float32)
    return x


@triton.jit
def _bytes(recent, sizes, first, place, in_bytes, D: tl.constexpr, BYTES: tl.constexpr):
    """Where tokens of a window of bytes begin, and what tokens are times; ``first`` is the head's first place."""
    at, size = first, 1.0
    if BYTES:
        at = first + place
        size = recent_size(tl.load(sizes + at, mask=in_bytes, other=192))  # what is exact is times 1
        at = recent + at * D
    return at, size


@triton.jit
def _address(
    codes, exact, new, e, kept, column, is_code, is_new, b, g, h, coded_cap, rows, by_row, by_head, by_column,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, LOSSLESS: tl.constexpr,
):  # fmt: skip
    """Where each of the exact keys or values begins: among a lossless store's codes, in the window or in the chunk."""
    kv = g * HEADS + h
    at = exact + ((b * GROUPS * HEADS + kv) * rows + kept) * D
    at = tl.where(is_new, new + b * by_row + kv * by_head + column * by_column, at)
    if LOSSLESS:
        first_row = (b * GROUPS + g).to(tl.int64) * coded_cap
        at = tl.where(is_code, codes + (first_row + e) * (HEADS * D) + h * D, at)
    return at


@triton.jit
def _values(
    codes, exact_values, new, recent, sizes, e, kept, column, place, is_code, is_new, exact, in_bytes, b, g, h, d, coded_cap,
    rows, ring, by_row, by_head, by_column,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, LOSSLESS: tl.constexpr, DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Values [N, DP] of tokens that are not coded, of one head."""
    at = _address(codes, exact_values, new, e, kept, column, is_code, is_new, b, g, h, coded_cap, rows, by_row, by_head,
                  by_column, GROUPS, HEADS, D, LOSSLESS)  # fmt: skip
    bytes_at, size = _bytes(recent, sizes, ((b * GROUPS + g) * HEADS + h) * ring, place, in_bytes, D, BYTES)
    x = _exact(at, exact, d, d < D, bytes_at, in_bytes, BYTES)
    return (x * size[:, None] if BYTES else x).to(DTYPE)


@triton.jit
def _present(
    q_row, head, live, own, part, parts, b, g, n, before, coded, scale, k_ptr, v_ptr, k_codes, v_codes, k_exact, v_exact,
    k_recent, v_recent, k_sizes, v_sizes, row_positions, index, seen_row, visible_row, turns, coded_cap, exact_cap,
    slide, k_b, k_h, k_n, v_b, v_h, v_n,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, SCALING: tl.constexpr, LOSSLESS: tl.constexpr, SINKS: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_SEEN: tl.constexpr, HIDES: tl.constexpr, SLIDES: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Attention to one part of what is not coded: sums ([M, DP],), their maxima [M] and sums of weights [M].

    In this order: codes of a lossless store, first tokens, recent ones, chunk.
    """
    PER: tl.constexpr = (2 if P > 0 else 0) + (1 if RESTP > 0 else 0)
    EARLY: tl.constexpr = N * HEADS * DP <= 8192  # else values take too many registers beside the keys
    p, d, t = tl.arange(0, PP), tl.arange(0, DP), tl.arange(0, N)
    real = p < P
    first, second = (p * 2, p * 2 + 1) if INTERLEAVED else (p, p + P)
    q1, q2, q3, turn = _queries(q_row, live, turns, scale, D, P, PP, 1 if P > 0 else 0, RESTP, INTERLEAVED, SCALING)
    if RESTP > 0:
        rest = 2 * P + tl.arange(0, RESTP)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([N, M], tl.float32)
    out = tl.zeros([M, DP], tl.float32)
    codes_first = coded if LOSSLESS else 0
    in_first = tl.minimum(before, SINKS)
    ring_first = codes_first + in_first
    new_first = ring_first + tl.maximum(before - SINKS - coded, 0)
    count = new_first + n
    share = tl.cdiv(tl.cdiv(count, N), parts) * N
    low = part * share
    ring = exact_cap - SINKS
    rows = SINKS if BYTES else exact_cap
    oldest = coded % ring
    for start in tl.range(low, tl.minimum(low + share, count), N, num_stages=1):
        e = start + t
        is_code, is_new, ok = e < codes_first, e >= new_first, e < count
        column = e - new_first
        place = oldest + e - ring_first
        place = tl.where(place < ring, place, place - ring)
        kept = tl.where(e < ring_first, e - codes_first, SINKS + place)
        token = tl.where(e < ring_first, e - codes_first, SINKS + coded + e - ring_first)
        token = tl.where(is_code, SINKS + e, token)
        if HAS_INDEX:
            rank = tl.load(index + b * n + column, mask=is_new & ok, other=-1)
            previous = tl.load(index + b * n + column - 1, mask=is_new & ok & (column > 0), other=-1)
            token = tl.where(is_new, before + rank, token)
            ok = ok & (~is_new | (rank > previous))
        else:
            token = tl.where(is_new, before + column, token)
        if HIDES:
            ok = ok & (tl.load(visible_row + token, mask=ok & (e < new_first), other=1) != 0)
        in_bytes = ok & (e >= ring_first) & ~is_new
        exact = ok & ~in_bytes if BYTES else ok
        if P > 0:
            where = tl.load(row_positions + token, mask=ok, other=0)
            sin, cos = sincos(where[:, None], turn[0][None, :])
        # all is loaded before the first of it is waited for
        keys, sizes, values = (), (), ()
        for h in tl.static_range(HEADS):
            k_at = _address(k_codes, k_exact, k_ptr, e, kept, column, is_code, is_new, b, g, h, coded_cap, rows, k_b, k_h,
                            k_n, GROUPS, HEADS, D, LOSSLESS)  # fmt: skip
            bytes_at, size = _bytes(k_recent, k_sizes, ((b * GROUPS + g) * HEADS + h) * ring, place, in_bytes, D, BYTES)
            sizes = sizes + (size,)
            if P > 0:
                k1 = _exact(k_at, exact, first, real, bytes_at, in_bytes, BYTES)
                k2 = _exact(k_at, exact, second, real, bytes_at, in_bytes, BYTES)
                keys = keys + ((k1 * cos - k2 * sin).to(DTYPE), (k2 * cos + k1 * sin).to(DTYPE))
            if RESTP > 0:
                keys = keys + (_exact(k_at, exact, rest, rest < D, bytes_at, in_bytes, BYTES).to(DTYPE),)
            if EARLY:
                x = _values(v_codes, v_exact, v_ptr, v_recent, v_sizes, e, kept, column, place, is_code, is_new, exact,
                            in_bytes, b, g, h, d, coded_cap, rows, ring, v_b, v_h, v_n, GROUPS, HEADS, D, LOSSLESS, DTYPE,
                            BYTES)  # fmt: skip
                values = values + (x,)
        keys, values = opaque(keys), opaque(values)
        scores = tl.zeros([N, M], tl.float32)
        for h in tl.static_range(HEADS):
            x = tl.zeros([N, M], tl.float32) if BYTES else scores
            if P > 0:
                x = tl.dot(keys[h * PER], tl.trans(_own(q1[0].to(DTYPE), head, h, HEADS)), x, input_precision=PRECISION)
                x = tl.dot(keys[h * PER + 1], tl.trans(_own(q2[0].to(DTYPE), head, h, HEADS)), x, input_precision=PRECISION)
            if RESTP > 0:
                x = tl.dot(
                    keys[h * PER + PER - 1], tl.trans(_own(q3[0].to(DTYPE), head, h, HEADS)), x, input_precision=PRECISION
                )
            scores = scores + x * sizes[h][:, None] if BYTES else x
        if HAS_SEEN:
            visible = ok[:, None] & live[None, :]
            visible = visible & (tl.load(seen_row[None, :] + token[:, None], mask=visible, other=0) != 0)
        else:
            visible = ok[:, None] & (token[:, None] <= own[None, :])
            if SLIDES:
                visible = visible & (token[:, None] > (own - slide)[None, :])
        highest, alpha, weights = _merge_max(tl.where(visible, _capped(scores, CAP), float("-inf")), highest)
        total = total * alpha[None, :] + weights
        out = out * alpha[:, None]
        mixing = tl.trans(weights.to(DTYPE))
        for h in tl.static_range(HEADS):
            if EARLY:
                x = values[h]
            else:
                x = _values(v_codes, v_exact, v_ptr, v_recent, v_sizes, e, kept, column, place, is_code, is_new, exact,
                            in_bytes, b, g, h, d, coded_cap, rows, ring, v_b, v_h, v_n, GROUPS, HEADS, D, LOSSLESS, DTYPE,
                            BYTES)  # fmt: skip
            out = tl.dot(_own(mixing, head, h, HEADS), x, out, input_precision=PRECISION)
    return (out,), highest, tl.sum(total, 0)


@triton.jit(do_not_specialize=["splits", "exact_splits", "exact_from", "exact_cap", "slots_cap", "coders"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine, k_exact, v_exact, k_recent, v_recent,
    k_sizes, v_sizes, starts, ledger, positions, index, seen, visible, turns, table, entering, code_tiles, coders, out_ptr,
    max_ptr, sum_ptr, splits, exact_splits, exact_from, n, first_tile, coded_cap, exact_cap, segments, slots_cap, seen_cap,
    slide, scale, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, PQ: tl.constexpr, PARTS: tl.constexpr, RESTP: tl.constexpr,
    INTERLEAVED: tl.constexpr, SCALING: tl.constexpr, K_PIECES: tl.constexpr, V_PIECES: tl.constexpr,
    K_TIERS: tl.constexpr, V_TIERS: tl.constexpr, SCALED: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, NORMALISED: tl.constexpr, LOSSLESS: tl.constexpr, SINKS: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_SEEN: tl.constexpr, HIDES: tl.constexpr, HAS_SEGMENTS: tl.constexpr, ONE: tl.constexpr,
    SLIDES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DTYPE: tl.constexpr, K_DTYPE: tl.constexpr, K_SCALED: tl.constexpr, V_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    K_UNPACK: tl.constexpr, V_UNPACK: tl.constexpr, ROTATE: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr,
    WIDTH: tl.constexpr, PLACES: tl.constexpr, CAP: tl.constexpr, EXACT_N: tl.constexpr, BYTES: tl.constexpr,
    ENTERS: tl.constexpr, CONSTANTS: tl.constexpr,
):  # fmt: skip
    """One split of the tokens of one group of KV heads, for M (query, head) pairs.

    The first ``splits`` programs take coded tokens, those from ``exact_from`` on what is exact; some may take both.
    """
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
    visible_row = positions
    if HIDES:
        visible_row = visible + b * slots_cap

    q_row = q_ptr + b * q_b + (g * ROWS + qh) * q_h + qi * q_n
    scale = scale * _LOG2E
    row_positions = positions + b * slots_cap
    at = ((pair.to(tl.int64) * tl.num_programs(1) + tile) * M + tl.arange(0, M)) * (splits + exact_splits)
    if not LOSSLESS and split < splits:
        # all that depends on nothing is on its way before anything is waited for
        queries = _queries(q_row, live, turns, scale, D, P, PQ, PARTS, RESTP, INTERLEAVED, SCALING)
        distances = _distances(table, P, PQ, PARTS, N)
        gaps = tl.load(ledger + b * COLUMNS + 5)
        basis = ()
        if not HAS_SEGMENTS:
            basis = _key_basis(k_basis, k_affine, b * GROUPS + g, D, P, PQ, PARTS, RESTP, INTERLEAVED, HEADS, RK, K_TIERS,
                               K_PIECES, K_DTYPE, K_SCALED)  # fmt: skip
        distances = opaque(distances)
        low = 0
        if SLIDES:
            low = tl.maximum(tl.min(tl.where(live, own, 2147483647)) - slide + 1 - SINKS, 0) // N * N
        share = tl.cdiv(tl.cdiv(tl.maximum(coded - low, 0), N), splits) * N
        low += split * share
        high = tl.minimum(low + share, coded)
        if gaps == 0:
            sums, highest, total = _past(
                queries, distances, basis, head, live, own, low, high, b, g, k_codes, v_codes, v_norms, k_basis, v_basis,
                k_affine, v_affine, starts, row_positions + SINKS, seen_row, visible_row + SINKS, coded_cap, segments,
                slide, GROUPS, HEADS, D, DP, P, PQ, PARTS, RESTP, INTERLEAVED, K_PIECES, V_PIECES, K_TIERS, V_TIERS, SCALED, RK,
                RV, K_ROW, V_ROW, NORMALISED, SINKS, HAS_SEEN, HIDES, HAS_SEGMENTS, SLIDES, M, N, DTYPE, K_DTYPE, K_SCALED,
                V_DTYPE, PRECISION, K_UNPACK, V_UNPACK, ROTATE, STAGES, LATE, CAP, False,
            )  # fmt: skip
        else:
            sums, highest, total = _past(
                queries, distances, basis, head, live, own, low, high, b, g, k_codes, v_codes, v_norms, k_basis, v_basis,
                k_affine, v_affine, starts, row_positions + SINKS, seen_row, visible_row + SINKS, coded_cap, segments,
                slide, GROUPS, HEADS, D, DP, P, PQ, PARTS, RESTP, INTERLEAVED, K_PIECES, V_PIECES, K_TIERS, V_TIERS, SCALED, RK,
                RV, K_ROW, V_ROW, NORMALISED, SINKS, HAS_SEEN, HIDES, HAS_SEGMENTS, SLIDES, M, N, DTYPE, K_DTYPE, K_SCALED,
                V_DTYPE, PRECISION, K_UNPACK, V_UNPACK, ROTATE, STAGES, LATE, CAP, True,
            )  # fmt: skip
        _leave(sums, highest, total, out_ptr, max_ptr, sum_ptr, at + split, WIDTH, PLACES)
    part = split - exact_from
    if part >= 0 and part < exact_splits:
        own_sums, own_highest, own_total = _present(
            q_row, head, live, own, part, exact_splits, b, g, n, before, coded, scale, k_ptr, v_ptr, k_codes, v_codes,
            k_exact, v_exact, k_recent, v_recent, k_sizes, v_sizes, row_positions, index, seen_row, visible_row, turns,
            coded_cap, exact_cap, slide, k_b, k_h, k_n, v_b, v_h, v_n, GROUPS, HEADS, D, DP, P, PP, RESTP, INTERLEAVED, SCALING,
            LOSSLESS, SINKS, HAS_INDEX, HAS_SEEN, HIDES, SLIDES, M, EXACT_N, DTYPE, PRECISION, CAP, BYTES,
        )  # fmt: skip
        _leave(own_sums, own_highest, own_total, out_ptr, max_ptr, sum_ptr, at + splits + part, WIDTH, PLACES)
        if ENTERS and tile == 0:
            for job in range(part, 2 * code_tiles * coders, exact_splits):
                coded_tile, side = job // (2 * coders), job // coders % 2
                enter_one(coded_tile, pair, side, job % coders, coders, entering, CONSTANTS, True, False, PRECISION)


@triton.jit
def _parts(
    max_ptr, out_ptr, at, start, splits, d,
    V_PIECES: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Of splits from ``start`` on references [AT_ONCE] and what they left: values [AT_ONCE, channels], or digits a piece."""
    some = start + tl.arange(0, AT_ONCE)
    there = (some < splits)[:, None]
    parts = ()
    for i in tl.static_range(len(V_PIECES) if LATE else 1):
        c = PLACES[i] + tl.arange(0, V_PIECES[i][2] * (16 // V_PIECES[i][3])) if LATE else d
        parts = parts + (tl.load(out_ptr + (at + some)[:, None] * WIDTH + c[None, :], mask=there, other=0.0),)
    return tl.load(max_ptr + at + some, mask=some < splits, other=float("-inf")), parts


@triton.jit(do_not_specialize=["splits", "exact_splits", "first", "stride", "merged"])
def _merge_kernel(
    out_ptr, max_ptr, sum_ptr, result, splits, exact_splits, count, first, stride, merged, entering, code_tiles,
    v_basis, v_affine, sink_score,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHANNELS: tl.constexpr,
    HELD: tl.constexpr, SP: tl.constexpr, EP: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr,
    PLACES: tl.constexpr, LATE: tl.constexpr, RV: tl.constexpr, V_TIERS: tl.constexpr, V_PIECES: tl.constexpr,
    HAS_SINK: tl.constexpr, ENTERS: tl.constexpr, CONSTANTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one (query, head) pair, counted from ``first``, and the sink score into ``result`` [B, n, Hq, D].

    Where one column ``ENTERS`` the store, two programs after the ``merged`` ones of a group write it to the window, which has
    been read by then; what leaves the window has been coded beside the attention.
    """
    m, pair = tl.program_id(0), tl.program_id(1)
    if m < merged:
        g = pair % GROUPS
        at = (pair.to(tl.int64) * stride + m) * (splits + exact_splits)
        m += first
        s, e = tl.arange(0, SP), tl.arange(0, EP)
        d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        channel, back = m % ROWS // (ROWS // HEADS) * D + d, ()
        affine = v_affine + pair * (2 * RV + HEADS * D)
        if LATE:  # loaded beside what splits have left, not after it
            for i in tl.static_range(len(V_PIECES)):
                x, scale = rows(v_basis + pair * (HEADS * D * RV), affine, channel, d < D, RV, HEADS * D, V_TIERS,
                                V_PIECES[i][0], V_PIECES[i][1], V_PIECES[i][2], V_PIECES[i][3])  # fmt: skip
                back = back + ((x, scale),)
            even = _inverse(tl.load(affine + 2 * RV + channel, mask=d < D, other=1.0))
        every = s < splits + exact_splits
        highest = tl.load(max_ptr + at + s, mask=every, other=float("-inf"))
        total = tl.load(sum_ptr + at + s, mask=every, other=0.0)
        exact = tl.load(max_ptr + at + splits + e, mask=e < exact_splits, other=float("-inf"))
        held = (e < exact_splits)[:, None]
        exact_parts = tl.load(out_ptr + (at + splits + e)[:, None] * WIDTH + d[None, :], mask=held, other=0.0)
        maxima, parts = _parts(max_ptr, out_ptr, at, 0, splits, d, V_PIECES, AT_ONCE, WIDTH, PLACES, LATE)
        top = tl.max(highest, 0)
        if HAS_SINK:
            taken = tl.load(sink_score + g * ROWS + m % ROWS).to(tl.float32) * _LOG2E
            top = tl.maximum(top, taken)
        top = tl.where(top == float("-inf"), 0.0, top)
        norm = tl.sum(tl.exp2(highest - top) * total, 0)
        if HAS_SINK:
            norm += tl.exp2(taken - top)
        norm = tl.where(norm == 0, 1.0, norm)
        latent = ()
        for i in tl.static_range(len(parts)):
            latent = latent + (tl.sum(parts[i] * tl.exp2(maxima - top)[:, None], 0),)
        for start in range(AT_ONCE, HELD, AT_ONCE):
            maxima, parts = _parts(max_ptr, out_ptr, at, start, splits, d, V_PIECES, AT_ONCE, WIDTH, PLACES, LATE)
            grown = ()
            for i in tl.static_range(len(latent)):
                grown = grown + (latent[i] + tl.sum(parts[i] * tl.exp2(maxima - top)[:, None], 0),)
            latent = grown
        place = ((pair // GROUPS * count + m // ROWS) * GROUPS + g) * ROWS + m % ROWS
        mixed = tl.sum(exact_parts * tl.exp2(exact - top)[:, None], 0)
        if LATE:
            valued = tl.zeros([CHANNELS], tl.float32)
            for i in tl.static_range(len(V_PIECES)):
                valued += tl.sum(back[i][0].to(tl.float32) * (latent[i] * back[i][1])[:, None], 0)
            mixed += valued * even
        else:
            mixed += latent[0]
        tl.store(result + place * D + d, (mixed * (1 / norm)).to(result.dtype.element_ty), mask=d < D)
    else:
        if ENTERS and tl.program_id(2) == 0:
            enter_one(code_tiles, pair, m - merged, 0, 1, entering, CONSTANTS, False, True, PRECISION)


def _keys_in(dtype: torch.dtype) -> torch.dtype:
    """What coded keys are computed in: float16, which is more exact than bfloat16, for any model of 16 bits."""
    return torch.float32 if dtype == torch.float32 else torch.float16


_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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
    sliding_window: int,
    softcap: float = 0.0,
    sink_score: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    enters: bool = False,
) -> torch.Tensor:
    """``reference.attend`` by kernels; nothing waits for the device, and the grid depends on shapes alone.

    A chunk of one column that ``enters`` the store does so in the same launches, as ``reference.append`` has it.
    """
    batch, q_heads, count, dim = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    groups, heads, gqa = layout.groups, layout.head_group, q_heads // layout.kv_heads
    rows = count * heads * gqa
    coded_cap, segments = buffers.k_codes.shape[2], buffers.starts.shape[1]
    exact_cap = layout.first_exact + buffers.recent_slots(layout)
    plan = _plan(layout, batch, rows, coded_cap, exact_cap + count, query.dtype)
    tile = plan["M"]
    tiles = triton.cdiv(rows, tile)
    shares, programs = plan.pop("shares"), plan.pop("programs")
    splits, exact_from = sum(shares), programs - shares[1]
    padded = triton.next_power_of_2(dim)
    # where one basis serves all tokens, its product with what values came to is left for the end
    late = count == 1 and segments == 1 and not layout.lossless
    widths = [extent * (16 // bits) for _, _, extent, bits in plan["V_PIECES"]] if late else []
    places = tuple(accumulate(widths, initial=0))
    left = {"WIDTH": max(padded, places[-1]), "PLACES": places, "LATE": late}
    cap = softcap * _LOG2E.value
    out = query.new_empty(batch, count, q_heads, dim)
    index = valid.cumsum(1, dtype=torch.int32) - 1 if valid is not None and count > 1 else None
    seen = None if mask is None else _seen(mask, columns, valid, positions.shape[1], count)
    turns, table = tables(layout.rotary, query.device, _keys_in(query.dtype))
    pairs = layout.rotary.dim // 2 if layout.rotary else 0
    padded_pairs, rest = max(LEAST, triton.next_power_of_2(max(pairs, 1))), dim - 2 * pairs
    codes = [x if layout.lossless else x.view(torch.int16) for x in (buffers.k_codes, buffers.v_codes)]
    # that a program of the merge takes; one warp has no barriers to wait at, which is faster for all that it reads again
    channels, warps = (min(8, padded), 1) if late else (padded, 4)
    code_tiles, entering, constants = tiles_of(layout.block), None, None
    # alone, a program takes longer to code a tile than to attend
    coders = 1 if layout.lossless else max(1, min(_CODERS, shares[1] // (2 * code_tiles)))
    if enters:
        tokens = Tokens(query, key, value, ledger, valid, buffers, layout)
        entering, constants = tokens.pointers(code_tiles), tokens.step()
    held_splits = triton.next_power_of_2(max(1, shares[0]))
    widest = triton.next_power_of_2(max(widths, default=channels))  # piece of what a split leaves
    most = max(1, _SCRATCH // (batch * groups * tile * splits * left["WIDTH"]))  # tiles of queries at a time
    for first in range(0, tiles, most):
        held = min(most, tiles - first)
        now = enters and first + held == tiles
        part = query.new_empty(batch * groups, held * tile, splits, left["WIDTH"], dtype=torch.float32)
        top, total = query.new_empty(2, *part.shape[:-1], dtype=torch.float32)
        _attend_kernel[(programs, held, batch * groups)](
            query, key, value, *codes, buffers.v_norms, buffers.k_basis, buffers.v_basis, buffers.k_affine, buffers.v_affine,
            buffers.k_exact, buffers.v_exact, buffers.k_recent, buffers.v_recent, buffers.k_sizes, buffers.v_sizes,
            buffers.starts, ledger, positions, index, seen, visible, turns, table, entering, code_tiles, coders, part, top,
            total, *shares, exact_from, count, first, coded_cap, exact_cap, segments, positions.shape[1],
            0 if seen is None else seen.shape[2], sliding_window, scale,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            GROUPS=groups, HEADS=heads, GQA=gqa, D=dim, DP=padded,
            P=pairs, PP=padded_pairs, PQ=min(_PAIRS, padded_pairs), PARTS=-(-pairs // _PAIRS),
            RESTP=max(LEAST, triton.next_power_of_2(rest)) if rest else 0,
            INTERLEAVED=bool(layout.rotary and layout.rotary.interleaved),
            SCALING=layout.rotary.scaling if layout.rotary else 1.0,
            K_TIERS=_tiers(layout.key), V_TIERS=_tiers(layout.value), RK=layout.key.rank, RV=layout.value.rank,
            K_ROW=layout.key.row_bytes // 2, V_ROW=layout.value.row_bytes // 2,
            NORMALISED=layout.normalised, LOSSLESS=layout.lossless, SINKS=layout.first_exact, BYTES=layout.recent_bits == 8,
            HAS_INDEX=index is not None, HAS_SEEN=seen is not None, HIDES=visible is not None, HAS_SEGMENTS=segments > 1,
            ONE=count == 1, SLIDES=sliding_window > 0, N=TILE, CAP=cap, ENTERS=now, CONSTANTS=constants, **plan, **left,
        )  # fmt: skip
        merged = min(held * tile, rows - first * tile)
        _merge_kernel[(merged + 2 * now, batch * groups, padded // channels)](
            part, top, total, out, *shares, count, first * tile, held * tile, merged, entering, code_tiles,
            buffers.v_basis, buffers.v_affine, sink_score,
            GROUPS=groups, ROWS=heads * gqa, HEADS=heads, D=dim, DP=padded, CHANNELS=channels,
            HELD=held_splits, AT_ONCE=min(held_splits, warps * _MERGED // widest), SP=triton.next_power_of_2(splits),
            EP=triton.next_power_of_2(max(1, shares[1])),
            RV=layout.value.rank, V_TIERS=_tiers(layout.value), V_PIECES=plan["V_PIECES"],
            HAS_SINK=sink_score is not None, ENTERS=now, CONSTANTS=constants, PRECISION=plan["PRECISION"], **left,
            num_warps=warps,
        )  # fmt: skip
    return out.transpose(1, 2)


def _plan(layout: Layout, batch: int, rows: int, coded: int, exact: int, dtype: torch.dtype) -> dict[str, Any]:
    """How the work is split: into shares of the coded tokens and of the exact ones, programs, and query rows a program."""
    wide = layout.width > 192  # whose bases leave too little shared memory for more queries
    tile = 16 if rows <= 16 else 32 if rows <= 32 or wide else 64
    others = batch * layout.groups * triton.cdiv(rows, tile)
    most = max(2, _PROGRAMS // others)  # all programs run at once: the last ones would wait for the first to end
    # of few queries what takes time is to fetch instructions, of which a small tile needs fewer
    exact_tile = TILE if layout.lossless or tile > LEAST else TILE // 4
    tiles, exact_tiles = triton.cdiv(coded, TILE), triton.cdiv(exact, exact_tile)
    if layout.lossless:
        splits, exact_splits = 0, min(triton.cdiv(exact + coded, 2 * TILE), most)
        programs = exact_splits
    else:
        # a program that takes what is exact has the time of several tiles of codes if others have many
        share = max(exact_tile, min(2 * TILE, coded // (8 * most)) // exact_tile * exact_tile)
        exact_splits = min(triton.cdiv(exact, share), max(1, most // 4))
        splits = min(tiles, most - exact_splits)
        programs = splits + exact_splits
        if tiles and triton.cdiv(tiles, splits) - triton.cdiv(tiles, most) > _PASS * triton.cdiv(exact_tiles, most):
            splits = programs = most
            exact_splits = min(exact_tiles, most)
    # weights may be as far from 1 as scores from their reference, for which float16 has no exponents
    mixed, keys = dtype, _keys_in(dtype)
    if dtype == torch.float16:
        mixed = torch.float32 if INTERPRETED.value else torch.bfloat16  # of which the interpreter makes no products
    return {
        "M": tile,
        "shares": (splits, exact_splits),
        "programs": programs,
        "EXACT_N": exact_tile,
        "K_PIECES": pieces(layout.key),
        "V_PIECES": pieces(layout.value),
        "DTYPE": _TRITON[dtype],
        "K_DTYPE": _TRITON[keys],
        "K_SCALED": scaled(keys),
        "V_DTYPE": _TRITON[mixed],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "K_UNPACK": unpack(keys),
        "V_UNPACK": unpack(mixed),
        "SCALED": scaled(dtype),
        "ROTATE": _ROTATE if keys in PACKED else None,
        "STAGES": 3,
        "num_warps": 4,
    }


def _seen(mask: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor | None, slots: int, count: int) -> torch.Tensor:
    """A mask over columns [B or 1, 1, n, columns] as one over tokens, uint8 [B, n, slots], in which padding is left out."""
    batch, past = columns.shape[0], mask.shape[-1] - count
    held = columns.new_ones(batch, mask.shape[-1])
    held[:, :past] = False  # a static cache has columns that no store has room for yet
    held[:, : min(past, columns.shape[1])] = columns[:, :past]
    if valid is not None:
        held[:, past:] = valid
    token = torch.where(held, held.cumsum(1) - 1, slots)  # padding goes to a slot that is cut off
    wide = torch.zeros(batch, count, slots + 1, dtype=torch.uint8, device=mask.device)
    given = mask[:, 0].expand(batch, -1, -1).to(torch.uint8)
    return wide.scatter_(2, token[:, None].expand_as(given), given)[..., :slots].contiguous()
