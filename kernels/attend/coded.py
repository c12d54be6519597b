"""Attention to coded tokens: keys are rebuilt from their codes in registers, values stay in the latent."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_compile.kernels.attend.parts import capped, of_head
from spectral_compile.kernels.digits import INTERPRETED, as_loaded, digits, load, matrix, side_by_side
from spectral_compile.kernels.rotary import sincos

_SEGMENTS_AT_ONCE: tl.constexpr = tl.constexpr(256)  # whose starts are compared; of fewer Triton's code spills more
_REACH: tl.constexpr = tl.constexpr(2048.0)  # of the first coefficient in float16; keys of 192 such ones end at 28378
_FAR: tl.constexpr = tl.constexpr(80.0)  # powers of two that scores may be off their reference: float32 has 126


@triton.jit
def _product(codes, basis, FIRST: tl.constexpr, COUNT: tl.constexpr, A: tl.constexpr):
    """Keys in the type of their digits: in float16 there is nothing to round, and sums take half the registers."""
    x = tl.dot(codes[0], basis[FIRST], input_precision=A.precision, out_dtype=codes[0].dtype)
    for i in tl.static_range(1, COUNT):
        x = tl.dot(codes[i], basis[FIRST + i], x, input_precision=A.precision, out_dtype=codes[0].dtype)
    return x


@triton.jit
def inverse(x):
    """1 / x of numbers near 1; a division takes seven instructions more."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _rotated(k, cos, sin, A: tl.constexpr):
    """Keys [N, 2 * P], first halves of the pairs before second ones, turned by [N, P]."""
    PAIRS: tl.constexpr = k.shape[1] // 2
    DTYPE: tl.constexpr = A.of_keys
    k1, k2 = tl.split(tl.permute(tl.reshape(k, (k.shape[0], 2, PAIRS)), (0, 2, 1)))
    if A.rotate is None:
        r1, r2 = (k1 * cos - k2 * sin).to(DTYPE), (k2 * cos + k1 * sin).to(DTYPE)
    else:
        r1, r2 = tl.inline_asm_elementwise(A.rotate, "=r,=r,r,r,r,r", [k1, k2, cos, sin], (DTYPE.value,) * 2, True, 2)
    return side_by_side(r1, r2)


@triton.jit
def unit_of(affine, SIDE: tl.constexpr, A: tl.constexpr):
    """What keys are counted in, and queries times, so that whatever a model's keys are they fit float16; or values.

    Of no coefficient codes stand for much more than of the first, and the columns of a basis are orthonormal.
    """
    unit = 1.0
    if A.of_keys == tl.float16:
        LARGEST: tl.constexpr = 128 if SIDE.tiers[0] > 0 else 8 if SIDE.tiers[1] > 0 else 2
        unit = tl.maximum(tl.load(affine), 1e-30) * (LARGEST / _REACH)
    return unit


@triton.jit
def key_basis(store, at, own, G: tl.constexpr, R: tl.constexpr, A: tl.constexpr):
    """Matrices from digits to keys times their weights, in units of ``unit_of``: of each head, each part of its RoPE pairs and
    what is not rotated, each row field.

    ``at`` is the segment of their group, in which their channels begin with ``own``.
    """
    K: tl.constexpr = G.k
    SCALED: tl.constexpr = A.keys_scaled
    HEADS: tl.constexpr = G.heads
    PARTS: tl.constexpr = R.parts
    basis, affine = store.k_basis + at * (K.width * K.rank), store.k_affine + at * (2 * K.rank + K.width)
    gain = 1.0 / unit_of(affine, K, A)
    out = ()
    for h in tl.static_range(HEADS):
        for i in tl.static_range(PARTS):
            column = tl.arange(0, 2 * R.AT_ONCE)
            half, second = i * R.AT_ONCE + column % R.AT_ONCE, column // R.AT_ONCE
            channel = half * 2 + second if R.interleaved else half + second * R.pairs
            out = out + matrix(basis, affine, own + h * G.dim + channel, half < R.pairs, gain, K, A.of_keys, SCALED)
        if R.REST > 0:
            rest = 2 * R.pairs + tl.arange(0, R.REST)
            out = out + matrix(basis, affine, own + h * G.dim + rest, rest < G.dim, gain, K, A.of_keys, SCALED)
    return out


@triton.jit
def _ahead(norms, visible_row, slots, end, G: tl.constexpr):
    """Of tokens [N]: what their scores lose, all where none is seen, and what their values are times."""
    ok = slots < end
    size = 0.0
    if G.normalised:
        size = tl.exp2((tl.load(norms + slots, mask=ok, other=128).to(tl.float32) - 128) * 0.125)
    if visible_row is not None:
        # no mask for the load: at 32768 tokens it costs attention 4.5 % instead of 1.7
        ok = ok & (tl.load(visible_row + tl.minimum(slots, end - 1)) != 0)
    return tl.where(ok, 0.0, float("-inf")), size


