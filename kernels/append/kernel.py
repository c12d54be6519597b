"""Triton kernels that write to a store: the recent tokens, and the codes of what falls out of them.

They compute what ``reference.append`` says. A step of one column takes one launch a layer, with a grid that depends on shapes
alone and without waiting for the GPU: it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.arguments import LEDGER_COLUMNS, ChunkArguments, Geometry, as_bytes
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.values import Chunk

# ``NAME: tl.constexpr = TUPLE.member`` stands wherever a shape, ``static_range`` or another function takes a member of a tuple:
# Triton 3.6 has plain Python values there, and allows none.
_TOKENS: tl.constexpr = tl.constexpr(32)  # that a program takes
_SPAN = 128  # columns whose squared queries one program sums


class Entering(NamedTuple):
    """A chunk and the store that it enters, as kernels take them; ``chunk.index`` is the column of each token.

    ``columns``, ``code_tiles`` and ``segments`` are None where a kernel takes them by themselves, so as not to be compiled
    again for each of their values.
    """

    chunk: ChunkArguments
    store: Buffers
    ledger: torch.Tensor
    coded_slots: int  # of a row
    places: int  # of first and recent tokens
    columns: int | None = None  # of the chunk
    code_tiles: int | None = None
    segments: int | None = None


@triton.jit
def ledger_row(ledger, b):
    """The first four of the columns of ``LedgerRow``, int32."""
    row = ledger + b * LEDGER_COLUMNS
    before, coded = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    return before, coded, tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)


@triton.jit
def recent_size(code):
    """What the bytes of a recent token are times; see ``codec.recent_code``."""
    return tl.exp2((code.to(tl.float32) - 192) * 0.125)


@triton.jit
def column_of(chunk, b, rank, fresh, n):
    """In which column of the chunk its tokens stand."""
    if chunk.index is not None:
        rank = tl.load(chunk.index + b * (n + 1) + rank, mask=fresh, other=0)
    return rank


@triton.jit
def tokens_in(entering, b, g, slots, live, before, n, c, G: tl.constexpr, KEYS: tl.constexpr):
    """Joint channels ``c`` of a side's group in these slots: what stood among the recent ones before, else out of the chunk."""
    chunk, store, places = entering.chunk, entering.store, entering.places
    new = chunk.key if KEYS else chunk.value
    exact = store.k_exact if KEYS else store.v_exact
    recent = store.k_recent if KEYS else store.v_recent
    sizes = store.k_sizes if KEYS else store.v_sizes
    strides = chunk.key_strides if KEYS else chunk.value_strides
    S: tl.constexpr = G.k if KEYS else G.v
    real = c < S.width
    head, d = g * S.heads + c // G.dim, c % G.dim
    held = slots < tl.maximum(before - G.first_exact, 0)
    place, kept = (slots % (places - G.first_exact))[:, None], (live & held)[:, None] & real[None, :]
    if G.recent_in_bytes:
        at = ((b * G.kv_heads + head) * (places - G.first_exact))[None, :] + place
        size = recent_size(tl.load(sizes + at, mask=kept, other=0))
        old = tl.load(recent + at * G.dim + d[None, :], mask=kept, other=0).to(tl.float32) * size
    else:
        ring = ((b * G.kv_heads + head) * places + G.first_exact)[None, :] * G.dim + place * G.dim + d[None, :]
        old = tl.load(exact + ring, mask=kept, other=0.0)
    fresh = live & (slots >= tl.maximum(before - G.first_exact, 0))
    column = column_of(chunk, b, slots + G.first_exact - before, fresh, n)
    at = b * strides.row + column[:, None] * strides.column + (head * strides.head + d)[None, :]
    x = tl.load(new + at, mask=fresh[:, None] & real[None, :], other=0.0).to(old.dtype)
    return tl.where(held[:, None], old, x)


@triton.jit
def norm_of(squares, S: tl.constexpr):
    """Norm codes [N] of tokens with these sums of squares, and the scales that they stand for; see ``codec.norm_code``."""
    rms = tl.sqrt(squares / S.width)
    code = tl.floor(tl.log2(tl.maximum(rms, 1.1754943508222875e-38)) * 8 + 128.5)
    code = tl.minimum(tl.maximum(code, 0.0), 255.0)
    return code, tl.exp2((code - 128) / 8)


