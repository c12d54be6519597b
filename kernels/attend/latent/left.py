"""What a program leaves of its split: digits of values summed over its warps, as they are or by the basis of their segment."""

from __future__ import annotations

import triton.language as tl

from spectral_compile.kernels.attend.coded import inverse
from spectral_compile.kernels.attend.latent import warp

_COUNTED: tl.constexpr = tl.constexpr(2.0**69)  # digits of values count 2**-133, weights 2**64


@warp.function
def for_lanes(x, WARPS: tl.constexpr):
    """Numbers of the four queries, [4], for each lane that of its own query."""
    return tl.reshape(tl.broadcast_to(x[None, :], (WARPS * 8, 4)), (WARPS * 32,))


@warp.function
def over_lanes(x, WARPS: tl.constexpr):
    """Sums of weights of each of the four queries, [4]."""
    return tl.sum(tl.reshape(x, (WARPS * 8, 4)), 0) * 5.421010862427522e-20  # 2**-64


@warp.function
def _of_both(sums, i: tl.constexpr):
    """Of the i-th register of values: upper and next bits of the weights together."""
    return sums[4 * (i // 2) + 2 * (i % 2)] + sums[4 * (i // 2) + 2 * (i % 2) + 1]


@warp.function
def _digits_to_queue(sums, queue, lane, L: tl.constexpr):
    """Write what each register that is left came to to the warp's queue, which is empty; warps meet after it."""
    LEFT: tl.constexpr = len(L.left)
    for i in tl.static_range(LEFT):
        y = _of_both(sums, L.left[i].register) * (_COUNTED / (1 << L.left[i].at))
        if L.left[i].upper_too:
            y += _of_both(sums, L.left[i].register + 1) * (_COUNTED * 16)
        warp.to_shared(queue + (128 * i + 4 * lane), y.to(tl.int32, bitcast=True))
    tl.debug_barrier()


@warp.function
def _over_warps(room, lane, own_warp, FIRST: tl.constexpr, L: tl.constexpr):
    """Of the register FIRST plus the warp's number the sum over warps."""
    WARPS: tl.constexpr = L.warps
    y = lane * 0.0
    for w in tl.static_range(WARPS):
        from_warp = room + (L.room.queues + w * L.room.queue + 128 * FIRST) + (128 * own_warp + 4 * lane)
        y += warp.shared_word(from_warp).to(tl.float32, bitcast=True)
    return y


@warp.function
def leave_digits(sums, mass, to, live, queue, room, lane, own_warp, L: tl.constexpr):
    """Store what the digits of values came to, less the middle of their range, where the merge looks for it.

    ``to`` is where each lane's query leaves its own. Each warp takes other registers.
    """
    WARPS: tl.constexpr = L.warps
    LEFT: tl.constexpr = len(L.left)
    r = lane // 4
    _digits_to_queue(sums, queue, lane, L)
    for first in tl.static_range(0, LEFT, WARPS):
        place, middle = lane * 0 - 1, mass * 0
        for w in tl.static_range(WARPS):
            if first + w < LEFT:
                own = own_warp == w
                where = r // L.left[first + w].held * L.left[first + w].stride + L.left[first + w].place
                where += r % L.left[first + w].held * L.left[first + w].step
                place, middle = tl.where(own, where, place), tl.where(own, L.left[first + w].middle, middle)
        y = _over_warps(room, lane, own_warp, first, L)
        tl.store(to + place, y - mass * middle, mask=live & (place >= 0))
    for i in tl.static_range(len(L.groups)):
        for f in tl.static_range(8):
            if L.groups[i].held < 8 and f < L.groups[i].fields:  # places that no register has
                none = live & (r >= L.groups[i].held) & (own_warp == 0)
                tl.store(to + (L.groups[i].place + f * L.groups[i].stride + r), 0.0, mask=none)


@warp.function
def values_of(sums, mass, out, store, where, channel, tables, queue, room, x, G: tl.constexpr, L: tl.constexpr):
    """``out`` plus what the values of one segment came to, by its basis: in each lane some channels of all four queries.

    ``where`` is the segment of the values' group, in which the head's channels begin with ``channel``.
    """
    WARPS: tl.constexpr = L.warps
    T: tl.constexpr = 32 * L.warps
    LEFT: tl.constexpr = len(L.left)
    RANK: tl.constexpr = G.v.rank
    ROWS: tl.constexpr = 128 * len(L.left)  # where the rows of digits begin, after what these came to
    lane, own_warp = x % 32, x // 32
    r, c = lane // 4, lane % 4
    basis = store.v_basis + where * (G.v.width * RANK) + channel
    affine = store.v_affine + where * (2 * RANK + G.v.width)
    mixed = room + L.room.queries  # where queries were: they are written anew for the next run
    _digits_to_queue(sums, queue, lane, L)
    for first in tl.static_range(0, LEFT, WARPS):
        register, middle = lane * 0, mass * 0
        for w in tl.static_range(WARPS):
            if first + w < LEFT:
                own = own_warp == w
                register = tl.where(own, L.left[first + w].register, register)
                middle = tl.where(own, L.left[first + w].middle, middle)
        live, digit = first + own_warp < LEFT, 8 * (first + own_warp) + r
        code = warp.word_of(tables.of_values.codes + 8 * register + r, live)
        real = live & (code >= 0)
        size = warp.float_of(affine + code, real) * warp.float_of(affine + RANK + code, real)
        size = size * warp.float_of(tables.of_values.places + 8 * register + r, real)
        y = (_over_warps(room, lane, own_warp, first, L) - mass * middle) * size
        warp.to_shared(mixed + 16 * digit + 4 * c, y.to(tl.int32, bitcast=True), live)
        warp.to_shared(mixed + ROWS + 4 * digit, tl.maximum(code, 0) * G.v.width, live)
    tl.debug_barrier()
    grown = ()
    for part in tl.static_range((G.dim + T - 1) // T):
        d = tl.minimum(T * part + x, G.dim - 1)
        even = inverse(warp.float_of(affine + (2 * RANK + channel) + d, d >= 0))
        came_to = (lane * 0.0, lane * 0.0, lane * 0.0, lane * 0.0)
        for eight in range(LEFT):
            rows = warp.shared_words(mixed + ROWS + 32 * eight) + warp.shared_words(mixed + ROWS + 32 * eight + 16)
            numbers = ()  # all of them before the first is waited for
            for i in tl.static_range(8):
                numbers = numbers + (warp.signed_byte(basis + rows[i] + d),)
            for i in tl.static_range(8):
                four = warp.shared_words(mixed + 128 * eight + 16 * i)
                more = ()
                for h in tl.static_range(4):
                    more = more + (came_to[h] + four[h].to(tl.float32, bitcast=True) * numbers[i].to(tl.float32),)
                came_to = more
        for i in tl.static_range(4):
            grown = grown + (out[4 * part + i] + came_to[i] * even,)
    return grown


@warp.function
def leave_values(out, to, live, x, G: tl.constexpr, F: tl.constexpr, L: tl.constexpr):
    """Store the channels of the four queries, each ``to`` its place where it is ``live``, and zeros beside them."""
    T: tl.constexpr = 32 * L.warps
    for part in tl.static_range((F.left + T - 1) // T):
        d = T * part + x
        for i in tl.static_range(4):
            y = x * 0.0
            if part < (G.dim + T - 1) // T:
                y = tl.where(d < G.dim, out[4 * part + i], 0.0)
            tl.store(to[i] + d, y, mask=live[i] & (d < F.left))
