"""Attention to coded tokens in a warp's registers: digits of keys meet the query in the latent, those of values the weights.

Only keys of the fastest RoPE pairs are rebuilt; the others are absorbed into the query (``expansion``). A program takes one
quartet of queries of one KV head, and each of its warps tokens of its own, 32 at a time. A lane 4 r + c of a warp has

- of digits of keys those of tokens r and r + 8 of sixteen, from byte c of each word of the row;
- of absorbed queries, a row for each query and term, row r = 2 query + e of the terms e, then 2 + e;
- so of scores those of tokens r and r + 8 for query c, all four terms: their sum stays in the lane;
- of weights the same, transposed for the product with values: tokens 2 c and 2 c + 1, query r // 2, where the column e = 0
  has their upper 8 bits and e = 1 the next ones, so that sums over both are those of weights that were hardly rounded.
"""

from __future__ import annotations

import triton.language as tl

from spectral_compile.kernels.attend.latent import warp
from spectral_compile.kernels.attend.latent.expansion import RUN, STRETCH
from spectral_compile.kernels.attend.latent.left import for_lanes, leave_digits, leave_values, over_lanes, values_of
from spectral_compile.kernels.attend.latent.mix import FAR, UP, mixed, parts_of, repeated, row_of, seen_of
from spectral_compile.kernels.attend.latent.operands import (
    absorbed_over_run,
    absorbed_over_stretch,
    as_operand,
    basis_of,
    basis_to_shared,
    fast_queries,
    gains_to_shared,
    numbers_of_basis,
    numbers_of_queries,
    queries_to_shared,
    query_of,
    rows_to_shared,
    sizes_of_digits,
    sizes_to_shared,
    step,
    steps_of,
    terms_of,
)
from spectral_compile.kernels.attend.parts import capped, own_tokens, prefetch

_STRETCH: tl.constexpr = tl.constexpr(STRETCH)
_RUN: tl.constexpr = tl.constexpr(RUN)