@triton.jit
def _tier(
    z, basis, affine, rows, mine, coder, coders,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr, PORTION: tl.constexpr,
    RANK: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Quantise and pack ``COUNT`` channels of one tier, field by field, so that nothing is moved between lanes.

    The tier's bytes, 16 at a time, are portions of a row, counted from ``PORTION`` on, of which ``coder`` takes its own.
    """
    FIELDS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = (COUNT + FIELDS - 1) // FIELDS
    HALF: tl.constexpr = 1 << (BITS - 1)
    c = tl.arange(0, S.WIDTH)
    for start in range(0, BYTES, 16):
        if (PORTION + start // 16) % coders == coder:
            j = start + tl.arange(0, 16)
            packed = tl.zeros([_TOKENS, 16], tl.int32)
            for field in tl.static_range(FIELDS):
                real = j * FIELDS + field < COUNT
                r = FIRST + j * FIELDS + field
                matrix = tl.load(
                    basis + r[None, :] * S.width + c[:, None], mask=(c < S.width)[:, None] & real[None, :], other=0
                )
                step = tl.load(affine + r, mask=real, other=1.0)
                scale = tl.load(affine + RANK + r, mask=real, other=0.0)
                value = tl.dot(z, matrix.to(tl.float32), input_precision=PRECISION) * scale[None, :] / step[None, :]
                code = tl.minimum(tl.maximum(tl.floor(value), -HALF), HALF - 1).to(tl.int32) + HALF
                packed |= tl.where(real[None, :], code, 0) << (field * BITS)
            tl.store(rows[:, None] + (BYTE + j)[None, :], packed.to(tl.uint8), mask=mine[:, None] & (j < BYTES)[None, :])


@triton.jit
def _code(
    x, store, b, g, slots, live, coded_slots, segments, coder, coders,
    G: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Code tokens [N, WIDTH] of one side into their slots, each with the last segment that begins at or before it.

    ``coders`` programs do this together: of the portions of a row each writes every ``coders``-th one.
    """
    codes = store.k_codes if KEYS else store.v_codes
    basis = store.k_basis if KEYS else store.v_basis
    affine = store.k_affine if KEYS else store.v_affine
    S: tl.constexpr = G.k if KEYS else G.v
    c = tl.arange(0, S.WIDTH)
    if G.lossless:
        at = ((b * S.groups + g) * coded_slots + slots) * S.width
        tl.store(codes + at[:, None] + c[None, :], x, mask=live[:, None] & (c < S.width)[None, :])
    else:
        B8: tl.constexpr = S.tiers[0]
        B4: tl.constexpr = S.tiers[1]
        B2: tl.constexpr = S.tiers[2]
        R: tl.constexpr = S.rank
        ROW: tl.constexpr = 2 * S.halfwords
        P8: tl.constexpr = (B8 + 15) // 16  # portions
        P4: tl.constexpr = (B4 + 31) // 32
        WIDTH: tl.constexpr = S.WIDTH
        x = x.to(tl.float32)
        if G.normalised and not KEYS:
            code, size = norm_of(tl.sum(x * x, 1), S)
            tl.store(store.v_norms + (b * S.groups + g) * coded_slots + slots, code.to(tl.uint8), mask=live)
            x = x / size[:, None]
        segment = tl.zeros([_TOKENS], tl.int32) - 1
        for s in range(0, segments):
            segment += (slots >= tl.load(store.starts + b * segments + s)).to(tl.int32)
        rows = codes + ((b * S.groups + g) * coded_slots + slots) * ROW
        for s in range(tl.min(tl.where(live, segment, segments), 0), tl.max(tl.where(live, segment, -1), 0) + 1):
            mine = live & (segment == s)
            at = (b * S.groups + g) * segments + s
            matrix, own = basis + at * (S.width * R), affine + at * (2 * R + S.width)
            y = x * tl.load(own + 2 * R + c, mask=c < S.width, other=0.0)[None, :]
            again = tl.zeros([_TOKENS, WIDTH], tl.float32)
            for start in range(0, R, 32):
                r = start + tl.arange(0, 32)
                part = tl.load(
                    matrix + r[None, :] * S.width + c[:, None], mask=(c < S.width)[:, None] & (r < R)[None, :], other=0
                )
                part = part.to(tl.float32)
                scale = tl.load(own + R + r, mask=r < R, other=0.0)
                first = tl.dot(y, part, input_precision=PRECISION) * (scale * scale)[None, :]
                again = tl.dot(first, tl.trans(part), again, input_precision=PRECISION)
            z = 2 * y - again  # the second analysis of codec.basis: of the tokens and of what the first one missed
            if B8 > 0:
                _tier(z, matrix, own, rows, mine, coder, coders, 0, B8, 0, 8, 0, R, S, PRECISION)
            if B4 > 0:
                _tier(z, matrix, own, rows, mine, coder, coders, B8, B4, B8, 4, P8, R, S, PRECISION)
            if B2 > 0:
                byte: tl.constexpr = B8 + (B4 + 1) // 2
                _tier(z, matrix, own, rows, mine, coder, coders, B8 + B4, B2, byte, 2, P8 + P4, R, S, PRECISION)


@triton.jit
def _keep_bytes(x, recent, sizes, first, place, kept, extent, DIM: tl.constexpr, S: tl.constexpr):
    """Write tokens [N, WIDTH] of a group, whose first head is ``first``, to their places among recent tokens in bytes."""
    HEADS: tl.constexpr = S.heads
    c = tl.arange(0, S.WIDTH)
    x = x.to(tl.float32)
    for h in tl.static_range(HEADS):
        own = (c // DIM == h)[None, :]
        most = tl.max(tl.where(own, tl.abs(x), 0.0), 1)
        size = tl.ceil(tl.log2(tl.maximum(most / 127, 1.1754943508222875e-38)) * 8 + 192)
        size = tl.minimum(tl.maximum(size, 0.0), 255.0)
        code = tl.floor(x / recent_size(size)[:, None] + 0.5)
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        at = (first + h) * extent + place
        tl.store(recent + at[:, None] * DIM + (c % DIM)[None, :], code.to(tl.int8), mask=kept[:, None] & own)
        tl.store(sizes + at, size.to(tl.uint8), mask=kept)


@triton.jit
def _keep(
    entering, b, g, keep_tile, before, after, coded_after, n, G: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr
):  # fmt: skip
    """Write the new tokens that are not coded, place by place of first tokens and recent ones, or the one new token."""
    chunk, store, places = entering.chunk, entering.store, entering.places
    new = chunk.key if KEYS else chunk.value
    exact = store.k_exact if KEYS else store.v_exact
    recent = store.k_recent if KEYS else store.v_recent
    sizes = store.k_sizes if KEYS else store.v_sizes
    strides = chunk.key_strides if KEYS else chunk.value_strides
    S: tl.constexpr = G.k if KEYS else G.v
    window = places - G.first_exact
    c = tl.arange(0, S.WIDTH)
    head, d = g * S.heads + c // G.dim, c % G.dim
    rows = G.first_exact if G.recent_in_bytes else places  # of what is exact
    if ONE:
        slot = before - G.first_exact
        place = tl.where(slot < 0, before, G.first_exact + slot % window)
        stays = (after > before) & ((slot < 0) | (slot >= coded_after))
        kept = c < tl.where(stays, S.width, 0)
        x = tl.load(new + b * strides.row + head * strides.head + d, mask=kept, other=0.0)
        if G.recent_in_bytes:
            own = tl.zeros([1], tl.int32) + tl.where(stays, slot, -1)
            at = tl.maximum(own, 0) % window
            _keep_bytes(x[None, :], recent, sizes, b * G.kv_heads + g * S.heads, at, own >= 0, window, G.dim, S)
            kept = kept & (c < tl.where(slot < 0, S.width, 0))
        tl.store(exact + ((b * G.kv_heads + head) * rows + place) * G.dim + d, x, mask=kept)
    else:
        place = keep_tile * _TOKENS + tl.arange(0, _TOKENS)
        lowest = tl.maximum(tl.maximum(before - G.first_exact, 0), coded_after)
        # the only slot that may have come to this place
        slot = lowest + (place - G.first_exact - lowest % window + window) % window
        token = tl.where(place < G.first_exact, place, slot + G.first_exact)
        kept = (place < places) & (token >= before) & (token < after)
        rank = token - before
        column = rank
        if chunk.index is not None:
            column = tl.load(chunk.index + b * (n + 1) + rank, mask=kept, other=0)
        mask = kept[:, None] & (c < S.width)[None, :]
        x = tl.load(
            new + b * strides.row + column[:, None] * strides.column + (head * strides.head + d)[None, :], mask=mask, other=0.0
        )
        if G.recent_in_bytes:
            first, stays = b * G.kv_heads + g * S.heads, kept & (place >= G.first_exact)
            _keep_bytes(x, recent, sizes, first, place - G.first_exact, stays, window, G.dim, S)
            mask = mask & (place < G.first_exact)[:, None]
        tl.store(exact + ((b * G.kv_heads + head) * rows)[None, :] * G.dim + place[:, None] * G.dim + d[None, :], x, mask=mask)


@triton.jit
def enter(
    append_tile, row_group, side, coder, coders, entering, n, code_tiles, segments,
    G: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one tile of one group's keys (``side`` 0) or values: the first ``code_tiles`` code 32 tokens each, others keep.

    ``coders`` programs code a tile together, of which this is number ``coder``.
    """
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    WIDTH: tl.constexpr = G.k.WIDTH
    QUERY_HEADS: tl.constexpr = G.query_heads
    chunk, store = entering.chunk, entering.store
    b, group = (row_group // G.groups).to(tl.int64), row_group % G.groups
    first, g = group % V.share == 0, group // V.share
    if side == 0:
        first, g = group % K.share == 0, group // K.share
    before, coded, after, coded_after = ledger_row(entering.ledger, b)
    if append_tile < code_tiles:
        if CODE:  # noqa: SIM102
            if first & (coded + append_tile * _TOKENS < coded_after):
                slots = coded + append_tile * _TOKENS + tl.arange(0, _TOKENS)
                live = slots < coded_after
                if side == 0:
                    x = tokens_in(entering, b, g, slots, live, before, n, tl.arange(0, K.WIDTH), G, True)
                    _code(x, store, b, g, slots, live, entering.coded_slots, segments, coder, coders, G, True, PRECISION)
                else:
                    y = tokens_in(entering, b, g, slots, live, before, n, tl.arange(0, V.WIDTH), G, False)
                    _code(y, store, b, g, slots, live, entering.coded_slots, segments, coder, coders, G, False, PRECISION)
    elif KEEP:  # noqa: SIM102  # the one is known at compile time
        if first:
            if side == 0:
                _keep(entering, b, g, append_tile - code_tiles, before, after, coded_after, n, G, True, ONE)
                if ONE:
                    c = tl.arange(0, K.WIDTH)
                    head = g * K.heads + c // G.dim
                    counts = c < tl.where(after > before, K.width, 0)
                    total = tl.load(store.moment + (b * G.kv_heads + head) * G.dim + c % G.dim, mask=counts, other=0.0)
                    squares = tl.zeros([WIDTH], tl.float32)
                    for i in tl.static_range(QUERY_HEADS):
                        at = b * chunk.query_strides.row + (head * G.query_heads + i) * chunk.query_strides.head
                        q = tl.load(chunk.query + at + c % G.dim, mask=counts, other=0.0).to(tl.float32)
                        squares += q * q
                    tl.store(store.moment + (b * G.kv_heads + head) * G.dim + c % G.dim, total + squares, mask=counts)
            else:
                _keep(entering, b, g, append_tile - code_tiles, before, after, coded_after, n, G, False, ONE)


@triton.jit(do_not_specialize=["n", "code_tiles", "segments"])
def _append_kernel(
    entering, n, code_tiles, segments,
    G: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile a program."""
    append_tile, row_group, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    enter(append_tile, row_group, side, 0, 1, entering, n, code_tiles, segments, G, CODE, KEEP, ONE, PRECISION)


@triton.jit(do_not_specialize=["n"])
def _moment_kernel(query, valid, out, n, strides, valid_row, G: tl.constexpr, SPAN: tl.constexpr):
    """Squared queries of one KV head summed over ``SPAN`` columns: out float32 [spans, B, H, D]."""
    span, row_head = tl.program_id(0), tl.program_id(1)
    b, h = (row_head // G.kv_heads).to(tl.int64), row_head % G.kv_heads
    DIM: tl.constexpr = G.DIM
    QUERY_HEADS: tl.constexpr = G.query_heads
    d = tl.arange(0, DIM)
    total = tl.zeros([DIM], tl.float32)
    for start in range(0, SPAN, _TOKENS):
        column = span * SPAN + start + tl.arange(0, _TOKENS)
        keep = column < n
        if valid is not None:
            keep = keep & (tl.load(valid + b * valid_row + column, mask=keep, other=0) != 0)
        for i in tl.static_range(QUERY_HEADS):
            at = b * strides.row + (h * G.query_heads + i) * strides.head + column[:, None] * strides.column + d[None, :]
            q = tl.load(query + at, mask=keep[:, None] & (d < G.dim)[None, :], other=0.0).to(tl.float32)
            total += tl.sum(q * q, 0)
    tl.store(out + (span * tl.num_programs(1) + row_head) * G.dim + d, total, mask=d < G.dim)


class ChunkWriter:
    """Writes a chunk to one layer's store."""

    def __init__(self, chunk: Chunk, ledger: torch.Tensor, buffers: Buffers, layout: Layout) -> None:
        self.ledger, self.buffers, self.layout = ledger, buffers, layout
        self.count, valid = chunk.columns, None if chunk.columns < 2 else chunk.valid  # of one column the ledger says enough
        self.valid = as_bytes(valid)
        self.chunk = ChunkArguments.of(chunk, None if valid is None else _columns(valid))
        self.geometry = Geometry.of(layout, chunk.query.shape[1])
        coded_slots, places = buffers.k_codes.shape[2], layout.first_exact + buffers.recent_slots(layout)
        self.entering = Entering(self.chunk, buffers, ledger, coded_slots, places)
        self.precision = "tf32x3" if chunk.key.dtype == torch.float32 else "tf32"

    def add_moment(self, first: bool) -> None:
        """Add the squared queries to ``moment``, which is nothing yet if ``first``, in an order that is always the same."""
        batch, _, count, dim = self.chunk.query.shape
        heads = self.layout.kv_heads
        spans = -(-count // _SPAN)
        out = torch.empty(spans, batch, heads, dim, dtype=torch.float32, device=self.chunk.query.device)
        _moment_kernel[(spans, batch * heads)](
            self.chunk.query, self.valid, out, count, self.chunk.query_strides,
            0 if self.valid is None else self.valid.stride(0), G=self.geometry, SPAN=_SPAN,
        )  # fmt: skip
        if first:
            torch.sum(out, 0, out=self.buffers.moment)
        else:
            self.buffers.moment.add_(out.sum(0))

    def write(self, code_tiles: int, keep: bool) -> None:
        """Code up to ``code_tiles`` tiles a row, and keep what stays exact; both in one launch only for one column."""
        one = self.count == 1
        tiles = code_tiles + keep * (1 if one else tiles_of(self.entering.places))
        if tiles == 0:
            return
        _append_kernel[(tiles, len(self.ledger) * self.layout.groups, 2)](
            self.entering, self.count, code_tiles, self.buffers.starts.shape[1], G=self.geometry, CODE=code_tiles > 0,
            KEEP=keep, ONE=one, PRECISION=self.precision, num_stages=2,
        )  # fmt: skip


def tiles_of(tokens: int) -> int:
    """Programs that code ``tokens`` tokens of a row."""
    return -(-tokens // _TOKENS.value)


def _columns(valid: torch.Tensor) -> torch.Tensor:
    """The column of each token: bool [B, n] -> int32 [B, n + 1], of which a row uses as many as it has tokens."""
    batch, count = valid.shape
    out = torch.zeros(batch, count + 1, dtype=torch.int32, device=valid.device)
    column = torch.arange(count, dtype=torch.int32, device=valid.device).expand(batch, count)
    return out.scatter_(1, torch.where(valid, valid.cumsum(1) - 1, count), column)
