"""Sums of products of the channels of tokens that a step codes: what bases are chosen by."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.basis import RANGE
from spectral_compile.kernels.append.kernel import ChunkWriter, column_of, ledger_row, norm_of, tokens_in
from spectral_compile.kernels.digits import INTERPRETED

_TILE: tl.constexpr = tl.constexpr(64)  # tokens at a time
_MEAN: tl.constexpr = tl.constexpr(1024)  # token weights at a time
_LEAST = 256  # tokens of a program, but for the last
_PROGRAMS = 512  # at most, however long a prompt is: each leaves a matrix
_LOWEST: tl.constexpr = tl.constexpr(RANGE[0])
_HIGHEST: tl.constexpr = tl.constexpr(RANGE[1])


class Parts(NamedTuple):
    """Tokens that a step codes, for which a basis each is chosen: ``count`` parts of ``length``, from number ``first`` on."""

    first: int
    count: int
    length: int


@triton.jit
def _mean_weight(weights, chunk, b, first, count, n):
    """The mean weight of ``count`` tokens of a chunk, from number ``first`` on."""
    total = tl.zeros([_MEAN], tl.float32)
    for start in range(0, count, _MEAN):
        i = start + tl.arange(0, _MEAN)
        column = column_of(chunk, b, first + i, i < count, n)
        total += tl.load(weights + column, mask=i < count, other=0.0)
    return tl.sum(total, 0) / tl.maximum(count, 1)


@triton.jit
def _scaled(
    entering, b, g, slots, live, before, n, c, scale, G: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Channels ``c`` of tokens as they are summed up: values over their norms, all times their scales."""
    x = tokens_in(entering, b, g, slots, live, before, n, c, G, KEYS).to(tl.float32)
    if G.normalised and not KEYS:
        if BLOCK == G.WIDTH:
            squares = tl.sum(x * x, 1)
        else:
            squares = scale * 0
            for start in range(0, G.WIDTH, BLOCK):
                other = tokens_in(entering, b, g, slots, live, before, n, start + tl.arange(0, BLOCK), G, KEYS).to(tl.float32)
                squares += tl.sum(other * other, 1)
        _, size = norm_of(squares, G)
        x = x / size[:, None]
    x = (x * scale[:, None]).to(entering.chunk.key.dtype.element_ty)
    return x.to(tl.float32) if INTERPRETED else x  # which has no products of bfloat16


@triton.jit
def _sums_of(
    entering, token_weight, out, b, g, first, last, coded, before, coded_after, n, row, column,
    G: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a matrix of sums, over the slots from ``first`` to ``last``."""
    r, c = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    weights, mean = out, 0.0
    if token_weight is not None:
        weights = token_weight + (b * G.groups + g) * n
        mean = _mean_weight(weights, entering.chunk, b, coded + G.first_exact - before, coded_after - coded, n)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(first, last, _TILE):
        slots = start + tl.arange(0, _TILE)
        live = slots < last
        scale = tl.full([_TILE], 1.0, tl.float32)
        if token_weight is not None:  # see ``codec.token_scale``
            at = column_of(entering.chunk, b, slots + G.first_exact - before, live, n)
            share = tl.load(weights + at, mask=live, other=0.0) / tl.maximum(mean, 1.1754943508222875e-38)
            scale = tl.sqrt(tl.sqrt(tl.minimum(tl.maximum(share, _LOWEST), _HIGHEST)))
        x = _scaled(entering, b, g, slots, live, before, n, r, scale, G, KEYS, BLOCK)
        y = x
        if BLOCK < G.WIDTH:
            y = _scaled(entering, b, g, slots, live, before, n, c, scale, G, KEYS, BLOCK)
        sums = tl.dot(tl.trans(x), y, sums, input_precision=PRECISION)
    tl.store(out + r[:, None] * G.width + c[None, :], sums, mask=(r < G.width)[:, None] & (c < G.width)[None, :])


@triton.jit(do_not_specialize=["n", "first", "length", "run"])
def _sums_kernel(
    entering, token_weight, out, n, first, length, run, parts, spans, rows,
    G: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the sums over ``run`` of the tokens of one part of one group, of one side."""
    BLOCKS: tl.constexpr = G.WIDTH // BLOCK
    part, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    row_group, side = tl.program_id(1) // (BLOCKS * BLOCKS), tl.program_id(2)
    block = tl.program_id(1) % (BLOCKS * BLOCKS)
    b, g = (row_group // G.groups).to(tl.int64), row_group % G.groups
    before, coded, _after, coded_after = ledger_row(entering.ledger, b)
    begin = coded + (first + part) * length
    last = tl.minimum(tl.minimum(begin + length, coded_after), begin + (span + 1) * run)
    begin += span * run
    matrix = (((side * rows + b) * G.groups + g) * parts + part) * spans + span
    out += matrix * (G.width * G.width)
    if side == 0:
        _sums_of(
            entering, token_weight, out, b, g, begin, last, coded, before, coded_after, n, block // BLOCKS, block % BLOCKS,
            G, True, BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _sums_of(
            entering, token_weight, out, b, g, begin, last, coded, before, coded_after, n, block // BLOCKS, block % BLOCKS,
            G, False, BLOCK, PRECISION,
        )  # fmt: skip


def sums(writer: ChunkWriter, parts: Parts, token_weight: torch.Tensor | None) -> torch.Tensor:
    """Sums of products of channels, each token times its ``codec.token_scale`` if there is float32 ``token_weight`` [B, G, n].

    Nothing is waited for, and what is summed in which order depends on shapes alone. float32 [2, B, G, parts, spans, W, W]: of
    keys, then of values over their norms, each span over some of the tokens of a part.
    """
    geometry, batch = writer.geometry, len(writer.ledger)
    matrices = 2 * batch * geometry.groups * parts.count
    spans = max(1, min(triton.cdiv(parts.length, _LEAST), _PROGRAMS // matrices))
    run = triton.cdiv(triton.cdiv(parts.length, spans), _TILE.value) * _TILE.value
    shape = (2, batch, geometry.groups, parts.count, spans, geometry.width, geometry.width)
    out = torch.empty(shape, dtype=torch.float32, device=writer.chunk.key.device)
    block = min(128, geometry.WIDTH)
    blocks = (geometry.WIDTH // block) ** 2
    if token_weight is not None:
        token_weight = token_weight.contiguous()
    _sums_kernel[(parts.count * spans, batch * geometry.groups * blocks, 2)](
        writer.entering, token_weight, out, writer.count, parts.first, parts.length, run, parts.count, spans, batch,
        G=geometry, BLOCK=block, PRECISION=writer.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out
