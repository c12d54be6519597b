"""Triton kernels that write to a store: the books, the window, and the codes of what falls out of it.

They compute what ``reference.advance`` and ``reference.append`` say. A step of one column takes one launch for the books and
one a layer, with a grid that depends on shapes alone and without waiting for the GPU: it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.buffers import LEDGER, Buffers
from spectral_compile.kernels.ledger import forget

COLUMNS: tl.constexpr = tl.constexpr(LEDGER)
LEAST = 16  # the smallest extent of a matrix product
_TILE = 32  # tokens that a program takes
_SPAN = 512  # tokens whose squared queries one program sums


@triton.jit
def books(ledger, b):
    """Of one row: tokens and coded tokens before this step, and the same after it, int32."""
    row = ledger + b * COLUMNS
    before, coded = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    return before, coded, tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)


@triton.jit(do_not_specialize=["n", "slots"])
def _advance_kernel(
    ledger, positions, ids, valid, n, slots, ids_b, ids_n, valid_b,
    SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr, ONE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row's books; a single warp, since what is stored last is what is loaded first."""
    b = tl.program_id(0).to(tl.int64)
    row = ledger + b * COLUMNS
    before, coded, waiting = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    gaps = tl.load(row + 5)
    after = before
    for start in range(0, n, TILE):
        column = start + tl.arange(0, TILE)
        keep = column < n
        if HAS_VALID:
            keep = keep & (tl.load(valid + b * valid_b + column, mask=keep, other=0) != 0)
        counted = keep.to(tl.int32)
        slot = after + tl.cumsum(counted, 0) - 1
        new = tl.load(ids + b * ids_b + column * ids_n, mask=keep, other=0).to(tl.int32) if HAS_IDS else slot.to(tl.int32)
        tl.store(positions + b * slots + slot, new, mask=keep)
        tl.debug_barrier()
        follows = keep & (slot > 0)
        previous = tl.load(positions + b * slots + slot - 1, mask=follows, other=0)
        gaps += tl.sum((follows & (new != previous + 1)).to(tl.int32), 0)
        after += tl.sum(counted, 0)
    ready = tl.maximum(after - SINKS - RECENT - coded, 0)
    step = ready // BLOCK * BLOCK
    if ONE:
        step = tl.where((waiting > 0) | SEGMENT, 0, step)
    else:
        waiting = tl.where(ready < FIRST, waiting, 0)
        step = tl.where(waiting > 0, 0, step)
    tl.store(row, before)
    tl.store(row + 1, coded)
    tl.store(row + 2, after)
    tl.store(row + 3, coded + step)
    tl.store(row + 4, waiting)
    tl.store(row + 5, gaps)


@triton.jit(do_not_specialize=["n", "slots"])
def _hide_kernel(visible, flags, columns, shown, n, slots, columns_b, shown_b, shown_n, TILE: tl.constexpr):
    """``hide.hide`` of ``TILE`` columns of a row, of which a program counts the tokens before its own by itself."""
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    t = tl.arange(0, TILE)
    before = tl.zeros([TILE], tl.int32)
    for start in range(0, first, TILE):
        before += tl.load(columns + b * columns_b + start + t).to(tl.int32)
    column = first + t
    held = tl.load(columns + b * columns_b + column, mask=column < n, other=0) != 0
    seen = tl.load(shown + b * shown_b + column * shown_n, mask=column < n, other=0) != 0
    slot = tl.sum(before, 0) + tl.cumsum(held.to(tl.int32), 0) - 1
    tl.store(visible + b * slots + slot, seen.to(tl.uint8), mask=held)
    found = tl.max((held & (seen == 0)).to(tl.int32), 0) + 2 * tl.max((seen & (held == 0)).to(tl.int32), 0)
    tl.atomic_or(flags + b, found)


@triton.jit
def recent_size(code):
    """What bytes of a window are times; see ``codec.recent_code``."""
    return tl.exp2((code.to(tl.float32) - 192) * 0.125)


