"""Operands of products in a warp's registers: basis and queries in shared memory, and queries absorbed into the basis."""

from __future__ import annotations

import triton.language as tl

from spectral_compile.kernels.attend.coded import inverse
from spectral_compile.kernels.attend.latent import warp
from spectral_compile.kernels.rotary import sincos

# number of a basis in float16, and absorbed queries are up to that times the root of the channels
_LARGEST: tl.constexpr = tl.constexpr(4096.0)


@warp.function
def power_below(x):
    """The largest power of two that is not above ``x``, a positive float32."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@warp.function
def rows_to_shared(room, x, tables, G: tl.constexpr, L: tl.constexpr):
    """Of each digit of a key two words to shared memory: where its row of the basis begins, and what the constant takes away.

    They are the same for every basis, and leave room for others. Warps meet after it.
    """
    T: tl.constexpr = 32 * L.warps
    SLOTS: tl.constexpr = 8 * L.registers
    for i in tl.static_range((SLOTS + T - 1) // T):
        slot = i * T + x
        code, _, middle, _ = warp.words_of(tables.of_keys + 4 * tl.minimum(slot, SLOTS - 1))
        at = room + (L.room.digits + 16 * slot)
        warp.to_shared(at, tl.maximum(code, 0) * G.k.width, slot < SLOTS)
        warp.to_shared(at + 8, middle, slot < SLOTS)
    tl.debug_barrier()


@warp.function
def sizes_of_digits(x, affine, tables, G: tl.constexpr, L: tl.constexpr):
    """What is loaded for ``sizes_to_shared``, of each of a lane's digits: three numbers that its row of the basis is times."""
    T: tl.constexpr = 32 * L.warps
    SLOTS: tl.constexpr = 8 * L.registers
    RANK: tl.constexpr = G.k.rank
    out = ()
    for i in tl.static_range((SLOTS + T - 1) // T):
        slot = i * T + x
        code, place, _, _ = warp.words_of(tables.of_keys + 4 * tl.minimum(slot, SLOTS - 1))
        real = (slot < SLOTS) & (code >= 0)
        out = out + (warp.float_of(affine + code, real), warp.float_of(affine + RANK + code, real))
        out = out + (place.to(tl.float32, bitcast=True),)
    return out


@warp.function
def sizes_to_shared(room, x, sizes, L: tl.constexpr):
    """Of each digit the word that ``rows_to_shared`` has left out: what its row of the basis is times.

    Returns what all numbers of the basis are times, so that none leaves float16 and none is lost in it: a power of two, by
    which these words are multiplied. Warps meet after it.
    """
    T: tl.constexpr = 32 * L.warps
    SLOTS: tl.constexpr = 8 * L.registers
    PARTS: tl.constexpr = (SLOTS + T - 1) // T
    largest = 0.0
    for i in tl.static_range(PARTS):
        largest = tl.maximum(largest, tl.max(sizes[3 * i] * sizes[3 * i + 1], 0))
    unit = power_below((1.0 / tl.maximum(largest, 1e-30)) * (_LARGEST / 127))
    for i in tl.static_range(PARTS):
        slot = i * T + x
        size = sizes[3 * i] * sizes[3 * i + 1] * sizes[3 * i + 2]
        warp.to_shared(room + (L.room.digits + 4 + 16 * slot), (size * unit).to(tl.int32, bitcast=True), slot < SLOTS)
    tl.debug_barrier()
    return unit


@warp.function
def numbers_of_basis(room, x, basis, tables, G: tl.constexpr, L: tl.constexpr):
    """What is loaded for ``basis_to_shared``, each lane some channels of some rows."""
    WORDS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    J: tl.constexpr = L.columns
    ROWS: tl.constexpr = 32 * L.warps // J
    SLOTS: tl.constexpr = 8 * L.registers
    PAIRS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    out = ()
    for part in tl.static_range((WORDS + J - 1) // J):
        j, row = part * J + x % J, x // J
        live = j < WORDS
        pair = j // 8 * 8 + 2 * (j % 4)
        if L.between > 0:
            c0 = tl.where(live, L.between * pair + L.apart * ((j // 4) % 2), 0)
            c1 = tl.where(live, c0 + L.between, 0)
        else:
            which = tables.of_pairs.channels + (j // 4) % 2 * PAIRS + pair
            c0, c1 = warp.word_of(which, live), warp.word_of(which + 1, live)
        digit = room + (L.room.digits + 16 * row)
        for i in tl.static_range(SLOTS // ROWS):
            at = warp.shared_word(digit + 16 * ROWS * i)
            if L.full:
                out = out + (warp.signed_byte(basis + (at + c0)), warp.signed_byte(basis + (at + c1)))
            else:
                n0, n1 = warp.signed_byte(basis + (at + tl.maximum(c0, 0))), warp.signed_byte(basis + (at + tl.maximum(c1, 0)))
                out = out + (tl.where(c0 >= 0, n0, 0), tl.where(c1 >= 0, n1, 0))
    return out


@warp.function
def basis_to_shared(room, x, numbers, L: tl.constexpr):
    """Write the matrix from digits to channels of one head to shared memory; warps meet after it.

    What is known of the digits is there.
    """
    T: tl.constexpr = 32 * L.warps
    WORDS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)  # of two channels
    J: tl.constexpr = L.columns
    ROWS: tl.constexpr = T // J
    SLOTS: tl.constexpr = 8 * L.registers
    ALL_BUT_FETCHED: tl.constexpr = L.all_but_fetched
    for part in tl.static_range((WORDS + J - 1) // J):
        j, row = part * J + x % J, x // J
        live = j < WORDS
        digit = room + (L.room.digits + 16 * row)
        middle0, middle1 = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        for i in tl.static_range(SLOTS // ROWS):
            _, times, away, _ = warp.shared_words(digit + 16 * ROWS * i)
            a, away = times.to(tl.float32, bitcast=True), away.to(tl.float32, bitcast=True)
            b0 = numbers[2 * (part * (SLOTS // ROWS) + i)].to(tl.float32) * a
            b1 = numbers[2 * (part * (SLOTS // ROWS) + i) + 1].to(tl.float32) * a
            middle0 += b0.to(tl.float16).to(tl.float32) * away
            middle1 += b1.to(tl.float16).to(tl.float32) * away
            slot = i * ROWS + row
            if WORDS % J > 0:
                warp.to_shared(room + (slot * L.room.pitch + 4 * j), warp.halves(b0, b1), live)
            else:
                warp.to_shared(room + (slot * L.room.pitch + 4 * j), warp.halves(b0, b1))
        middle0, middle1 = _over_half(middle0, ROWS, J) * (-1.0 / 1024), _over_half(middle1, ROWS, J) * (-1.0 / 1024)
        # four lanes have a constant: each half of the rows two, the second for what rounding takes away from the first
        rest0 = middle0 - middle0.to(tl.float16).to(tl.float32)
        rest1 = middle1 - middle1.to(tl.float16).to(tl.float32)
        at = room + ((L.constant + row // max(1, ROWS // 2) * 4) * L.room.pitch + 4 * j)
        tl.debug_barrier()  # another lane has written zeros there
        warp.to_shared(at, warp.halves(middle0, middle1), live)
        warp.to_shared(at + 2 * L.room.pitch, warp.halves(rest0, rest1), live)
    if L.steps_held:
        warp.wait_for_copies(x, ALL_BUT_FETCHED)
    tl.debug_barrier()


@warp.function
def _over_half(x, ROWS: tl.constexpr, J: tl.constexpr):
    """Sums over lanes of the same column in the same half of the rows, in each of them."""
    if ROWS > 2:
        sums = tl.sum(tl.reshape(x, (2, ROWS // 2, J)), 1)
        x = tl.reshape(tl.broadcast_to(sums[:, None, :], (2, ROWS // 2, J)), (ROWS * J,))
    return x


@warp.function
def numbers_of_queries(lane, at, live, weights, tables, L: tl.constexpr):
    """What is loaded for ``queries_to_shared``, of each 32 pairs: their channels, turns and weights, and of each query both.

    ``at`` and ``live`` are tuples, of each query.
    """
    PAIRS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    DTYPE: tl.constexpr = at[0].dtype.element_ty
    out = ()
    for i in tl.static_range((PAIRS + 31) // 32):
        pair = 32 * i + lane
        there = pair < PAIRS
        if L.between > 0:
            c0 = L.between * pair
            c1 = c0 + L.apart
        else:
            c0 = warp.word_of(tables.of_pairs.channels + pair, there)
            c1 = warp.word_of(tables.of_pairs.channels + PAIRS + pair, there)
        held0, held1 = there & (c0 >= 0), there & (c1 >= 0)
        out = out + (c0, c1, warp.word_of(tables.of_pairs.turns + pair, there))
        out = out + (tl.where(held0, warp.float_of(weights + c0, held0), 1.0),)
        out = out + (tl.where(held1, warp.float_of(weights + c1, held1), 1.0),)
        for h in tl.static_range(4):
            out = out + (warp.number_of(at[h] + c0, live[h] & held0, DTYPE), warp.number_of(at[h] + c1, live[h] & held1, DTYPE))
    return out


@warp.function
def gains_to_shared(room, lane, numbers, scale, R: tl.constexpr, L: tl.constexpr):
    """Choose what each query is divided by, so that it is no longer than one, however turned: then no product leaves float16.

    Write it to shared memory, as every warp does, and return of each lane its own query's.
    """
    T: tl.constexpr = 32 * L.warps
    WARPS: tl.constexpr = L.warps
    PAIRS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    own = lane * 0.0
    for h in tl.static_range(4):
        square = tl.zeros([T], tl.float32)
        for i in tl.static_range((PAIRS + 31) // 32):
            q0, q1 = numbers[13 * i + 5 + 2 * h], numbers[13 * i + 6 + 2 * h]
            weight = tl.maximum(tl.abs(inverse(numbers[13 * i + 3])), tl.abs(inverse(numbers[13 * i + 4])))
            square += (q0 * q0 + q1 * q1) * weight * weight
        length = tl.reshape(tl.broadcast_to(tl.sum(tl.reshape(square, (WARPS, 32)), 1)[:, None], (WARPS, 32)), (T,))
        gain = 2 * power_below(tl.sqrt(tl.maximum(length, 1e-30)) * (scale * tl.maximum(1.0, R.scaling)))
        warp.to_shared(room + (L.room.digits + 12 + 16 * h), (1.0 / gain).to(tl.int32, bitcast=True))
        own = tl.where(lane % 4 == h, gain, own)
    return own


@warp.function
def queries_to_shared(queries_room, room, lane, numbers, scale, positions, R: tl.constexpr, L: tl.constexpr):
    """Write the warp's four queries, turned back to where its tokens begin and divided by their gains, to its shared memory."""
    PAIRS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    gains = ()
    for h in tl.static_range(4):
        gains = gains + (warp.shared_word(room + (L.room.digits + 12 + 16 * h) + lane * 0).to(tl.float32, bitcast=True),)
    for i in tl.static_range((PAIRS + 31) // 32):
        pair = 32 * i + lane
        there = pair < PAIRS
        c0, turn = numbers[13 * i], numbers[13 * i + 2]
        sin, cos = sincos(positions, turn)
        turned = scale * tl.where(c0 < 2 * R.pairs, R.scaling, 1.0)
        w0, w1 = inverse(numbers[13 * i + 3]) * turned, inverse(numbers[13 * i + 4]) * turned
        for h in tl.static_range(4):
            q0, q1 = numbers[13 * i + 5 + 2 * h] * gains[h], numbers[13 * i + 6 + 2 * h] * gains[h]
            to = queries_room + (h * 2 * PAIRS + pair) * 2
            if PAIRS % 32 == 0:
                warp.half_to_shared(to, (q0 * cos + q1 * sin) * w0)
                warp.half_to_shared(to + 2 * PAIRS, (q1 * cos - q0 * sin) * w1)
            else:
                warp.half_to_shared(to, (q0 * cos + q1 * sin) * w0, there)
                warp.half_to_shared(to + 2 * PAIRS, (q1 * cos - q0 * sin) * w1, there)


@warp.function
def query_of(room, h, e, c, S: tl.constexpr, PAIRS: tl.constexpr):
    """Of the S-th eight pairs of a query fragments of first and second channels, turned a quarter where e is 1."""
    at = room + h * (4 * PAIRS) + (16 * S + 4 * c)
    a, b = warp.shared_word(at), warp.shared_word(at + 2 * PAIRS)
    return tl.where(e == 1, b, a), tl.where(e == 1, a ^ -2147450880, b)  # 0x80008000 changes both signs


@warp.function
def steps_of(tables, room, x, L: tl.constexpr):
    """Where the tables of stretches begin; they are copied to shared memory, and to be waited for, if they have room there."""
    COUNT: tl.constexpr = L.steps.all_words
    T: tl.constexpr = 32 * L.warps
    if L.steps_held:
        for i in tl.static_range((COUNT + 4 * T - 1) // (4 * T)):
            at = 4 * T * i + 4 * x
            warp.copy_ahead(room + (L.room.steps + 4 * at), tables.of_pairs.steps + at, at < COUNT, 16)
        warp.end_of_copies(x)
        return room + L.room.steps
    else:  # what follows a return would be compiled, too
        return tables.of_pairs.steps


@warp.function
def step(steps, word, L: tl.constexpr):
    """Four words of these tables."""
    return warp.shared_words(steps + 4 * word) if L.steps_held else warp.words_of(steps + word)


@warp.function
def terms_of(queries, tables):
    """The terms of some eights of pairs over a stretch, by four words of tables each: [16, 16], as products take it."""
    out = ()
    for s in tl.static_range(len(tables)):
        cos0, sin0, cos1, sin1 = tables[s]
        a0, a2 = warp.turned(queries[2 * s], queries[2 * s + 1], cos0, sin0)
        a1, a3 = warp.turned(queries[2 * s], queries[2 * s + 1], cos1, sin1)
        out = out + (a0, a1, a2, a3)
    return out


@warp.function
def channels_of(room, lane, S: tl.constexpr, L: tl.constexpr):
    """Of the S-th eight pairs in shared memory fragments [digits, channels], first and second channels of each register."""
    N: tl.constexpr = L.registers
    out = ()
    for q in tl.static_range((N + 1) // 2):
        register = tl.minimum(2 * q + lane // 16, N - 1)
        at = room + ((8 * register + lane % 8) * L.room.pitch + (lane // 8 % 2 * 16 + 32 * S))
        four = warp.shared_fragments(at, False)
        out = out + (four if 2 * q + 1 < N else (four[0], four[1]))
    return out


@warp.function
def basis_of(room, lane, S: tl.constexpr, SECOND: tl.constexpr, L: tl.constexpr):
    """The same of first or second channels, transposed: [channels, digits] of each register."""
    N: tl.constexpr = L.registers
    out = ()
    for q in tl.static_range((N + 3) // 4):
        register = tl.minimum(4 * q + lane // 8, N - 1)
        four = warp.shared_fragments(room + ((8 * register + lane % 8) * L.room.pitch + (32 * S + 16 * SECOND)), True)
        for i in tl.static_range(4):
            if 4 * q + i < N:
                out = out + (four[i],)
    return out


@warp.function
def absorbed_over_stretch(terms, over_run, shift, room, lane, L: tl.constexpr):
    """Absorbed queries over a stretch: of each register of digits two fragments [terms, digits], of the terms e, then 2 + e."""
    REGISTERS: tl.constexpr = L.registers
    MEDIUM: tl.constexpr = L.medium
    zero = (lane * 0).to(tl.float32)
    sums = ()
    for j in tl.static_range(REGISTERS):
        y = (zero, zero, zero, zero)
        if L.slow > 0:
            y = warp.product(y, shift[0], shift[1], shift[2], shift[3], over_run[2 * j], over_run[2 * j + 1], False)
        sums = sums + y
    for s in tl.static_range(MEDIUM):
        b = channels_of(room, lane, L.fast + s, L)
        grown = ()
        for j in tl.static_range(REGISTERS):
            y = (sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3])
            t = (terms[4 * s], terms[4 * s + 1], terms[4 * s + 2], terms[4 * s + 3])
            grown = grown + warp.product(y, t[0], t[1], t[2], t[3], b[2 * j], b[2 * j + 1], False)
        sums = grown
    out = ()
    for j in tl.static_range(REGISTERS):
        out = out + (warp.halves(sums[4 * j], sums[4 * j + 1]), warp.halves(sums[4 * j + 2], sums[4 * j + 3]))
    return out


@warp.function
def absorbed_over_run(sums, room, queries_room, lane, h, e, c, tables, L: tl.constexpr):
    """``sums`` plus what the slow pairs give."""
    REGISTERS: tl.constexpr = L.registers
    SLOW: tl.constexpr = L.slow
    FIRST: tl.constexpr = L.fast + L.medium
    PAIRS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    table = tables.of_pairs.over_run + FIRST * 32 + (e * 16 + c * 4)
    for s in tl.static_range(SLOW):
        query = query_of(queries_room, h, e, c, FIRST + s, PAIRS)
        t = terms_of(query, (warp.words_of(table + 32 * s),))
        b = channels_of(room, lane, FIRST + s, L)
        grown = ()
        for j in tl.static_range(REGISTERS):
            y = (sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3])
            grown = grown + warp.product(y, t[0], t[1], t[2], t[3], b[2 * j], b[2 * j + 1], False)
        sums = grown
    return sums


@warp.function
def as_operand(sums, L: tl.constexpr):
    """Absorbed queries over a run, [terms, digits], as fragments [digits, terms]."""
    REGISTERS: tl.constexpr = L.registers
    out = ()
    for j in tl.static_range(REGISTERS):
        out = out + (warp.transposed(warp.halves(sums[4 * j], sums[4 * j + 1])),)
        out = out + (warp.transposed(warp.halves(sums[4 * j + 2], sums[4 * j + 3])),)
    return out


@warp.function
def fast_queries(queries, steps, at, L: tl.constexpr):
    """Queries of the fastest pairs, turned back to where a stretch begins, by its tables from the word ``at`` on."""
    FAST: tl.constexpr = L.fast
    out = ()
    for s in tl.static_range(FAST):
        turns = step(steps, at + s // 2 * 16, L)
        a, b = warp.turned(queries[2 * s], queries[2 * s + 1], turns[s % 2 * 2], turns[s % 2 * 2 + 1])
        out = out + (a, b)
    return out
