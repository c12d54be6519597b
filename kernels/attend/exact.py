"""Attention to what is not coded: first tokens, recent ones, the chunk itself, and all tokens of a lossless store."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_compile.kernels.append.kernel import recent_size
from spectral_compile.kernels.attend.parts import capped, leave, of_head, prefetch, queries_of
from spectral_compile.kernels.digits import as_loaded
from spectral_compile.kernels.rotary import sincos


@triton.jit
def _merge_max(s, m):
    """The new maxima of scores [N, M], what to scale the old sums by, and exponentials; all of them 0 where nothing is seen."""
    new = tl.maximum(m, tl.max(s, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(m - safe), tl.exp2(s - safe[None, :])


@triton.jit
def _channels(at, ok, channels, live, bytes_at, in_bytes, G: tl.constexpr):
    """Channels [N, channels] of tokens that are not coded, in float32; ``at``, or ``bytes_at``, is where each begins."""
    x = tl.load(at[:, None] + channels[None, :], mask=ok[:, None] & live[None, :], other=0.0).to(tl.float32)
    if G.recent_in_bytes:
        x += tl.load(bytes_at[:, None] + channels[None, :], mask=in_bytes[:, None] & live[None, :], other=0).to(tl.float32)
    return x


@triton.jit
def _bytes(store, first, place, in_bytes, G: tl.constexpr, KEYS: tl.constexpr):
    """Where recent tokens in bytes begin, and what tokens are times; ``first`` is the head's first place."""
    recent = store.k_recent if KEYS else store.v_recent
    sizes = store.k_sizes if KEYS else store.v_sizes
    at, size = first, 1.0
    if G.recent_in_bytes:
        at = first + place
        size = recent_size(tl.load(sizes + at, mask=in_bytes, other=192))  # what is exact is times 1
        at = recent + at * G.dim
    return at, size