@warp.function
def _digits(at, pairwise, alone, L: tl.constexpr, G: tl.constexpr):
    """Registers of digits of one token's key, whose row begins at ``at``."""
    WORDS: tl.constexpr = G.k.halfwords // 2
    row = ()
    if WORDS % 4 == 0:
        for i in tl.static_range(WORDS // 4):
            row = row + warp.shared_words(at + 16 * i)
    else:
        for i in tl.static_range(WORDS):
            row = row + (warp.shared_word(at + 4 * i),)
    out = ()
    for i in tl.static_range(len(L.sources)):
        x = alone * 0
        if L.sources[i].low != L.sources[i].high:
            x = warp.permuted(row[L.sources[i].low], row[L.sources[i].high], pairwise)
        elif L.sources[i].bits > 0:
            x = warp.permuted(row[L.sources[i].low], row[L.sources[i].low], alone)
        for k in tl.static_range(len(L.sources[i].masks)):
            digit = x & L.sources[i].masks[k]
            if L.sources[i].constant != 0:
                digit = digit | L.sources[i].constant
            if L.sources[i].centres[k] != 0:
                digit = warp.plus(digit, alone * 0 + L.sources[i].centres[k])
            out = out + (digit,)
    return out


@warp.function
def _scores(
    stage, room, r, lane, pairwise, alone, absorbed, fast, steps,
    SIXTEEN: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Four terms of the scores of tokens r and r + 8 of sixteen: the first two of both, then the others."""
    FAST: tl.constexpr = L.fast
    KEY_BYTES: tl.constexpr = 2 * G.k.halfwords
    N: tl.constexpr = L.registers
    zero, none = (r * 0).to(tl.float32), r * 0
    d0 = _digits(stage + ((16 * SIXTEEN + r) * KEY_BYTES), pairwise, alone, L, G)
    d1 = _digits(stage + ((16 * SIXTEEN + 8 + r) * KEY_BYTES), pairwise, alone, L, G)
    y0, y1 = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for q in tl.static_range(N // 2):
        a0, a1, a2, a3 = d0[2 * q], d1[2 * q], d0[2 * q + 1], d1[2 * q + 1]
        y0 = warp.product(y0, a0, a1, a2, a3, absorbed[4 * q], absorbed[4 * q + 2], False)
        y1 = warp.product(y1, a0, a1, a2, a3, absorbed[4 * q + 1], absorbed[4 * q + 3], False)
    if N % 2 == 1:
        y0 = warp.half_product(y0, d0[N - 1], d1[N - 1], absorbed[2 * N - 2])
        y1 = warp.half_product(y1, d0[N - 1], d1[N - 1], absorbed[2 * N - 1])
    for s in tl.static_range(FAST):
        keys = ()
        for second in tl.static_range(2):
            k, b = (none, none), basis_of(room, lane, s, second, L)
            for q in tl.static_range(N // 2):
                k = warp.rounded_product(k, d0[2 * q], d1[2 * q], d0[2 * q + 1], d1[2 * q + 1], b[2 * q], b[2 * q + 1])
            if N % 2 == 1:
                k = warp.rounded_half_product(k, d0[N - 1], d1[N - 1], b[N - 1])
            keys = keys + k
        cos0, cos1, sin0, sin1 = step(steps, 4 * lane + (SIXTEEN * L.fast + s) * 128, L)
        second0, first0 = warp.turned(keys[2], keys[0], cos0, sin0)
        second1, first1 = warp.turned(keys[3], keys[1], cos1, sin1)
        y0 = warp.product(y0, first0, first1, second0, second1, fast[2 * s], fast[2 * s + 1], False)
    return y0 + y1


@warp.function
def _absorbed(medium, over_run, room, lane, steps, shift_at, medium_at, L: tl.constexpr):
    """Absorbed queries over a stretch, by its tables from these words on."""
    MEDIUM: tl.constexpr = L.medium
    terms = ()
    for s in tl.static_range(MEDIUM):
        terms = terms + (step(steps, medium_at + 32 * s, L),)
    return absorbed_over_stretch(terms_of(medium, terms), over_run, step(steps, shift_at, L), room, lane, L)


@warp.function
def _fetch(queue, lane, token, most, keys, values, norms, L: tl.constexpr, G: tl.constexpr):
    """Begin to copy the codes of 32 tokens to shared memory: those from ``token`` on, or from ``most`` if that is less.

    ``keys``, ``values`` and ``norms`` are where each lane's share of the row's first 32 tokens begins. All that is ahead is
    copied, also where a run has ended, so that no copy waits for a predicate but those of which only some lanes have a share.
    """
    KEY_BYTES: tl.constexpr = 2 * G.k.halfwords
    VALUE_BYTES: tl.constexpr = 2 * G.v.halfwords
    token = tl.minimum(token, most).to(tl.int64)
    keys, values = keys + token * KEY_BYTES, values + token * VALUE_BYTES
    for i in tl.static_range((2 * KEY_BYTES + 31) // 32):
        warp.copy_ahead(queue + (16 * lane + 512 * i), keys + 512 * i, lane < 2 * KEY_BYTES - 32 * i, 16)
    for i in tl.static_range((2 * VALUE_BYTES + 31) // 32):
        to = queue + (16 * lane + (_STRETCH * KEY_BYTES + 512 * i))
        warp.copy_ahead(to, values + 512 * i, lane < 2 * VALUE_BYTES - 32 * i, 16)
    if G.normalised:
        warp.copy_ahead(queue + (4 * lane + _STRETCH * (KEY_BYTES + VALUE_BYTES)), norms + token, lane < 8, 4)
    warp.end_of_copies(lane)


@warp.function
def attend_latent(
    chunk, store, before, after, masks, tables, room, left, row_group, quartet, low, high, n, row_positions, gaps, coded_slots,
    slots, segments, splits, split, scale,
    G: tl.constexpr, R: tl.constexpr, F: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Attention of a quartet of queries to coded tokens from ``low`` to ``high``, left for the merge."""
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    MEDIUM: tl.constexpr = L.medium
    FAST: tl.constexpr = L.fast
    REGISTERS: tl.constexpr = L.registers
    STAGES: tl.constexpr = L.room.stages
    WARPS: tl.constexpr = L.warps
    T: tl.constexpr = 32 * WARPS
    TILES: tl.constexpr = (L.value_registers + 1) // 2
    PAIRS: tl.constexpr = 8 * (L.fast + L.medium + L.slow)
    KEY_BYTES: tl.constexpr = 2 * G.k.halfwords
    VALUE_BYTES: tl.constexpr = 2 * G.v.halfwords
    NORMALISED: tl.constexpr = G.normalised
    QUARTETS: tl.constexpr = L.quartets
    ALL_BUT: tl.constexpr = L.all_but
    b, g = row_group // G.groups, row_group % G.groups
    head, quartet = quartet // QUARTETS, quartet % QUARTETS
    x = tl.arange(0, T)
    lane, own_warp = x % 32, x // 32
    r, c = lane // 4, lane % 4
    h, e = r // 2, r % 2
    # what depends on nothing is on its way before the ledger is waited for
    first_position = tl.load(row_positions - G.first_exact) + G.first_exact
    of_keys, of_values = b * K.groups + g // K.share, b * V.groups + g // V.share
    own_key, own_value = (g % K.share * G.heads + head) * G.dim, (g % V.share * G.heads + head) * G.dim
    if not F.in_segments:
        prefetch(store.k_basis + of_keys * (K.width * K.rank), K.width * K.rank, 0, 1)
        prefetch(store.k_affine + of_keys * (2 * K.rank + K.width), 4 * (2 * K.rank + K.width), 0, 1)
    steps = steps_of(tables, room, x, L)
    rows_to_shared(room, x, tables, G, L)
    queries_room = room + (L.room.queries + own_warp * (16 * PAIRS))
    queue = room + (L.room.queues + own_warp * L.room.queue)
    pairwise, alone = c * 0x11 + (4 + c) * 0x1100, c * 0x1111
    first_key, first_value = of_keys.to(tl.int64) * coded_slots, of_values.to(tl.int64) * coded_slots
    keys = store.k_codes.to(tl.pointer_type(tl.uint8)) + first_key * KEY_BYTES + 16 * lane
    values = store.v_codes.to(tl.pointer_type(tl.uint8)) + first_value * VALUE_BYTES + 16 * lane
    norms = store.v_norms + first_value + 4 * lane
    last_slots = coded_slots - _STRETCH  # they are a multiple of 32
    zero = (x * 0).to(tl.float32)
    pointers, lives = (), ()
    for i in tl.static_range(4):
        u = quartet * 4 + i
        of_head = (g * G.heads + head) * G.query_heads + u % G.query_heads
        q = chunk.query + b * chunk.query_strides.row + of_head * chunk.query_strides.head
        pointers = pointers + (q + u // G.query_heads * chunk.query_strides.column,)
        lives = lives + (u + x * 0 < n * G.query_heads,)
    column = tl.minimum((quartet * 4 + c) // G.query_heads, n - 1)
    own = column * 0
    if F.slides:
        own = own_tokens(chunk, b, n, before, after, column, column >= 0, F)
    reference, top = tl.zeros([4], tl.float32), tl.full([4], float("-inf"), tl.float32)
    begin = low
    total, mass = zero, zero
    sums = repeated(zero, 4 * TILES)
    if not F.in_segments:
        affine = store.k_affine + of_keys * (2 * K.rank + K.width)
        basis = store.k_basis + of_keys * (K.width * K.rank) + own_key
    # what the first run has copied ahead is on its way while the basis is made ready
    ready, gain = low < low, zero
    if not F.latent_out:
        out = repeated(zero, 4 * ((G.dim + T - 1) // T))
    again = low < high
    while again:
        low, segment = begin, 0
        if F.in_segments:
            for one in range(1, segments):
                segment += (tl.load(store.starts + b * segments + one) <= low).to(tl.int32)
        if not F.latent_out:
            out = repeated(zero, 4 * ((G.dim + T - 1) // T))
        highest, total, mass = zero + float("-inf"), zero, zero
        sums = repeated(zero, 4 * TILES)
        up = for_lanes(0 - reference + UP, WARPS)
        while low < high:
            end = tl.minimum(high, low // _STRETCH * _STRETCH + WARPS * _RUN)
            if F.in_segments:
                if segment + 1 < segments:
                    end = tl.minimum(end, tl.load(store.starts + b * segments + segment + 1))
                where = of_keys * segments + segment
                affine = store.k_affine + where * (2 * K.rank + K.width)
                basis = store.k_basis + where * (K.width * K.rank) + own_key
                ready = low < low
            position = (first_position + low).to(tl.int32)
            if R.pairs > 0:  # noqa: SIM102  # the one is known at compile time
                if gaps > 0:
                    position = tl.load(row_positions + low)
                    end = _while_they_run_on(row_positions, position, low, end, x, L)
            # what follows a gap, or a segment, may begin at any token, a copy at each 32nd one
            start = low // _STRETCH * _STRETCH
            all_stretches = tl.cdiv(end - start, _STRETCH)
            first_stretch = all_stretches * own_warp // WARPS
            stretches = all_stretches * (own_warp + 1) // WARPS - first_stretch
            token = start + _STRETCH * first_stretch
            last = tl.minimum(end, token + stretches * _STRETCH)
            fetched = token
            for i in tl.static_range(STAGES - 1):
                _fetch(queue + i * L.stage, lane, fetched, last_slots, keys, values, norms, L, G)
                fetched += _STRETCH
            position += (token - low).to(tl.int32)  # where positions run on, also before ``low``
            numbers = numbers_of_queries(lane, pointers, lives, affine + 2 * K.rank + own_key, tables, L)
            if not ready:
                if F.in_segments:
                    tl.debug_barrier()  # the last segment's basis is still read
                sizes = sizes_of_digits(x, affine, tables, G, L)
                of_basis = numbers_of_basis(room, x, basis, tables, G, L)
                gain = gains_to_shared(room, lane, numbers, scale, R, L)
                unit = sizes_to_shared(room, x, sizes, L)
                gain = gain * (16777216.0 / unit)  # digits count 2**-24
                basis_to_shared(room, x, of_basis, L)
                ready = low <= low
            queries_to_shared(queries_room, room, lane, numbers, scale, position, R, L)
            warp.lanes_meet(x)
            over_run = absorbed_over_run(repeated(zero, 4 * REGISTERS), room, queries_room, lane, h, e, c, tables, L)
            over_run = as_operand(over_run, L)
            medium, quick = (), ()
            for s in tl.static_range(MEDIUM):
                medium = medium + query_of(queries_room, h, e, c, L.fast + s, PAIRS)
            for s in tl.static_range(FAST):
                first, second = query_of(queries_room, h, e, c, s, PAIRS)
                quick = quick + (tl.where(e == 1, 0, first), tl.where(e == 1, 0, second))
            shift_at = tl.where(c == h, e, 2) * 4 + L.steps.first
            medium_at = e * 16 + c * 4 + (L.steps.first + L.steps.medium)
            fast_at = c * 4 + (L.steps.first + L.steps.turned)
            absorbed = _absorbed(medium, over_run, room, lane, steps, shift_at, medium_at, L)
            fast = fast_queries(quick, steps, fast_at, L)
            unseen_from, seen_from = last - token - r, low - token - r
            at_stage, ahead = 0, L.room.stages - 1
            for _stretch in range(tl.cdiv(all_stretches, WARPS)):
                warp.wait_for_copies(x, ALL_BUT)
                stage = queue + at_stage * L.stage
                _fetch(queue + ahead * L.stage, lane, fetched, last_slots, keys, values, norms, L, G)
                fetched += _STRETCH
                at_stage = tl.where(at_stage + 1 == L.room.stages, 0, at_stage + 1)
                ahead = tl.where(ahead + 1 == L.room.stages, 0, ahead + 1)
                scores = _scores(stage, room, r, lane, pairwise, alone, absorbed, fast, steps, 0, L, G)
                scores += _scores(stage, room, r, lane, pairwise, alone, absorbed, fast, steps, 1, L, G)
                # for the next stretch; after a run's last one tables hold one more, of no meaning
                shift_at += L.steps.words
                medium_at += L.steps.words
                fast_at += L.steps.words
                absorbed = _absorbed(medium, over_run, room, lane, steps, shift_at, medium_at, L)
                fast = fast_queries(quick, steps, fast_at, L)
                for sixteen in tl.static_range(2):
                    weights = ()
                    for octet in tl.static_range(2):
                        slot = token + (16 * sixteen + 8 * octet) + r
                        across = (r - 16).to(tl.float32) * 0.0625 + (2 * sixteen + octet) * 0.5
                        score = scores[8 * sixteen + 5 + 2 * octet] * across + scores[8 * sixteen + 4 + 2 * octet]
                        score = score * across + scores[8 * sixteen + 1 + 2 * octet]
                        score = score * across + scores[8 * sixteen + 2 * octet]
                        if F.softcap > 0:
                            score = capped(score * gain, F.softcap) + up
                        else:
                            score = score * gain + up
                        seen = (unseen_from > 16 * sixteen + 8 * octet) & (seen_from <= 16 * sixteen + 8 * octet)
                        seen = seen_of(seen, slot, end, own, column, b, n, slots, masks, G, F)
                        score = tl.where(seen, score, float("-inf"))
                        highest = tl.maximum(highest, score)
                        weight = warp.power_of_two(score)
                        total += weight
                        if NORMALISED:
                            size_at = stage + (_STRETCH * (KEY_BYTES + VALUE_BYTES) + r + (16 * sixteen + 8 * octet))
                            code = warp.shared_byte(size_at)
                            weight = warp.power_of_two(score + warp.exponent(code))
                        mass += weight
                        weights = weights + (parts_of(weight),)
                    values_at = stage + (_STRETCH * KEY_BYTES + 16 * sixteen * VALUE_BYTES) + 2 * c * VALUE_BYTES
                    sums = mixed(values_at, r, VALUE_BYTES, weights, sums, False, L)
                token += _STRETCH
                unseen_from -= _STRETCH
                seen_from -= _STRETCH
            warp.wait_for_copies(x, warp.ALL)  # what was copied ahead of the run's last
            if not F.latent_out:
                of_lanes = for_lanes(over_lanes(mass, WARPS), WARPS)
                values_at = of_values * segments + segment
                out = values_of(sums, of_lanes, out, store, values_at, own_value, tables, queue, room, x, G, L)
                mass = zero
                sums = repeated(zero, 4 * TILES)
            low = end
            if F.in_segments and segment + 1 < segments:
                segment += (tl.load(store.starts + b * segments + segment + 1) <= low).to(tl.int32)
        top = tl.max(tl.reshape(highest, (WARPS * 8, 4)), 0) + (reference - UP)
        far = ((top > reference + FAR) | (top < reference - FAR)) & (top > float("-inf"))
        again = tl.max(far.to(tl.int32), 0) > 0
        reference = tl.where(far, top, reference)
    u = quartet * 4 + tl.arange(0, 4)
    row = row_of(u, head, G)
    first_at = row_group.to(tl.int64) * tl.num_programs(1) * F.queries
    at = (first_at + row) * splits + split
    live = u < n * G.query_heads
    tl.store(left.maxima + at, tl.where(top == float("-inf"), float("-inf"), reference), mask=live)
    tl.store(left.totals + at, over_lanes(total, WARPS), mask=live)
    if F.latent_out:
        u = quartet * 4 + c
        row = row_of(u, head, G)
        to = left.sums + ((first_at + row) * splits + split) * F.left
        mass = for_lanes(over_lanes(mass, WARPS), WARPS)
        leave_digits(sums, mass, to, u < n * G.query_heads, queue, room, lane, own_warp, L)
    else:
        places = ()
        for i in tl.static_range(4):
            u = quartet * 4 + i
            row = row_of(u, head, G)
            places = places + (left.sums + ((first_at + row) * splits + split) * F.left,)
        leave_values(out, places, lives, x, G, F, L)


@warp.function
def _while_they_run_on(positions, position, low, end, x, L: tl.constexpr):
    """The first token from ``low`` to ``end`` that is not at ``position`` plus its distance from ``low``, or ``end``."""
    found = end + x * 0
    for first in range(low, end, 32 * L.warps):
        token = first + x
        away = tl.load(positions + token, mask=token < end, other=0) - position != token - low
        found = tl.minimum(found, tl.where(away & (token < end), token, end))
    return tl.min(found, 0)
