"""Steps of quantisers: tokens at even distances are taken apart by a basis, and of each channel six steps are tried on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.basis import SAMPLE
from spectral_compile.codec.quantise import FACTORS, LEAST_RMS
from spectral_compile.kernels.append.basis import Fitted
from spectral_compile.kernels.append.gram import Parts
from spectral_compile.kernels.append.kernel import ChunkWriter, ledger_row, norm_of, tokens_in
from spectral_compile.kernels.arguments import Geometry

_TOKENS, _CHANNELS = 64, 16  # that a program takes at a time
_TILE: tl.constexpr = tl.constexpr(32)  # tokens that a program takes apart
_COLUMNS: tl.constexpr = tl.constexpr(32)  # coefficients at a time
_SAMPLE: tl.constexpr = tl.constexpr(SAMPLE)
_TRIALS = len(FACTORS[0])


class Sampled(NamedTuple):
    """Coefficients of some tokens of each of ``parts``, float32 [2, rows x groups x parts, n, most], and which tokens are no
    zeros, uint8 [2, rows x groups x parts, n]."""

    coefficients: torch.Tensor
    live: torch.Tensor
    parts: int


@triton.jit
def _analysed(x, basis, affine, rank, out, i, count, most, S: tl.constexpr, PRECISION: tl.constexpr):
    """Coefficients of tokens [N, WIDTH] to rows ``i`` of ``out``: see ``codec.basis`` for the second analysis."""
    WIDTH: tl.constexpr = S.WIDTH
    c = tl.arange(0, WIDTH)
    y = x * tl.load(affine + 2 * rank + c, mask=c < S.width, other=0.0)[None, :]
    again = tl.zeros([_TILE, WIDTH], tl.float32)
    for start in range(0, rank, _COLUMNS):
        r = start + tl.arange(0, _COLUMNS)
        part = tl.load(basis + r[None, :] * S.width + c[:, None], mask=(c < S.width)[:, None] & (r < rank)[None, :], other=0)
        part = part.to(tl.float32)
        scale = tl.load(affine + rank + r, mask=r < rank, other=0.0)
        first = tl.dot(y, part, input_precision=PRECISION) * (scale * scale)[None, :]
        again = tl.dot(first, tl.trans(part), again, input_precision=PRECISION)
    z = 2 * y - again
    for start in range(0, rank, _COLUMNS):
        r = start + tl.arange(0, _COLUMNS)
        part = tl.load(basis + r[None, :] * S.width + c[:, None], mask=(c < S.width)[:, None] & (r < rank)[None, :], other=0)
        scale = tl.load(affine + rank + r, mask=r < rank, other=0.0)
        found = tl.dot(z, part.to(tl.float32), input_precision=PRECISION) * scale[None, :]
        tl.store(out + i[:, None] * most + r[None, :], found, mask=(i < count)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["n", "first", "length", "every", "count"])
def _analyse_kernel(
    entering, fitted, out, live_rows, n, first, length, every, count, most, parts, rows,
    G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coefficients of some of the sampled tokens of one part of one group, of one side; every token ``every`` is sampled.

    Where ``every`` is 0 a row's own tokens say how many: about ``SAMPLE`` of them are taken.
    """
    tiles = tl.cdiv(count, _TILE)
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row_group, side = tl.program_id(1), tl.program_id(2)
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    b, group = (row_group // G.groups).to(tl.int64), row_group % G.groups
    before, coded, _after, coded_after = ledger_row(entering.ledger, b)
    if every == 0:
        every = tl.maximum((coded_after - coded) // _SAMPLE, 1)
    i = tile * _TILE + tl.arange(0, _TILE)
    begin = coded + (first + part) * length
    slots = begin + i * every
    live = (i < count) & (slots < tl.minimum(begin + length, coded_after))
    matrix = ((side * rows + b) * G.groups + group) * parts + part
    out, live_rows = out + matrix * count * most, live_rows + matrix * count
    if side == 0:
        if group % K.share == 0:
            g = group // K.share
            at = (b * K.groups + g) * fitted.segments + part
            x = tokens_in(entering, b, g, slots, live, before, n, tl.arange(0, K.WIDTH), G, True).to(tl.float32)
            basis, affine = fitted.k_basis + at * (K.rank * K.width), fitted.k_affine + at * (2 * K.rank + K.width)
            _analysed(x, basis, affine, K.rank, out, i, count, most, K, PRECISION)
            tl.store(live_rows + i, (tl.max(tl.abs(x), 1) > 0).to(tl.uint8), mask=i < count)
    else:
        if group % V.share == 0:
            g = group // V.share
            at = (b * V.groups + g) * fitted.segments + part
            y = tokens_in(entering, b, g, slots, live, before, n, tl.arange(0, V.WIDTH), G, False).to(tl.float32)
            if G.normalised:
                _, size = norm_of(tl.sum(y * y, 1), V)
                y = y / size[:, None]
            basis, affine = fitted.v_basis + at * (V.rank * V.width), fitted.v_affine + at * (2 * V.rank + V.width)
            _analysed(y, basis, affine, V.rank, out, i, count, most, V, PRECISION)
            tl.store(live_rows + i, (tl.max(tl.abs(y), 1) > 0).to(tl.uint8), mask=i < count)


@triton.jit
def _searched(
    rows, counts, n, most, rank, bits8, bits4, c,
    FACTORS: tl.constexpr, LEAST: tl.constexpr, TRIALS: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The steps of channels ``c`` of one matrix."""
    j = tl.arange(0, TRIALS)
    half = tl.where(c < bits8, 128.0, tl.where(c < bits8 + bits4, 8.0, 2.0))
    squares, tokens = tl.zeros([C], tl.float32), 0.0
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        live = tl.load(counts + i, mask=i < n, other=0)
        x = tl.load(rows + i[:, None] * most + c[None, :], mask=(live != 0)[:, None] & (c < rank)[None, :], other=0.0)
        squares += tl.sum(x * x, 0)
        tokens += tl.sum(live.to(tl.float32), 0)
    factor = tl.zeros([TRIALS, C], tl.float32)
    for trial in tl.static_range(len(FACTORS[0])):
        tier = tl.where(c < bits8, FACTORS[0][trial], tl.where(c < bits8 + bits4, FACTORS[1][trial], FACTORS[2][trial]))
        factor = tl.where((j == trial)[:, None], tier[None, :], factor)
    step = tl.maximum(tl.sqrt(squares / tl.maximum(tokens, 1.0)), LEAST)[None, :] * tl.maximum(factor, FACTORS[0][0])
    error = tl.zeros([TRIALS, C], tl.float32)
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        counted = tl.load(counts + i, mask=i < n, other=0).to(tl.float32)
        x = tl.load(rows + i[:, None] * most + c[None, :], mask=(counted != 0)[:, None] & (c < rank)[None, :], other=0.0)
        x = x[:, None, :]
        code = tl.minimum(tl.maximum(tl.floor(x / step[None]), -half[None, None]), half[None, None] - 1)
        off = (code + 0.5) * step[None] - x
        error += tl.sum(off * off * counted[:, None, None], 0)
    best = tl.argmin(tl.where((factor > 0) & (c < rank)[None, :], error, float("inf")), 0)
    return tl.sum(tl.where(j[:, None] == best[None, :], step, 0.0), 0)


@triton.jit(do_not_specialize=["n"])
def _search_kernel(
    sampled, fitted, n, margin, most,
    G: tl.constexpr, FACTORS: tl.constexpr, LEAST: tl.constexpr, TRIALS: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``margin`` times the steps of some channels of one part of one group, of one side."""
    K: tl.constexpr = G.k
    V: tl.constexpr = G.v
    matrix, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row_group, part = matrix // sampled.parts, matrix % sampled.parts
    b, group = row_group // G.groups, row_group % G.groups
    matrix += side * tl.num_programs(1)
    c = tl.program_id(0) * C + tl.arange(0, C)
    coefficients, live = sampled.coefficients + matrix * n * most, sampled.live + matrix * n
    if side == 0:
        if group % K.share == 0:
            steps = _searched(
                coefficients, live, n, most, K.rank, K.tiers[0], K.tiers[1], c, FACTORS, LEAST, TRIALS, N, C
            )  # fmt: skip
            at = (b * K.groups + group // K.share) * fitted.segments + part
            tl.store(fitted.k_affine + at * (2 * K.rank + K.width) + c, steps * margin, mask=c < K.rank)
    else:
        if group % V.share == 0:
            steps = _searched(
                coefficients, live, n, most, V.rank, V.tiers[0], V.tiers[1], c, FACTORS, LEAST, TRIALS, N, C
            )  # fmt: skip
            at = (b * V.groups + group // V.share) * fitted.segments + part
            tl.store(fitted.v_affine + at * (2 * V.rank + V.width) + c, steps * margin, mask=c < V.rank)


def analyse(writer: ChunkWriter, parts: Parts, counts: list[int], fitted: Fitted) -> Sampled:
    """Coefficients of a sample of each part; rows code ``counts`` tokens in this step."""
    layout, geometry, batch = writer.layout, writer.geometry, len(writer.ledger)
    if layout.segment:
        every = max(1, parts.length // SAMPLE)
        count = triton.cdiv(parts.length, every)
    else:
        every, count = 0, max(triton.cdiv(count, max(1, count // SAMPLE)) for count in counts)
    matrices, most = batch * geometry.groups * parts.count, max(layout.key.rank, layout.value.rank)
    device = writer.chunk.key.device
    out = torch.empty(2, matrices, count, most, dtype=torch.float32, device=device)
    live = torch.empty(2, matrices, count, dtype=torch.uint8, device=device)
    _analyse_kernel[(parts.count * triton.cdiv(count, _TILE.value), batch * geometry.groups, 2)](
        writer.entering, fitted, out, live, writer.count, parts.first, parts.length, every, count, most, parts.count, batch,
        G=geometry, PRECISION=writer.precision,
    )  # fmt: skip
    return Sampled(out, live, parts.count)


def search(sampled: Sampled, fitted: Fitted, geometry: Geometry, margin: float) -> None:
    """Write ``margin`` times ``codec.search_step`` to ``fitted``."""
    _, matrices, count, most = sampled.coefficients.shape
    _search_kernel[(triton.cdiv(most, _CHANNELS), matrices, 2)](
        sampled, fitted, count, margin, most,
        G=geometry, FACTORS=FACTORS, LEAST=LEAST_RMS, TRIALS=triton.next_power_of_2(_TRIALS), N=_TOKENS, C=_CHANNELS,
    )  # fmt: skip