@triton.jit
def _tokens(
    new, exact, recent, sizes, index, b, g, slots, live, before, n, extent, s_b, s_h, s_n,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr, BYTES: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """Tokens in these slots as joint channels [N, WP]: out of the window what stood there before, else out of the chunk."""
    c = tl.arange(0, WP)
    real = c < HEADS * D
    head, d = g * HEADS + c // D, c % D
    held = slots < tl.maximum(before - SINKS, 0)
    place, kept = (slots % (extent - SINKS))[:, None], (live & held)[:, None] & real[None, :]
    if BYTES:
        at = ((b * H + head) * (extent - SINKS))[None, :] + place
        size = recent_size(tl.load(sizes + at, mask=kept, other=0))
        old = tl.load(recent + at * D + d[None, :], mask=kept, other=0).to(tl.float32) * size
    else:
        ring = ((b * H + head) * extent + SINKS)[None, :] * D + place * D + d[None, :]
        old = tl.load(exact + ring, mask=kept, other=0.0)
    rank = slots + SINKS - before
    fresh = live & (slots >= tl.maximum(before - SINKS, 0))
    column = tl.load(index + b * (n + 1) + rank, mask=fresh, other=0) if HAS_INDEX else rank
    at = b * s_b + column[:, None] * s_n + (head * s_h + d)[None, :]
    x = tl.load(new + at, mask=fresh[:, None] & real[None, :], other=0.0).to(old.dtype)
    return tl.where(held[:, None], old, x)


@triton.jit
def _norm(x, W: tl.constexpr):
    """Norm codes [N] of tokens [N, WP], and the scales that they stand for; see ``codec.norm_code``."""
    rms = tl.sqrt(tl.sum(x * x, 1) / W)
    code = tl.floor(tl.log2(tl.maximum(rms, 1.1754943508222875e-38)) * 8 + 128.5)
    code = tl.minimum(tl.maximum(code, 0.0), 255.0)
    return code, tl.exp2((code - 128) / 8)


@triton.jit
def _tier(
    z, basis, affine, rows, mine, share, shares,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr, PORTION: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Quantise and pack the channels of one tier, field by field, so that nothing is moved between lanes.

    Its bytes, 16 at a time, are portions of a row, counted from ``PORTION`` on, of which ``share`` takes its own.
    """
    FIELDS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = (COUNT + FIELDS - 1) // FIELDS
    HALF: tl.constexpr = 1 << (BITS - 1)
    c = tl.arange(0, WP)
    for start in range(0, BYTES, 16):
        if (PORTION + start // 16) % shares == share:
            j = start + tl.arange(0, 16)
            packed = tl.zeros([N, 16], tl.int32)
            for field in tl.static_range(FIELDS):
                real = j * FIELDS + field < COUNT
                r = FIRST + j * FIELDS + field
                matrix = tl.load(basis + r[None, :] * W + c[:, None], mask=(c < W)[:, None] & real[None, :], other=0)
                step = tl.load(affine + r, mask=real, other=1.0)
                scale = tl.load(affine + R + r, mask=real, other=0.0)
                value = tl.dot(z, matrix.to(tl.float32), input_precision=PRECISION) * scale[None, :] / step[None, :]
                code = tl.minimum(tl.maximum(tl.floor(value), -HALF), HALF - 1).to(tl.int32) + HALF
                packed |= tl.where(real[None, :], code, 0) << (field * BITS)
            tl.store(rows[:, None] + (BYTE + j)[None, :], packed.to(tl.uint8), mask=mine[:, None] & (j < BYTES)[None, :])


@triton.jit
def _code(
    x, codes, norms, basis, affine, starts, b, g, slots, live, coded_cap, segments, share, shares,
    GROUPS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, B8: tl.constexpr, B4: tl.constexpr, B2: tl.constexpr,
    LOSSLESS: tl.constexpr, NORMALISED: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Code tokens [N, WP] of one side into their slots, each with the last segment that begins at or before it.

    ``shares`` programs do this together: of the portions of a row each writes every ``shares``-th one.
    """
    c = tl.arange(0, WP)
    if LOSSLESS:
        at = ((b * GROUPS + g) * coded_cap + slots) * W
        tl.store(codes + at[:, None] + c[None, :], x, mask=live[:, None] & (c < W)[None, :])
    else:
        R: tl.constexpr = B8 + B4 + B2
        ROW: tl.constexpr = (B8 + (B4 + 1) // 2 + (B2 + 3) // 4 + 3) // 4 * 4
        P8: tl.constexpr = (B8 + 15) // 16  # portions
        P4: tl.constexpr = (B4 + 31) // 32
        x = x.to(tl.float32)
        if NORMALISED:
            code, size = _norm(x, W)
            tl.store(norms + (b * GROUPS + g) * coded_cap + slots, code.to(tl.uint8), mask=live)
            x = x / size[:, None]
        segment = tl.zeros([N], tl.int32) - 1
        for s in range(0, segments):
            segment += (slots >= tl.load(starts + b * segments + s)).to(tl.int32)
        rows = codes + ((b * GROUPS + g) * coded_cap + slots) * ROW
        for s in range(tl.min(tl.where(live, segment, segments), 0), tl.max(tl.where(live, segment, -1), 0) + 1):
            mine = live & (segment == s)
            at = (b * GROUPS + g) * segments + s
            matrix, own = basis + at * (W * R), affine + at * (2 * R + W)
            y = x * tl.load(own + 2 * R + c, mask=c < W, other=0.0)[None, :]
            again = tl.zeros([N, WP], tl.float32)
            for start in range(0, R, 32):
                r = start + tl.arange(0, 32)
                part = tl.load(matrix + r[None, :] * W + c[:, None], mask=(c < W)[:, None] & (r < R)[None, :], other=0)
                part = part.to(tl.float32)
                scale = tl.load(own + R + r, mask=r < R, other=0.0)
                first = tl.dot(y, part, input_precision=PRECISION) * (scale * scale)[None, :]
                again = tl.dot(first, tl.trans(part), again, input_precision=PRECISION)
            z = 2 * y - again  # the second analysis of codec.basis: of the tokens and of what the first one missed
            if B8 > 0:
                _tier(z, matrix, own, rows, mine, share, shares, 0, B8, 0, 8, 0, W, WP, R, N, PRECISION)
            if B4 > 0:
                _tier(z, matrix, own, rows, mine, share, shares, B8, B4, B8, 4, P8, W, WP, R, N, PRECISION)
            if B2 > 0:
                byte: tl.constexpr = B8 + (B4 + 1) // 2
                _tier(z, matrix, own, rows, mine, share, shares, B8 + B4, B2, byte, 2, P8 + P4, W, WP, R, N, PRECISION)


@triton.jit
def _keep_bytes(x, recent, sizes, first, place, kept, extent, HEADS: tl.constexpr, D: tl.constexpr, WP: tl.constexpr):
    """Write tokens [N, WP] of HEADS heads, of which ``first`` is the first, to their places of a window of bytes."""
    c = tl.arange(0, WP)
    x = x.to(tl.float32)
    for h in tl.static_range(HEADS):
        own = (c // D == h)[None, :]
        most = tl.max(tl.where(own, tl.abs(x), 0.0), 1)
        size = tl.ceil(tl.log2(tl.maximum(most / 127, 1.1754943508222875e-38)) * 8 + 192)
        size = tl.minimum(tl.maximum(size, 0.0), 255.0)
        code = tl.floor(x / recent_size(size)[:, None] + 0.5)
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        at = (first + h) * extent + place
        tl.store(recent + at[:, None] * D + (c % D)[None, :], code.to(tl.int8), mask=kept[:, None] & own)
        tl.store(sizes + at, size.to(tl.uint8), mask=kept)


@triton.jit
def _keep(
    new, exact, recent, sizes, index, b, g, tile, before, after, coded_after, n, extent, s_b, s_h, s_n,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr, BYTES: tl.constexpr,
    HAS_INDEX: tl.constexpr, ONE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the new tokens that are not coded, place by place of first tokens and recent ones, or the one new token."""
    window = extent - SINKS
    c = tl.arange(0, WP)
    head, d = g * HEADS + c // D, c % D
    rows = SINKS if BYTES else extent  # of what is exact
    if ONE:
        slot = before - SINKS
        place = tl.where(slot < 0, before, SINKS + slot % window)
        stays = (after > before) & ((slot < 0) | (slot >= coded_after))
        kept = c < tl.where(stays, HEADS * D, 0)
        x = tl.load(new + b * s_b + head * s_h + d, mask=kept, other=0.0)
        if BYTES:
            own = tl.zeros([1], tl.int32) + tl.where(stays, slot, -1)
            at = tl.maximum(own, 0) % window
            _keep_bytes(x[None, :], recent, sizes, b * H + g * HEADS, at, own >= 0, window, HEADS, D, WP)
            kept = kept & (c < tl.where(slot < 0, HEADS * D, 0))
        tl.store(exact + ((b * H + head) * rows + place) * D + d, x, mask=kept)
    else:
        place = tile * N + tl.arange(0, N)
        lowest = tl.maximum(tl.maximum(before - SINKS, 0), coded_after)
        slot = lowest + (place - SINKS - lowest % window + window) % window  # the only one that may have come to this place
        token = tl.where(place < SINKS, place, slot + SINKS)
        kept = (place < extent) & (token >= before) & (token < after)
        rank = token - before
        column = tl.load(index + b * (n + 1) + rank, mask=kept, other=0) if HAS_INDEX else rank
        mask = kept[:, None] & (c < HEADS * D)[None, :]
        x = tl.load(new + b * s_b + column[:, None] * s_n + (head * s_h + d)[None, :], mask=mask, other=0.0)
        if BYTES:
            _keep_bytes(x, recent, sizes, b * H + g * HEADS, place - SINKS, kept & (place >= SINKS), window, HEADS, D, WP)
            mask = mask & (place < SINKS)[:, None]
        tl.store(exact + ((b * H + head) * rows)[None, :] * D + place[:, None] * D + d[None, :], x, mask=mask)


@triton.jit
def enter(
    tile, pair, side, share, shares, query, key, value, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine,
    k_exact, v_exact, k_recent, v_recent, k_sizes, v_sizes, starts, moment, ledger, index, n, code_tiles, coded_cap, segments,
    extent, q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n,
    H: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr,
    BYTES: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr,
    V2: tl.constexpr, LOSSLESS: tl.constexpr, NORMALISED: tl.constexpr, HAS_INDEX: tl.constexpr, CODE: tl.constexpr,
    KEEP: tl.constexpr, ONE: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of what one group and side store the part ``tile``: the first ``code_tiles`` code N tokens each, others keep.

    ``shares`` programs code a tile together, of which this is number ``share``.
    """
    GROUPS: tl.constexpr = H // HEADS
    W: tl.constexpr = HEADS * D
    b, g = (pair // GROUPS).to(tl.int64), pair % GROUPS
    before, coded, after, coded_after = books(ledger, b)
    if tile < code_tiles:
        if CODE:  # noqa: SIM102
            if coded + tile * N < coded_after:
                slots = coded + tile * N + tl.arange(0, N)
                live = slots < coded_after
                if side == 0:
                    x = _tokens(key, k_exact, k_recent, k_sizes, index, b, g, slots, live, before, n, extent, k_b, k_h, k_n,
                                H, HEADS, D, WP, SINKS, BYTES, HAS_INDEX)  # fmt: skip
                    _code(x, k_codes, v_norms, k_basis, k_affine, starts, b, g, slots, live, coded_cap, segments, share, shares,
                          GROUPS, W, WP, K8, K4, K2, LOSSLESS, False, N, PRECISION)  # fmt: skip
                else:
                    x = _tokens(value, v_exact, v_recent, v_sizes, index, b, g, slots, live, before, n, extent, v_b, v_h, v_n,
                                H, HEADS, D, WP, SINKS, BYTES, HAS_INDEX)  # fmt: skip
                    _code(x, v_codes, v_norms, v_basis, v_affine, starts, b, g, slots, live, coded_cap, segments, share, shares,
                          GROUPS, W, WP, V8, V4, V2, LOSSLESS, NORMALISED, N, PRECISION)  # fmt: skip
    else:
        if KEEP:
            if side == 0:
                _keep(key, k_exact, k_recent, k_sizes, index, b, g, tile - code_tiles, before, after, coded_after, n, extent,
                      k_b, k_h, k_n, H, HEADS, D, WP, SINKS, BYTES, HAS_INDEX, ONE, N)  # fmt: skip
                if ONE:
                    c = tl.arange(0, WP)
                    head = g * HEADS + c // D
                    counts = c < tl.where(after > before, W, 0)
                    total = tl.load(moment + (b * H + head) * D + c % D, mask=counts, other=0.0)
                    squares = tl.zeros([WP], tl.float32)
                    for i in tl.static_range(GQA):
                        q = tl.load(query + b * q_b + (head * GQA + i) * q_h + c % D, mask=counts, other=0.0).to(tl.float32)
                        squares += q * q
                    tl.store(moment + (b * H + head) * D + c % D, total + squares, mask=counts)
            else:
                _keep(value, v_exact, v_recent, v_sizes, index, b, g, tile - code_tiles, before, after, coded_after, n, extent,
                      v_b, v_h, v_n, H, HEADS, D, WP, SINKS, BYTES, HAS_INDEX, ONE, N)  # fmt: skip


@triton.jit
def enter_one(
    tile, pair, side, share, shares, pointers,
    CONSTANTS: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``enter`` in a step of one column, from what ``Tokens.pointers`` and ``Tokens.step`` give."""
    C: tl.constexpr = CONSTANTS
    enter(tile, pair, side, share, shares, *pointers, C[0], C[1], C[2], C[3], C[4], C[5], C[6], C[7], C[8], C[9], C[10], C[11],
          C[12], C[13], C[14], C[15], CODE, KEEP, True, C[16], PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=["n", "code_tiles", "segments"])
def _append_kernel(
    query, key, value, k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine, k_exact, v_exact, k_recent, v_recent,
    k_sizes, v_sizes, starts, moment, ledger, index, n, code_tiles, coded_cap, segments, extent,
    q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n,
    H: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr,
    BYTES: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr,
    V2: tl.constexpr, LOSSLESS: tl.constexpr, NORMALISED: tl.constexpr, HAS_INDEX: tl.constexpr, CODE: tl.constexpr,
    KEEP: tl.constexpr, ONE: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part a program."""
    enter(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), 0, 1, query, key, value, k_codes, v_codes, v_norms, k_basis,
        v_basis, k_affine, v_affine, k_exact, v_exact, k_recent, v_recent, k_sizes, v_sizes, starts, moment, ledger, index, n,
        code_tiles, coded_cap, segments, extent, q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n, H, HEADS, GQA, D, WP, SINKS, BYTES,
        K8, K4, K2, V8, V4, V2, LOSSLESS, NORMALISED, HAS_INDEX, CODE, KEEP, ONE, N, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "offset", "count"])
def _gather_kernel(
    key, value, k_exact, v_exact, k_recent, v_recent, k_sizes, v_sizes, ledger, index, out, n, offset, count, sample, extent,
    rows, k_b, k_h, k_n, v_b, v_h, v_n,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr, BYTES: tl.constexpr,
    NORMALISED: tl.constexpr, HAS_INDEX: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``count`` of the tokens that this step codes, from the one at ``offset`` on; one in several where ``sample`` is not 0."""
    GROUPS: tl.constexpr = H // HEADS
    W: tl.constexpr = HEADS * D
    tile, pair, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (pair // GROUPS).to(tl.int64), pair % GROUPS
    before, coded, _after, coded_after = books(ledger, b)
    i = tile * N + tl.arange(0, N)
    every = 1
    if sample != 0:
        every = tl.maximum((coded_after - coded) // sample, 1)
    slots = coded + offset + i * every
    live = (i < count) & (slots < coded_after)
    c = tl.arange(0, WP)
    at = (((side * rows + b) * GROUPS + g) * count + i) * W
    mask = (i < count)[:, None] & (c < W)[None, :]
    if side == 0:
        k = _tokens(key, k_exact, k_recent, k_sizes, index, b, g, slots, live, before, n, extent, k_b, k_h, k_n,
                    H, HEADS, D, WP, SINKS, BYTES, HAS_INDEX)  # fmt: skip
        tl.store(out + at[:, None] + c[None, :], k.to(out.dtype.element_ty), mask=mask)
    else:
        v = _tokens(value, v_exact, v_recent, v_sizes, index, b, g, slots, live, before, n, extent, v_b, v_h, v_n,
                    H, HEADS, D, WP, SINKS, BYTES, HAS_INDEX).to(tl.float32)  # fmt: skip
        if NORMALISED:
            _, size = _norm(v, W)
            v = v / size[:, None]
        tl.store(out + at[:, None] + c[None, :], v.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def _moment_kernel(
    query, valid, out, n, q_b, q_h, q_n, valid_b,
    H: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_VALID: tl.constexpr,
    SPAN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Squared queries of one KV head summed over ``SPAN`` columns: out float32 [spans, B, H, D]."""
    span, pair = tl.program_id(0), tl.program_id(1)
    b, h = (pair // H).to(tl.int64), pair % H
    d = tl.arange(0, DP)
    total = tl.zeros([DP], tl.float32)
    for start in range(0, SPAN, N):
        column = span * SPAN + start + tl.arange(0, N)
        keep = column < n
        if HAS_VALID:
            keep = keep & (tl.load(valid + b * valid_b + column, mask=keep, other=0) != 0)
        for i in tl.static_range(GQA):
            at = b * q_b + (h * GQA + i) * q_h + column[:, None] * q_n + d[None, :]
            q = tl.load(query + at, mask=keep[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            total += tl.sum(q * q, 0)
    tl.store(out + (span * tl.num_programs(1) + pair) * D + d, total, mask=d < D)


def advance_triton(
    ledger: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    chunk: torch.Tensor,
    layout: Layout,
) -> None:
    """``reference.advance`` in one launch, which begins a step: an append follows no other change of its ledger.

    The scratch slot of ``positions`` is left alone.
    """
    forget()
    batch, count = ledger.shape[0], chunk.shape[2]
    ids = position_ids if position_ids is None else position_ids.expand(batch, count)
    valid = flags(valid)
    _advance_kernel[(batch,)](
        ledger, positions, ids, valid, count, positions.shape[1],
        *((0, 0) if ids is None else ids.stride()), 0 if valid is None else valid.stride(0),
        SINKS=layout.first_exact, RECENT=layout.recent, BLOCK=layout.block, FIRST=layout.first, SEGMENT=layout.segment > 0,
        HAS_IDS=ids is not None, HAS_VALID=valid is not None, ONE=count == 1, TILE=16 if count == 1 else 512, num_warps=1,
    )  # fmt: skip


def hide_triton(visible: torch.Tensor, flags: torch.Tensor, columns: torch.Tensor, shown: torch.Tensor) -> None:
    """``hide.hide`` in one launch, and one that clears ``flags``."""
    shown, tile = shown.view(torch.uint8) if shown.dtype == torch.bool else shown, 2048
    flags.zero_()
    _hide_kernel[(len(visible), max(1, triton.cdiv(shown.shape[1], tile)))](
        visible, flags, columns.view(torch.uint8), shown, shown.shape[1], visible.shape[1], columns.stride(0), *shown.stride(),
        TILE=tile, num_warps=8,
    )  # fmt: skip


class Tokens:
    """A chunk that enters one layer's store, as the kernels take it: ``query`` [B, Hq, n, D], keys and values [B, H, n, D]."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ledger: torch.Tensor,
        valid: torch.Tensor | None,
        buffers: Buffers,
        layout: Layout,
    ) -> None:
        self.query, self.key, self.value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
        self.ledger, self.buffers, self.layout = ledger, buffers, layout
        self.count = key.shape[2]
        self.extent = layout.first_exact + buffers.recent_slots(layout)
        self.valid = None if self.count < 2 else flags(valid)  # of one column the ledger says enough
        self.index = None if self.valid is None else _columns(valid)
        self.geometry = {
            "H": layout.kv_heads,
            "HEADS": layout.head_group,
            "D": layout.head_dim,
            "WP": max(LEAST, triton.next_power_of_2(layout.width)),
            "SINKS": layout.first_exact,
            "BYTES": layout.recent_bits == 8,
            "HAS_INDEX": self.index is not None,
            "N": _TILE,
        }

    def add_moment(self) -> None:
        """Add the squared queries to ``moment``, in an order that is always the same."""
        batch, q_heads, count, dim = self.query.shape
        heads = self.layout.kv_heads
        spans = -(-count // _SPAN)
        out = torch.empty(spans, batch, heads, dim, dtype=torch.float32, device=self.query.device)
        _moment_kernel[(spans, batch * heads)](
            self.query, self.valid, out, count, *self.query.stride()[:3], 0 if self.valid is None else self.valid.stride(0),
            H=heads, GQA=q_heads // heads, D=dim, DP=triton.next_power_of_2(dim), HAS_VALID=self.valid is not None,
            SPAN=_SPAN, N=_TILE,
        )  # fmt: skip
        self.buffers.moment.add_(out.sum(0))

    def gather(self, offset: int, count: int, sample: int = 0) -> torch.Tensor:
        """Tokens that this step codes, [2, B, G, count, W] in the model's dtype: keys, and values over their norms.

        They begin ``offset`` after the first one; past a row's last there are zeros. With ``sample`` > 0 a row gives about that
        many, and less than twice as many, at even distances.
        """
        layout, buffers, batch = self.layout, self.buffers, len(self.ledger)
        out = self.key.new_empty(2, batch, layout.groups, count, layout.width)
        _gather_kernel[(-(-count // _TILE), batch * layout.groups, 2)](
            self.key, self.value, buffers.k_exact, buffers.v_exact, buffers.k_recent, buffers.v_recent, buffers.k_sizes,
            buffers.v_sizes, self.ledger, self.index, out, self.count, offset, count, sample, self.extent, batch,
            *self.key.stride()[:3], *self.value.stride()[:3],
            NORMALISED=layout.normalised, **self.geometry,
        )  # fmt: skip
        return out

    def write(self, code_tiles: int, keep: bool) -> None:
        """Code up to ``code_tiles`` tiles a row, and keep what stays exact; both in one launch only for one column."""
        one = self.count == 1
        tiles = code_tiles + keep * (1 if one else -(-self.extent // _TILE))
        if tiles == 0:
            return
        grid = (tiles, len(self.ledger) * self.layout.groups, 2)
        what = {"CODE": code_tiles > 0, "KEEP": keep, "ONE": one}
        _append_kernel[grid](*self.pointers(code_tiles), **what, **self.constants, num_stages=2)

    def pointers(self, code_tiles: int) -> tuple[Any, ...]:
        """What ``enter`` takes before its constants."""
        return (
            self.query, self.key, self.value, *self.buffers, self.ledger, self.index, self.count, code_tiles,
            self.buffers.k_codes.shape[2], self.buffers.starts.shape[1], self.extent,
            *self.query.stride()[:2], *self.key.stride()[:3], *self.value.stride()[:3],
        )  # fmt: skip

    def step(self) -> tuple[int, ...]:
        """The constants of ``enter`` that are not the same for every step of one column, in its order."""
        last = ("LOSSLESS", "NORMALISED", "HAS_INDEX", "N")
        order = ("H", "HEADS", "GQA", "D", "WP", "SINKS", "BYTES", "K8", "K4", "K2", "V8", "V4", "V2", *last)
        constants = self.constants
        return tuple(constants[name] for name in order)

    @property
    def constants(self) -> dict[str, Any]:
        layout = self.layout
        return {
            **self.geometry,
            "GQA": self.query.shape[1] // layout.kv_heads,
            "K8": layout.key.bits8, "K4": layout.key.bits4, "K2": layout.key.bits2,
            "V8": layout.value.bits8, "V4": layout.value.bits4, "V2": layout.value.bits2,
            "LOSSLESS": layout.lossless,
            "NORMALISED": layout.normalised,
            "PRECISION": "tf32x3" if self.key.dtype == torch.float32 else "tf32",
        }  # fmt: skip


def tiles_of(tokens: int) -> int:
    """Programs that code ``tokens`` tokens of a row."""
    return -(-tokens // _TILE)


def flags(valid: torch.Tensor | None) -> torch.Tensor | None:
    """Which columns are tokens as kernels read it: bool [B, n] -> uint8 [B, n], one row after another."""
    return None if valid is None else valid.contiguous().view(torch.uint8)


def _columns(valid: torch.Tensor) -> torch.Tensor:
    """The column of each token: bool [B, n] -> int32 [B, n + 1], of which a row uses as many as it has tokens."""
    batch, count = valid.shape
    out = torch.zeros(batch, count + 1, dtype=torch.int32, device=valid.device)
    column = torch.arange(count, dtype=torch.int32, device=valid.device).expand(batch, count)
    return out.scatter_(1, torch.where(valid, valid.cumsum(1) - 1, count), column)
