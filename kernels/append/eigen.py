"""Leading eigenvectors of symmetric matrices, a program each: products and Gram-Schmidt, so that nothing is waited for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

PANEL: tl.constexpr = tl.constexpr(16)  # vectors that are made orthonormal together
_SHIFT: tl.constexpr = tl.constexpr(1e-6)  # of the trace: below it sums of products hold little but noise
_ROWS: tl.constexpr = tl.constexpr(32)  # of a product at a time
_SUMMED: tl.constexpr = tl.constexpr(64)  # terms of its sums at a time
_HELD: tl.constexpr = tl.constexpr(8192)  # numbers of earlier vectors that a panel is made orthogonal to at a time
_LEAST: tl.constexpr = tl.constexpr(1e-30)  # a squared length to divide by
FURTHER = 4  # orthogonalisations after the first
WARPS = 8  # of a program


@triton.jit
def _order(numbers, count, at, of, padded: tl.constexpr):
    """Which place each of the numbers ``of`` at ``at`` has by falling size among ``count`` of them in memory."""
    place = at * 0
    for start in range(0, padded, 32):
        other = start + tl.arange(0, 32)
        x = tl.load(numbers + other, mask=other < count, other=float("-inf"))
        before = (x[None, :] > of[:, None]) | ((x[None, :] == of[:, None]) & (other[None, :] < at[:, None]))
        place += tl.sum((before & (other < count)[None, :]).to(tl.int32), 1)
    return place


@triton.jit
def _times(x, a, out, rows, width, COLUMNS: tl.constexpr):
    """``out`` = ``x`` @ ``a``: of vectors [rows, width] and a symmetric matrix."""
    for first in range(0, rows, _ROWS):
        r = first + tl.arange(0, _ROWS)
        for left in range(0, width, COLUMNS):
            c = left + tl.arange(0, COLUMNS)
            sums = tl.zeros([_ROWS, COLUMNS], tl.float32)
            for start in range(0, width, _SUMMED):
                k = start + tl.arange(0, _SUMMED)
                of_x = tl.load(x + r[:, None] * width + k[None, :], mask=(r < rows)[:, None] & (k < width)[None, :], other=0.0)
                of_a = tl.load(a + k[:, None] * width + c[None, :], mask=(k < width)[:, None] & (c < width)[None, :], other=0.0)
                sums = tl.dot(of_x, of_a, sums, input_precision="tf32x3")
            tl.store(out + r[:, None] * width + c[None, :], sums, mask=(r < rows)[:, None] & (c < width)[None, :])
    tl.debug_barrier()


@triton.jit
def _orthonormalise(x, rows, width, WIDTH: tl.constexpr):
    """Make vectors [rows, width] orthonormal, each against those before it, to the rounding of float32.

    Block Gram-Schmidt, each block twice (Barlow and Smoktunowicz 2013, doi:10.1007/s00211-012-0496-2). Zeros stay zeros.
    """
    BEFORE: tl.constexpr = max(PANEL, min(64, _HELD // WIDTH))
    j, c, i = tl.arange(0, PANEL), tl.arange(0, WIDTH), tl.arange(0, BEFORE)
    for first in range(0, rows, PANEL):
        at = x + (first + j)[:, None] * width + c[None, :]
        own = (first + j < rows)[:, None] & (c < width)[None, :]
        y = tl.load(at, mask=own, other=0.0)
        for _ in range(2):
            for start in range(0, first, BEFORE):
                earlier = (start + i < first)[:, None] & (c < width)[None, :]
                before = tl.load(x + (start + i)[:, None] * width + c[None, :], mask=earlier, other=0.0)
                shares = tl.dot(y, tl.trans(before), input_precision="tf32x3")
                y -= tl.dot(shares, before, input_precision="tf32x3")
            for k in range(PANEL):
                vector = tl.sum(tl.where(j[:, None] == k, y, 0.0), 0)
                vector = vector * (1.0 / tl.sqrt(tl.maximum(tl.sum(vector * vector, 0), _LEAST)))
                share = tl.sum(y * vector[None, :], 1)
                y = tl.where(j[:, None] > k, y - share[:, None] * vector[None, :], y)
                y = tl.where(j[:, None] == k, vector[None, :], y)
        tl.store(at, y, mask=own)
        tl.debug_barrier()


@triton.jit
def eigenvectors(a, x, y, numbers, rows, width, further, WIDTH: tl.constexpr):
    """Leave orthonormal vectors [rows, width] near leading eigenvectors of ``a`` in ``x``, and their energies in ``numbers``.

    Subspace iteration (Golub and Van Loan, Matrix Computations, 8.2.4) from the rows of the matrix, those of the largest
    channels first, ``further`` more times by two products. Eigenvectors with eigenvalues that differ by some per cent stay
    mixed, which hardly costs transform coding anything; so do those with eigenvalues below ``_SHIFT``.

    ``a``: float32 [width, width] with a trace of about one; ``y``: room as of ``x``; ``numbers``: room for ``width``.
    ``rows`` is a multiple of ``PANEL``; those past ``width`` are zeros.
    """
    COLUMNS: tl.constexpr = min(128, WIDTH)
    j, c = tl.arange(0, PANEL), tl.arange(0, WIDTH)
    tl.store(numbers + c, tl.load(a + c * (width + 1), mask=c < width, other=0.0), mask=c < width)
    tl.debug_barrier()
    for first in range(0, rows, PANEL):
        tl.store(x + (first + j)[:, None] * width + c[None, :], 0.0, mask=(first + j >= width)[:, None] & (c < width)[None, :])
    for first in range(0, width, PANEL):
        r = first + j
        place = _order(numbers, width, r, tl.load(numbers + r, mask=r < width, other=0.0), WIDTH)
        row = tl.load(a + r[:, None] * width + c[None, :], mask=(r < width)[:, None] & (c < width)[None, :], other=0.0)
        tl.store(
            x + place[:, None] * width + c[None, :], row, mask=((r < width) & (place < rows))[:, None] & (c < width)[None, :]
        )
    tl.debug_barrier()
    _orthonormalise(x, rows, width, WIDTH)
    for _ in range(further):
        _times(x, a, y, rows, width, COLUMNS)
        _times(y, a, x, rows, width, COLUMNS)
        _orthonormalise(x, rows, width, WIDTH)
    _times(x, a, y, rows, width, COLUMNS)
    for first in range(0, rows, PANEL):
        at = (first + j)[:, None] * width + c[None, :]
        vector = tl.load(x + at, mask=(c < width)[None, :], other=0.0)
        energy = tl.sum(vector * tl.load(y + at, mask=(c < width)[None, :], other=0.0), 1)
        tl.store(numbers + first + j, energy, mask=first + j < width)
    tl.debug_barrier()


@triton.jit
def vectors_by_energy(x, numbers, first, rows, width, WIDTH: tl.constexpr):
    """``PANEL`` of the vectors that ``eigenvectors`` has left, and the place of each by falling energy."""
    r, c = first + tl.arange(0, PANEL), tl.arange(0, WIDTH)
    held = (r < rows) & (r < width)
    place = _order(numbers, tl.minimum(rows, width), r, tl.load(numbers + r, mask=held, other=0.0), WIDTH)
    vectors = tl.load(x + r[:, None] * width + c[None, :], mask=held[:, None] & (c < width)[None, :], other=0.0)
    return vectors, tl.where(held, place, width)


@triton.jit
def balance(a, width, WIDTH: tl.constexpr):
    """Divide a matrix by its trace, and add ``_SHIFT`` to its diagonal."""
    j, c = tl.arange(0, PANEL), tl.arange(0, WIDTH)
    trace = tl.sum(tl.load(a + c * (width + 1), mask=c < width, other=0.0), 0)
    tl.debug_barrier()
    for first in range(0, width, PANEL):
        r = first + j
        at, own = a + r[:, None] * width + c[None, :], (r < width)[:, None] & (c < width)[None, :]
        row = tl.load(at, mask=own, other=0.0) / tl.maximum(trace, 1.1754943508222875e-38)
        tl.store(at, row + tl.where(r[:, None] == c[None, :], _SHIFT, 0.0), mask=own)
    tl.debug_barrier()


class Room(NamedTuple):
    """What programs work in, of some matrices [W, W] and up to so many eigenvectors each, a multiple of ``PANEL``."""

    a: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, count: int, width: int, rank: int, device: torch.device) -> Room:
        x, y = torch.empty(2, count, padded(rank), width, dtype=torch.float32, device=device)
        a, numbers = (torch.empty(count, *shape, dtype=torch.float32, device=device) for shape in ((width, width), (width,)))
        return cls(a, x, y, numbers)


def padded(rank: int) -> int:
    """How many vectors are looked for where ``rank`` are wanted."""
    return triton.cdiv(rank, PANEL.value) * PANEL.value
