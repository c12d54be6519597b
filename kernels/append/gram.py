"""Sums of products of the channels of tokens that a step codes: what bases are chosen by."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.basis import RANGE
from spectral_compile.codec.layout import Side
from spectral_compile.kernels.append.kernel import ChunkWriter, column_of, ledger_row, norm_of, tokens_in
from spectral_compile.kernels.append.reference import over_side
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
    S: tl.constexpr = G.k if KEYS else G.v
    x = tokens_in(entering, b, g, slots, live, before, n, c, G, KEYS).to(tl.float32)
    if G.normalised and not KEYS:
        if BLOCK == S.WIDTH:
            squares = tl.sum(x * x, 1)
        else:
            squares = scale * 0
            for start in range(0, S.WIDTH, BLOCK):
                other = tokens_in(entering, b, g, slots, live, before, n, start + tl.arange(0, BLOCK), G, KEYS).to(tl.float32)
                squares += tl.sum(other * other, 1)
        _, size = norm_of(squares, S)
        x = x / size[:, None]
    x = (x * scale[:, None]).to(entering.chunk.key.dtype.element_ty)
    return x.to(tl.float32) if INTERPRETED else x  # which has no products of bfloat16


@triton.jit
def _sums_of(
    entering, token_weight, out, b, g, first, last, coded, before, coded_after, n, block,
    G: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a matrix of sums of a side's group, over the slots from ``first`` to ``last``."""
    S: tl.constexpr = G.k if KEYS else G.v
    BLOCKS: tl.constexpr = S.WIDTH // BLOCK
    r, c = block // BLOCKS * BLOCK + tl.arange(0, BLOCK), block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    weights, mean = out, 0.0
    if token_weight is not None:
        weights = token_weight + (b * S.groups + g) * n
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
        if BLOCK < S.WIDTH:
            y = _scaled(entering, b, g, slots, live, before, n, c, scale, G, KEYS, BLOCK)
        sums = tl.dot(tl.trans(x), y, sums, input_precision=PRECISION)
    tl.store(out + r[:, None] * S.width + c[None, :], sums, mask=(r < S.width)[:, None] & (c < S.width)[None, :])


@triton.jit(do_not_specialize=["n", "first", "length", "run"])
def _sums_kernel(
    entering, k_weight, v_weight, out, n, first, length, run, parts, spans, rows, blocks, room,
    G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of ``blocks`` of the sums over ``run`` of the tokens of one part of one group, of one side.

    A matrix has ``room`` numbers, of which that of a narrower side fills the first.
    """
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    OF_K: tl.constexpr = (G.k.WIDTH // BLOCK_K) * (G.k.WIDTH // BLOCK_K)
    OF_V: tl.constexpr = (G.v.WIDTH // BLOCK_V) * (G.v.WIDTH // BLOCK_V)
    part, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    row_group, side = tl.program_id(1) // blocks, tl.program_id(2)
    block = tl.program_id(1) % blocks
    b, group = (row_group // G.groups).to(tl.int64), row_group % G.groups
    before, coded, _after, coded_after = ledger_row(entering.ledger, b)
    begin = coded + (first + part) * length
    last = tl.minimum(tl.minimum(begin + length, coded_after), begin + (span + 1) * run)
    begin += span * run
    matrix = (((side * rows + b) * G.groups + group) * parts + part) * spans + span
    out += matrix * room
    if side == 0:
        if (group % K.share == 0) & (block < OF_K):
            _sums_of(
                entering, k_weight, out, b, group // K.share, begin, last, coded, before, coded_after, n, block,
                G, True, BLOCK_K, PRECISION,
            )  # fmt: skip
    else:
        if (group % V.share == 0) & (block < OF_V):
            _sums_of(
                entering, v_weight, out, b, group // V.share, begin, last, coded, before, coded_after, n, block,
                G, False, BLOCK_V, PRECISION,
            )  # fmt: skip


def sums(writer: ChunkWriter, parts: Parts, token_weight: torch.Tensor | None) -> torch.Tensor:
    """Sums of products of channels, each token times its ``codec.token_scale`` if there is float32 ``token_weight`` [B, G, n].

    Nothing is waited for, and what is summed in which order depends on shapes alone. float32 [2, B, G, parts, spans, numbers]:
    of keys, then of values over their norms, each span over some of the tokens of a part; see ``matrices_of``.
    """
    layout, geometry, batch = writer.layout, writer.geometry, len(writer.ledger)
    matrices = 2 * batch * geometry.groups * parts.count
    spans = max(1, min(triton.cdiv(parts.length, _LEAST), _PROGRAMS // matrices))
    run = triton.cdiv(triton.cdiv(parts.length, spans), _TILE.value) * _TILE.value
    shape = (2, batch, geometry.groups, parts.count, spans, max(layout.k.width, layout.v.width) ** 2)
    out = torch.empty(shape, dtype=torch.float32, device=writer.chunk.key.device)
    block_k, block_v = min(128, geometry.k.WIDTH), min(128, geometry.v.WIDTH)
    blocks = max(geometry.k.WIDTH // block_k, geometry.v.WIDTH // block_v) ** 2
    weights = (None, None)
    if token_weight is not None:
        weights = tuple(over_side(token_weight, side).contiguous() for side in (layout.k, layout.v))
    _sums_kernel[(parts.count * spans, batch * geometry.groups * blocks, 2)](
        writer.entering, *weights, out, writer.count, parts.first, parts.length, run, parts.count, spans, batch, blocks,
        shape[-1], G=geometry, BLOCK_K=block_k, BLOCK_V=block_v, PRECISION=writer.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def matrices_of(numbers: torch.Tensor, side: Side) -> torch.Tensor:
    """The matrices [B, G, parts, W, W] of one side's groups, out of [B, groups, parts, numbers] as ``sums`` has them."""
    held = numbers[:, :: numbers.shape[1] // side.groups, :, : side.width**2]
    return held.unflatten(-1, (side.width, side.width))