@triton.jit
def _address(
    chunk, store, e, kept, column, is_code, is_new, b, g, h, coded_slots, rows, G: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Where each of the exact keys or values begins: among a lossless store's codes, its exact tokens or in the chunk."""
    codes = store.k_codes if KEYS else store.v_codes
    exact = store.k_exact if KEYS else store.v_exact
    new = chunk.key if KEYS else chunk.value
    strides = chunk.key_strides if KEYS else chunk.value_strides
    kv = g * G.heads + h
    at = exact + ((b * G.groups * G.heads + kv) * rows + kept) * G.dim
    at = tl.where(is_new, new + b * strides.row + kv * strides.head + column * strides.column, at)
    if G.lossless:
        S: tl.constexpr = G.k if KEYS else G.v
        first_row = (b * S.groups + g // S.share).to(tl.int64) * coded_slots
        at = tl.where(is_code, codes + (first_row + e) * S.width + (g % S.share * G.heads + h) * G.dim, at)
    return at


@triton.jit
def _values(
    chunk, store, e, kept, column, place, is_code, is_new, exact, in_bytes, b, g, h, d, coded_slots, rows, ring,
    G: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Values [N, DIM] of tokens that are not coded, of one head."""
    at = _address(chunk, store, e, kept, column, is_code, is_new, b, g, h, coded_slots, rows, G, False)
    bytes_at, size = _bytes(store, ((b * G.groups + g) * G.heads + h) * ring, place, in_bytes, G, False)
    x = _channels(at, exact, d, d < G.dim, bytes_at, in_bytes, G)
    return (x * size[:, None] if G.recent_in_bytes else x).to(A.dtype)


@triton.jit
def prefetch_exact(store, row_group, places, exact_split, exact_splits, G: tl.constexpr):
    """Begin to bring first and recent tokens of a group to the L2 cache, each split its share of them."""
    ROW: tl.constexpr = G.heads * G.dim  # of a place in all heads
    rows, ring = places, places - G.first_exact
    if G.recent_in_bytes:
        rows = G.first_exact
        prefetch(store.k_recent + row_group * ring * ROW, ring * ROW, exact_split, exact_splits)
        prefetch(store.v_recent + row_group * ring * ROW, ring * ROW, exact_split, exact_splits)
        prefetch(store.k_sizes + row_group * ring * G.heads, ring * G.heads, exact_split, exact_splits)
        prefetch(store.v_sizes + row_group * ring * G.heads, ring * G.heads, exact_split, exact_splits)
    BYTES: tl.constexpr = store.k_exact.dtype.element_ty.primitive_bitwidth // 8
    prefetch(store.k_exact + row_group * rows * ROW, rows * ROW * BYTES, exact_split, exact_splits)
    prefetch(store.v_exact + row_group * rows * ROW, rows * ROW * BYTES, exact_split, exact_splits)


@triton.jit
def attend_exact(
    q_row, head, live, own, exact_split, exact_splits, b, g, n, before, coded, scale, chunk, store, row_positions, mask_row,
    visible_row, turns, coded_slots, places, sliding_window, left, at,
    G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Attention to one split of what is not coded, left for the merge in the places [M] ``at``.

    In this order: codes of a lossless store, first tokens, recent ones, chunk. ``chunk.index`` is the token of each column.
    """
    M: tl.constexpr = F.queries
    N: tl.constexpr = F.exact_tokens
    DIM: tl.constexpr = G.DIM
    HEADS: tl.constexpr = G.heads
    PER: tl.constexpr = (2 if R.pairs > 0 else 0) + (1 if R.REST > 0 else 0)
    EARLY: tl.constexpr = N * G.heads * DIM <= 8192  # else values take too many registers beside the keys
    p, d, t = tl.arange(0, R.PAIRS), tl.arange(0, DIM), tl.arange(0, N)
    real = p < R.pairs
    first, second = (p * 2, p * 2 + 1) if R.interleaved else (p, p + R.pairs)
    q1, q2, q3, turn = queries_of(q_row, live, turns, scale, R.PAIRS, 1 if R.pairs > 0 else 0, G, R)
    if R.REST > 0:
        rest = 2 * R.pairs + tl.arange(0, R.REST)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([N, M], tl.float32)
    out = tl.zeros([M, DIM], tl.float32)
    codes_first = coded if G.lossless else 0
    in_first = tl.minimum(before, G.first_exact)
    ring_first = codes_first + in_first
    recent = tl.maximum(before - G.first_exact - coded, 0)
    if F.recent_apart:
        recent = recent * 0
    new_first = ring_first + recent
    count = new_first + n
    share = tl.cdiv(tl.cdiv(count, N), exact_splits) * N
    low = exact_split * share
    ring = places - G.first_exact
    rows = G.first_exact if G.recent_in_bytes else places
    oldest = coded % ring
    for start in tl.range(low, tl.minimum(low + share, count), N, num_stages=1):
        e = start + t
        is_code, is_new, ok = e < codes_first, e >= new_first, e < count
        column = e - new_first
        place = oldest + e - ring_first
        place = tl.where(place < ring, place, place - ring)
        kept = tl.where(e < ring_first, e - codes_first, G.first_exact + place)
        token = tl.where(e < ring_first, e - codes_first, G.first_exact + coded + e - ring_first)
        token = tl.where(is_code, G.first_exact + e, token)
        if chunk.index is not None:
            rank = tl.load(chunk.index + b * n + column, mask=is_new & ok, other=-1)
            previous = tl.load(chunk.index + b * n + column - 1, mask=is_new & ok & (column > 0), other=-1)
            token = tl.where(is_new, before + rank, token)
            ok = ok & (~is_new | (rank > previous))
        else:
            token = tl.where(is_new, before + column, token)
        if visible_row is not None:
            ok = ok & (tl.load(visible_row + token, mask=ok & (e < new_first), other=1) != 0)
        in_bytes = ok & (e >= ring_first) & ~is_new
        exact = ok & ~in_bytes if G.recent_in_bytes else ok
        if R.pairs > 0:
            where = tl.load(row_positions + token, mask=ok, other=0)
            sin, cos = sincos(where[:, None], turn[0][None, :])
        # all is loaded before the first of it is waited for
        keys, sizes, values = (), (), ()
        for h in tl.static_range(HEADS):
            k_at = _address(chunk, store, e, kept, column, is_code, is_new, b, g, h, coded_slots, rows, G, True)
            bytes_at, size = _bytes(store, ((b * G.groups + g) * G.heads + h) * ring, place, in_bytes, G, True)
            sizes = sizes + (size,)
            if R.pairs > 0:
                k1 = _channels(k_at, exact, first, real, bytes_at, in_bytes, G)
                k2 = _channels(k_at, exact, second, real, bytes_at, in_bytes, G)
                keys = keys + ((k1 * cos - k2 * sin).to(A.dtype), (k2 * cos + k1 * sin).to(A.dtype))
            if R.REST > 0:
                keys = keys + (_channels(k_at, exact, rest, rest < G.dim, bytes_at, in_bytes, G).to(A.dtype),)
            if EARLY:
                x = _values(chunk, store, e, kept, column, place, is_code, is_new, exact, in_bytes, b, g, h, d, coded_slots,
                            rows, ring, G, A)  # fmt: skip
                values = values + (x,)
        keys, values = as_loaded(keys), as_loaded(values)
        scores = tl.zeros([N, M], tl.float32)
        for h in tl.static_range(HEADS):
            x = tl.zeros([N, M], tl.float32) if G.recent_in_bytes else scores
            if R.pairs > 0:
                q = tl.trans(of_head(q1[0].to(A.dtype), head, h, G))
                x = tl.dot(keys[h * PER], q, x, input_precision=A.precision)
                q = tl.trans(of_head(q2[0].to(A.dtype), head, h, G))
                x = tl.dot(keys[h * PER + 1], q, x, input_precision=A.precision)
            if R.REST > 0:
                unturned = tl.trans(of_head(q3[0].to(A.dtype), head, h, G))
                x = tl.dot(keys[h * PER + PER - 1], unturned, x, input_precision=A.precision)
            scores = scores + x * sizes[h][:, None] if G.recent_in_bytes else x
        if mask_row is not None:
            seen = ok[:, None] & live[None, :]
            seen = seen & (tl.load(mask_row[None, :] + token[:, None], mask=seen, other=0) != 0)
        else:
            seen = ok[:, None] & (token[:, None] <= own[None, :])
            if F.slides:
                seen = seen & (token[:, None] > (own - sliding_window)[None, :])
        highest, alpha, weights = _merge_max(tl.where(seen, capped(scores, F.softcap), float("-inf")), highest)
        total = total * alpha[None, :] + weights
        out = out * alpha[:, None]
        mixing = tl.trans(weights.to(A.dtype))
        for h in tl.static_range(HEADS):
            if EARLY:
                x = values[h]
            else:
                x = _values(chunk, store, e, kept, column, place, is_code, is_new, exact, in_bytes, b, g, h, d, coded_slots,
                            rows, ring, G, A)  # fmt: skip
            out = tl.dot(of_head(mixing, head, h, G), x, out, input_precision=A.precision)
    leave((out,), highest, tl.sum(total, 0), left, at, F)