@triton.jit
def distances_of(table, R: tl.constexpr, F: tl.constexpr):
    """Cosines, then sines, [N, pairs] a part, of the distances within a tile."""
    PARTS: tl.constexpr = R.parts
    out = ()
    for i in tl.static_range(2 * PARTS):
        half = i % R.parts * R.AT_ONCE + tl.arange(0, R.AT_ONCE)
        at = table + i // R.parts * (F.tokens * R.pairs) + tl.arange(0, F.tokens)[:, None] * R.pairs + half[None, :]
        out = out + (tl.load(at, mask=(half < R.pairs)[None, :], other=0.0),)
    return out


@triton.jit
def attend_coded(
    queries, distances, basis, head, live, own, low, high, b, g, store, row_positions, mask_row, visible_row, coded_slots,
    segments, sliding_window,
    G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, F: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """Attention to coded tokens from ``low`` to ``high``: a tuple of sums, references [M] and sums of weights [M].

    Sums are of values, [M, DIM], or where ``F.latent_out`` of their digits, [M, digits] a row field.

    Without ``GAPS`` positions run on by one: keys are turned by their distance from the first token of their tile, which a
    table knows, and queries by the rest. Scores count from a reference that stays: no warp waits for another one's maximum.
    Where one turns out to be far off, all is done again from the maximum.
    """
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    SCALED: tl.constexpr = A.scaled
    UNPACK_KEYS: tl.constexpr = A.unpack_keys
    UNPACK_VALUES: tl.constexpr = A.unpack_values
    KN: tl.constexpr = len(G.k.fields)
    M: tl.constexpr = F.queries
    N: tl.constexpr = F.tokens
    DIM: tl.constexpr = G.DIM
    HEADS: tl.constexpr = G.heads
    PARTS: tl.constexpr = R.parts
    VN: tl.constexpr = len(G.v.fields)
    PER: tl.constexpr = R.parts * KN + (KN if R.REST > 0 else 0)
    p, d, t = tl.arange(0, R.AT_ONCE), tl.arange(0, DIM), tl.arange(0, N)
    q1, q2, q3, turn = queries
    step_cos, step_sin = (), ()
    for i in tl.static_range(0 if GAPS else PARTS):
        s, c = sincos(tl.full([1], N, tl.int32), turn[i][None, :])
        step_sin, step_cos = step_sin + (s,), step_cos + (c,)
    if R.REST > 0:
        rest = 2 * R.pairs + tl.arange(0, R.REST)
    begin, of_keys, of_values = low, b * K.groups + g // K.share, b * V.groups + g // V.share
    own_keys, own_values = g % K.share * (G.heads * G.dim), g % V.share * (G.heads * G.dim)  # channels in their groups
    first_key, first_value = of_keys.to(tl.int64) * coded_slots, of_values.to(tl.int64) * coded_slots
    reference, top = tl.zeros([M], tl.float32), tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([N, M], tl.float32)
    sums = ()
    for i in tl.static_range(VN if F.latent_out else 1):
        sums = sums + (tl.zeros([M, V.fields[i].padded * (16 // V.fields[i].bits) if F.latent_out else DIM], tl.float32),)
    again = low < high
    while again:
        low, segment = begin, 0
        highest = tl.full([N, M], float("-inf"), tl.float32)
        total = tl.zeros([N, M], tl.float32)
        if not F.latent_out:
            out = tl.zeros([M, DIM], tl.float32)
        if F.in_segments:
            for first in range(1, segments, _SEGMENTS_AT_ONCE):
                later = first + tl.arange(0, _SEGMENTS_AT_ONCE)
                begun = tl.load(store.starts + b * segments + later, mask=later < segments, other=2147483647) <= low
                segment += tl.sum(begun.to(tl.int32), 0)
        while low < high:
            end = high
            at = of_keys * segments + segment
            if F.in_segments:
                if segment + 1 < segments:
                    end = tl.minimum(high, tl.load(store.starts + b * segments + segment + 1))
                held_basis = key_basis(store, at, own_keys, G, R, A)
            else:
                held_basis = basis
            latent = ()
            for i in tl.static_range(VN):
                latent = latent + (tl.zeros([M, V.fields[i].padded * (16 // V.fields[i].bits)], tl.float32),)
            affine_at = store.k_affine + at * (2 * K.rank + K.width)
            weights_at = affine_at + 2 * K.rank + own_keys + head * G.dim  # equal in the two channels of a pair
            unit = unit_of(affine_at, K, A)
            r1, r2 = (), ()
            for i in tl.static_range(PARTS):
                half = i * R.AT_ONCE + p
                channel = half * 2 if R.interleaved else half
                held = live[:, None] & (half < R.pairs)[None, :]
                even = inverse(tl.load(weights_at[:, None] + channel[None, :], mask=held, other=1.0)) * unit
                if GAPS:
                    r1, r2 = r1 + (q1[i] * even,), r2 + (q2[i] * even,)
                else:
                    sin0, cos0 = sincos(tl.load(row_positions + low), turn[i][None, :])
                    r1 = r1 + ((q1[i] * cos0 + q2[i] * sin0) * even,)
                    r2 = r2 + ((q2[i] * cos0 - q1[i] * sin0) * even,)
            if R.REST > 0:
                unturned = live[:, None] & (rest < G.dim)[None, :]  # a name of its own: in a loop none may change its shape
                even = inverse(tl.load(weights_at[:, None] + rest[None, :], mask=unturned, other=1.0)) * unit
                r3 = (q3[0] * even).to(A.of_keys)
            # a step ahead: to hide latency, and as Triton lays out an operand for the narrowest type that a step makes it of
            v_rows = load(store.v_codes + first_value * V.halfwords, low + t, low + t < end, V)
            gone, size = _ahead(store.v_norms + first_value, visible_row, low + t, end, G)
            for start in tl.range(low, end, N, num_stages=F.stages):
                slots = start + t
                ok = slots < end
                codes = load(store.k_codes + first_key * K.halfwords, slots, ok, K)
                codes = digits(codes, K, A.of_keys, UNPACK_KEYS)
                if GAPS:
                    where = tl.load(row_positions + slots, mask=ok, other=0)[:, None]
                scores = tl.zeros([N, M], tl.float32)
                for h in tl.static_range(HEADS):
                    for i in tl.static_range(PARTS):
                        k = _product(codes, held_basis, h * PER + i * KN, KN, A)
                        if GAPS:
                            s, c = sincos(where, turn[i][None, :])
                            k = _rotated(k, c.to(A.of_keys), s.to(A.of_keys), A)
                        else:
                            k = _rotated(k, distances[i], distances[R.parts + i], A)
                        q = of_head(side_by_side(r1[i].to(A.of_keys), r2[i].to(A.of_keys)), head, h, G)
                        scores = tl.dot(k, tl.trans(q), scores, input_precision=A.precision)
                    if R.REST > 0:
                        k = _product(codes, held_basis, h * PER + R.parts * KN, KN, A)
                        scores = tl.dot(k, tl.trans(of_head(r3, head, h, G)), scores, input_precision=A.precision)
                if not GAPS:
                    n1, n2 = (), ()
                    for i in tl.static_range(PARTS):
                        n1 = n1 + (r1[i] * step_cos[i] + r2[i] * step_sin[i],)
                        n2 = n2 + (r2[i] * step_cos[i] - r1[i] * step_sin[i],)
                    r1, r2 = n1, n2
                scores = capped(scores, F.softcap) + gone[:, None]
                if F.slides:
                    unhidden = (G.first_exact + slots)[:, None] > (own - sliding_window)[None, :]
                    scores = tl.where(unhidden, scores, float("-inf"))
                if mask_row is not None:
                    asked = ok[:, None] & live[None, :]
                    seen = tl.load(mask_row[None, :] + (G.first_exact + slots)[:, None], mask=asked, other=0) != 0
                    scores = tl.where(seen, scores, float("-inf"))
                highest = tl.maximum(highest, scores)
                weights = tl.exp2(scores - reference[None, :])
                total += weights
                if G.normalised:
                    weights = weights * size[:, None]
                gone, size = _ahead(store.v_norms + first_value, visible_row, slots + N, end, G)
                mixing = tl.trans(weights.to(A.of_weights))
                if A.of_weights != A.dtype:
                    lost = tl.trans((weights - weights.to(A.of_weights).to(tl.float32)).to(A.of_weights))
                values = as_loaded(digits(v_rows, V, A.of_weights, UNPACK_VALUES))
                v_rows = load(store.v_codes + first_value * V.halfwords, slots + N, slots + N < end, V)
                grown = ()
                for i in tl.static_range(VN):
                    x = tl.dot(mixing, values[i], latent[i], input_precision=A.precision)
                    if A.of_weights != A.dtype:
                        x = tl.dot(lost, values[i], x, input_precision=A.precision)
                    grown = grown + (x,)
                latent = grown
            if F.latent_out:
                sums = latent
            else:
                at = of_values * segments + segment
                side, affine = store.v_basis + at * (V.width * V.rank), store.v_affine + at * (2 * V.rank + V.width)
                for h in tl.static_range(HEADS):
                    back = matrix(side, affine, own_values + h * G.dim + d, d < G.dim, 1.0, V, A.dtype, SCALED)
                    x = tl.zeros([M, DIM], tl.float32)
                    for i in tl.static_range(VN):
                        y = of_head(latent[i], head, h, G)
                        if A.of_weights == A.dtype:
                            x = tl.dot(y.to(A.dtype), back[i], x, input_precision=A.precision)
                        else:
                            x = tl.dot(y, back[i].to(tl.float32), x, input_precision="tf32")
                    out += x / tl.load(affine + 2 * V.rank + own_values + h * G.dim + d, mask=d < G.dim, other=1.0)[None, :]
                sums = (out,)
            low = end
            segment += 1
        top = tl.max(highest, 0)
        far = ((top > reference + _FAR) | (top < reference - _FAR)) & (top > float("-inf"))
        again = tl.max(far.to(tl.int32), 0) > 0
        reference = tl.where(far, top, reference)
    return sums, tl.where(top == float("-inf"), float("-inf"), reference), tl.sum(total, 0)
