"""Attention to recent tokens in bytes, in a warp's registers: sixteen at a time, each warp of a program others.

A lane 4 r + c turns of the keys of tokens r and r + 8 the pairs 2 c and 2 c + 1 of each eight. Of queries there are two columns
each, what float16 has of it and what that leaves; their sum stays in the lane. Values are taken as the coded ones are
(``kernel``), as halfwords of two bytes, and so are weights.
"""

from __future__ import annotations

import triton.language as tl

from spectral_compile.kernels.attend.latent import warp
from spectral_compile.kernels.attend.latent.left import for_lanes, leave_digits, over_lanes
from spectral_compile.kernels.attend.latent.mix import FAR, UP, mixed, parts_of, repeated, row_of, seen_of
from spectral_compile.kernels.attend.latent.operands import power_below
from spectral_compile.kernels.attend.latent.plan import SIXTEEN
from spectral_compile.kernels.attend.parts import capped, own_tokens
from spectral_compile.kernels.rotary import sincos

_SIXTEEN: tl.constexpr = tl.constexpr(SIXTEEN)


@warp.function
def _copy(queue, lane, keys, values, first, count, oldest, ring, N: tl.constexpr, G: tl.constexpr):
    """Copy the bytes of sixteen recent tokens from the ``first`` on, or the last one of ``count``, to the warp's slice."""
    CHUNKS: tl.constexpr = G.dim // 16  # of a token
    ROW: tl.constexpr = N.row
    for i in tl.static_range((_SIXTEEN * CHUNKS + 31) // 32):
        chunk = 32 * i + lane
        token, at = chunk // CHUNKS, chunk % CHUNKS * 16
        place = oldest + tl.minimum(first + token, count - 1)
        place = tl.where(place < ring, place, place - ring)
        wanted = chunk < _SIXTEEN * CHUNKS
        warp.copy_ahead(queue + (token * ROW + at), keys + (place * G.dim + at), wanted, 16)
        warp.copy_ahead(queue + ((_SIXTEEN + token) * ROW + at), values + (place * G.dim + at), wanted, 16)
    warp.end_of_copies(lane)


@warp.function
def _queries(row, live, c, N: tl.constexpr, G: tl.constexpr, R: tl.constexpr):
    """Of a lane's query its numbers of each eight pairs: first and second channels of the pairs 2 c and 2 c + 1."""
    DTYPE: tl.constexpr = row.dtype.element_ty
    out = ()
    for s in tl.static_range(N.turned + N.others):
        if s < N.turned:
            first = 8 * s + 2 * c
            times = R.scaling
            if R.interleaved:
                channels = (2 * first, 2 * first + 2, 2 * first + 1, 2 * first + 3)
            else:
                channels = (first, first + 1, first + R.pairs, first + R.pairs + 1)
        else:
            first = 16 * N.turned + 8 * (s - N.turned) + 2 * c
            times = 1.0
            channels = (first, first + 1, first + 8 * N.others, first + 8 * N.others + 1)
        for i in tl.static_range(4):
            out = out + (warp.number_of(row + channels[i], live, DTYPE) * times,)
    return out


@warp.function
def _halves_of(numbers, unit, e):
    """Numbers divided by their query's unit, by twos: what float16 has of them where e is 0, and where it is 1 what is left."""
    out = ()
    for i in tl.static_range(len(numbers) // 2):
        a, b = numbers[2 * i] / unit, numbers[2 * i + 1] / unit
        upper0, upper1 = a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32)
        out = out + (warp.halves(tl.where(e == 1, a - upper0, a), tl.where(e == 1, b - upper1, b)),)
    return out


@warp.function
def _numbers(word, SELECTED: tl.constexpr):
    """Two of four signed bytes as float16, exactly: as the low bits of 1024, less that and what their sign is kept by."""
    none = word * 0
    return warp.plus(warp.permuted(word ^ -2139062144, none + 0x64646464, none + SELECTED), none - 461314944)


@warp.function
def _key(at, c, s: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """First and second channels of the s-th eight pairs of the key whose bytes begin ``at``."""
    if s < N.turned:
        if R.interleaved:
            word = warp.shared_word(at + (16 * s + 4 * c))
            return _numbers(word, 0x4240), _numbers(word, 0x4341)
        else:
            first = at + (8 * s + 2 * c)
            word = warp.shared_halfwords(first, first + R.pairs)
            return _numbers(word, 0x4140), _numbers(word, 0x4342)
    else:
        first = at + (16 * N.turned + 8 * (s - N.turned) + 2 * c)
        word = warp.shared_halfwords(first, first + 8 * N.others)
        return _numbers(word, 0x4140), _numbers(word, 0x4342)


@warp.function
def _scores(queue, r, c, positions, turns, queries, N: tl.constexpr, R: tl.constexpr):
    """Scores of tokens r and r + 8 for query c, in units of what its numbers and the tokens' bytes are times."""
    TURNED: tl.constexpr = N.turned
    y = ((r * 0).to(tl.float32),) * 4
    for s in tl.static_range(N.turned + N.others):
        first0, second0 = _key(queue + r * N.row, c, s, N, R)
        first1, second1 = _key(queue + (r + 8) * N.row, c, s, N, R)
        if s < TURNED:
            sin0, cos0 = sincos(positions[0], turns[2 * s])
            sin1, cos1 = sincos(positions[0], turns[2 * s + 1])
            second0, first0 = warp.turned(second0, first0, warp.halves(cos0, cos1), warp.halves(sin0, sin1))
            sin0, cos0 = sincos(positions[1], turns[2 * s])
            sin1, cos1 = sincos(positions[1], turns[2 * s + 1])
            second1, first1 = warp.turned(second1, first1, warp.halves(cos0, cos1), warp.halves(sin0, sin1))
        y = warp.product(y, first0, first1, second0, second1, queries[2 * s], queries[2 * s + 1], False)
    return y[0] + y[1], y[2] + y[3]


@warp.function
def attend_recent(
    chunk, store, before, coded, after, masks, turns, room, left, row_group, n, row_positions, places, slots, part, parts,
    at, splits, scale, G: tl.constexpr, R: tl.constexpr, F: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Attention of all queries of a group to one of ``parts`` of its recent tokens, left for the merge as split ``at``."""
    N: tl.constexpr = L.recent
    WARPS: tl.constexpr = N.warps
    T: tl.constexpr = 32 * WARPS
    TILES: tl.constexpr = (N.value_registers + 1) // 2
    TURNED: tl.constexpr = N.turned
    b, g = row_group // G.groups, row_group % G.groups
    x = tl.arange(0, T)
    lane, own_warp = x % 32, x // 32
    r, c = lane // 4, lane % 4
    h, e = r // 2, r % 2
    queue = room + (N.room.queues + own_warp * N.room.queue)
    zero = (x * 0).to(tl.float32)
    ring = places - G.first_exact
    # by sixteens: those of this part, of which each warp takes every WARPS-th
    held = tl.maximum(before - G.first_exact - coded, 0).to(tl.int32)
    share = tl.cdiv(tl.cdiv(held, _SIXTEEN), parts) * _SIXTEEN
    low = part * share
    count = tl.minimum(held, low + share)
    oldest = (coded % ring).to(tl.int32)
    of_pairs = ()
    for s in tl.static_range(TURNED):
        which = turns + (8 * s + 2 * c)
        of_pairs = of_pairs + (warp.word_of(which, c >= 0), warp.word_of(which + 1, c >= 0))
    for quartet in range(G.heads * N.quartets):
        tl.debug_barrier()  # shared memory is still read for the last one, or for coded tokens
        head, own_quartet = quartet // N.quartets, quartet % N.quartets
        u = own_quartet * 4 + h
        of_head = (g * G.heads + head) * G.query_heads + u % G.query_heads
        q = chunk.query + b * chunk.query_strides.row + of_head * chunk.query_strides.head
        q += u // G.query_heads * chunk.query_strides.column
        numbers = _queries(q, u < n * G.query_heads, c, N, G, R)
        largest = zero
        for i in tl.static_range(len(numbers)):
            largest = tl.maximum(largest, tl.abs(numbers[i]))
        largest = tl.max(tl.max(tl.reshape(largest, (WARPS, 4, 8)), 2), 0)
        unit = 2 * power_below(tl.maximum(largest, 1e-30))
        of_rows = tl.reshape(tl.broadcast_to(unit[None, :, None], (WARPS, 4, 8)), (T,))
        queries = _halves_of(numbers, of_rows, e)
        gain = for_lanes(unit, WARPS) * scale
        column = tl.minimum((own_quartet * 4 + c) // G.query_heads, n - 1)
        own = column * 0
        if F.slides:
            own = own_tokens(chunk, b, n, before, after, column, column >= 0, F)
        first_head = (row_group * G.heads + head) * ring
        keys, values = store.k_recent + first_head * G.dim, store.v_recent + first_head * G.dim
        key_sizes, value_sizes = store.k_sizes + first_head, store.v_sizes + first_head
        reference, top = tl.zeros([4], tl.float32), tl.full([4], float("-inf"), tl.float32)
        total, mass = zero, zero
        sums = repeated(zero, 4 * TILES)
        again = low < count
        while again:
            highest, total, mass = zero + float("-inf"), zero, zero
            sums = repeated(zero, 4 * TILES)
            up = for_lanes(0 - reference + UP, WARPS)
            for first in range(low, count, _SIXTEEN * WARPS):
                token = first + own_warp * _SIXTEEN
                _copy(queue, lane, keys, values, token, count, oldest, ring, N, G)
                tokens, positions, sizes = (), (), ()
                for i in tl.static_range(2):
                    own_token = tl.minimum(token + (r + 8 * i), count - 1)
                    place = oldest + own_token
                    place = tl.where(place < ring, place, place - ring)
                    tokens = tokens + (token + (r + 8 * i),)
                    slot = coded.to(tl.int32) + own_token
                    positions = positions + (tl.load(row_positions + G.first_exact + slot),)
                    sizes = sizes + (tl.load(key_sizes + place).to(tl.int32), tl.load(value_sizes + place).to(tl.int32))
                warp.wait_for_copies(x, warp.ALL)
                scores = _scores(queue, r, c, positions, of_pairs, queries, N, R)
                weights = ()
                for i in tl.static_range(2):
                    score = scores[i] * gain * warp.power_of_two(warp.exponent(sizes[2 * i]) - 8.0)
                    score = (capped(score, F.softcap) if F.softcap > 0 else score) + up
                    slot = coded + tokens[i]
                    seen = seen_of(tokens[i] < count, slot, coded + count, own, column, b, n, slots, masks, G, F)
                    score = tl.where(seen, score, float("-inf"))
                    highest = tl.maximum(highest, score)
                    total += warp.power_of_two(score)
                    weight = warp.power_of_two(score + (warp.exponent(sizes[2 * i + 1]) - 8.0))
                    mass += weight
                    weights = weights + (parts_of(weight),)
                sums = mixed(queue + (_SIXTEEN * N.row + 2 * c * N.row), r, N.row, weights, sums, True, N)
                warp.lanes_meet(x)  # all have read before the next copies
            top = tl.max(tl.reshape(highest, (WARPS * 8, 4)), 0) + (reference - UP)
            far = ((top > reference + FAR) | (top < reference - FAR)) & (top > float("-inf"))
            again = tl.max(far.to(tl.int32), 0) > 0
            reference = tl.where(far, top, reference)
        first_at = row_group.to(tl.int64) * tl.num_programs(1) * F.queries
        u = own_quartet * 4 + tl.arange(0, 4)
        row = row_of(u, head, G)
        live = u < n * G.query_heads
        own_at = (first_at + row) * splits + at
        tl.store(left.maxima + own_at, tl.where(top == float("-inf"), float("-inf"), reference), mask=live)
        tl.store(left.totals + own_at, over_lanes(total, WARPS), mask=live)
        u = own_quartet * 4 + c
        row = row_of(u, head, G)
        to = left.sums + ((first_at + row) * splits + at) * F.left
        mass = for_lanes(over_lanes(mass, WARPS), WARPS)
        tl.debug_barrier()  # other lanes' tokens are still read
        leave_digits(sums, mass, to, u < n * G.query_heads, queue, room, lane, own_warp, N)
