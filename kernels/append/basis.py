"""Bases out of sums of products: channels are weighted, eigenvectors found and rounded, all of a matrix in one program."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.basis import LEAST_WEIGHT
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append import eigen
from spectral_compile.kernels.append.eigen import PANEL, balance, eigenvectors, vectors_by_energy
from spectral_compile.kernels.append.kernel import ChunkWriter
from spectral_compile.kernels.buffers import Buffers

_LEAST_WEIGHT: tl.constexpr = tl.constexpr(LEAST_WEIGHT)


class Fitted(NamedTuple):
    """Bases and affine numbers of both sides, contiguous, as ``Buffers`` has them: [B, G, ``segments``, ...].

    Those of part i of a row and group are number i of its segments.
    """

    k_basis: torch.Tensor
    v_basis: torch.Tensor
    k_affine: torch.Tensor
    v_affine: torch.Tensor
    segments: int

    @classmethod
    def of(cls, buffers: Buffers) -> Fitted:
        """The first segments of a store."""
        return cls(buffers.k_basis, buffers.v_basis, buffers.k_affine, buffers.v_affine, buffers.starts.shape[1])

    @classmethod
    def blank(cls, buffers: Buffers, batch: int, parts: int) -> Fitted:
        """Room for bases of ``batch`` rows that stores like this may take."""
        kept = (buffers.k_basis, buffers.v_basis, buffers.k_affine, buffers.v_affine)
        return cls(*(x.new_empty(batch, x.shape[1], parts, *x.shape[3:]) for x in kept), parts)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Both bases, and both sides' affine numbers."""
        return self.k_basis, self.v_basis, self.k_affine, self.v_affine


class Pairs(NamedTuple):
    """RoPE as weights of key channels ask about it, and whether queries weigh them at all."""

    channels: int  # that are rotated, of a head
    interleaved: bool
    weighted: bool

    @classmethod
    def of(cls, layout: Layout) -> Pairs:
        rotary = layout.rotary
        return cls(0 if rotary is None else rotary.dim, rotary is not None and rotary.interleaved, layout.query_weighted)


@triton.jit
def _weights(moment, b, g, c, G: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """``codec.even`` of ``codec.key_weight`` of a group's channels ``c``."""
    HEADS: tl.constexpr = G.kv_heads
    DIM: tl.constexpr = G.DIM
    total, d = 0.0, tl.arange(0, DIM)
    for h in range(HEADS):
        total += tl.sum(tl.load(moment + (b * G.kv_heads + h) * G.dim + d, mask=d < G.dim, other=0.0), 0)
    of_head = c % G.dim
    other = of_head
    if P.channels > 0:
        HALF: tl.constexpr = P.channels // 2
        if P.interleaved:
            partner = of_head + 1 - 2 * (of_head % 2)
        else:
            partner = tl.where(of_head < HALF, of_head + HALF, of_head - HALF)
        other = tl.where(of_head < P.channels, partner, of_head)
    at = moment + (b * G.kv_heads + g * S.heads + c // G.dim) * G.dim
    own = tl.load(at + of_head, mask=c < S.width, other=0.0) + tl.load(at + other, mask=c < S.width, other=0.0)
    weight = tl.where(c < S.width, tl.where(total > 0, tl.sqrt(own * 0.5), 1.0), 0.0)
    mean = tl.sum(weight, 0) / S.width
    return tl.maximum(weight / tl.maximum(mean, 1.1754943508222875e-38), _LEAST_WEIGHT)


@triton.jit
def _weighted_sums(products, gram, a, weight, affine, spans, room, S: tl.constexpr):
    """What the spans of a part come to, to ``gram``, and times the weights of its channels to ``a``."""
    j, c = tl.arange(0, PANEL), tl.arange(0, S.WIDTH)
    tl.store(affine + c, weight, mask=c < S.width)
    tl.debug_barrier()
    for first in range(0, S.width, PANEL):
        r = first + j
        at, own = r[:, None] * S.width + c[None, :], (r < S.width)[:, None] & (c < S.width)[None, :]
        row = tl.load(products + at, mask=own, other=0.0)
        for span in range(1, spans):
            row += tl.load(products + span * room + at, mask=own, other=0.0)
        tl.store(gram + at, row, mask=own)
        across = tl.load(affine + r, mask=r < S.width, other=0.0)
        tl.store(a + at, row * across[:, None] * weight[None, :], mask=own)
    tl.debug_barrier()


@triton.jit
def _round(x, numbers, basis, affine, rows, rank, S: tl.constexpr):
    """Write the eigenvectors in int8 with a scale each; see ``codec.fit``."""
    c = tl.arange(0, S.WIDTH)
    for first in range(0, rows, PANEL):
        vectors, place = vectors_by_energy(x, numbers, first, rows, S.width, S.WIDTH)
        scale = tl.max(tl.abs(vectors), 1) / 127
        code = tl.floor(vectors / tl.maximum(scale, 1e-30)[:, None] + 0.5)
        kept = place < rank
        tl.store(basis + place[:, None] * S.width + c[None, :], code.to(tl.int8), mask=kept[:, None] & (c < S.width)[None, :])
        tl.store(affine + rank + place, scale, mask=kept)


@triton.jit
def _basis_kernel(
    products, gram, room, moment, fitted, further, rows_k, rows_v, parts, spans, rows, first_side, numbers_each, width,
    G: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The basis of one part of one group of ``S``, of one side from ``first_side`` on: both sides are grouped alike, or one.

    Matrices have room for ``numbers_each``, and vectors for ``width``.
    """
    WIDTH: tl.constexpr = S.WIDTH
    RANK_K: tl.constexpr = G.k.rank
    RANK_V: tl.constexpr = G.v.rank
    part, row_group, side = tl.program_id(0), tl.program_id(1), first_side + tl.program_id(2)
    b, g = (row_group // S.groups).to(tl.int64), row_group % S.groups
    matrix = ((side * rows + b) * G.groups + g * S.share) * parts + part
    at = (b * S.groups + g) * fitted.segments + part
    c = tl.arange(0, WIDTH)
    weight = tl.full([WIDTH], 1.0, tl.float32)
    basis, affine = fitted.v_basis, fitted.v_affine
    if side == 0:
        basis, affine = fitted.k_basis, fitted.k_affine
        if P.weighted:
            weight = _weights(moment, b, g, c, G, S, P)
    rank, vectors = tl.where(side == 0, RANK_K, RANK_V), tl.where(side == 0, rows_k, rows_v)
    basis += at * rank * S.width
    affine += at * (2 * rank + S.width)
    square = matrix * numbers_each
    a, numbers = room.a + square, room.numbers + matrix * width
    most = tl.maximum(rows_k, rows_v)
    x, y = room.x + matrix * most * width, room.y + matrix * most * width
    _weighted_sums(products + square * spans, gram + square, a, weight, affine + 2 * rank, spans, numbers_each, S)
    balance(a, S.width, WIDTH)
    eigenvectors(a, x, y, numbers, vectors, S.width, further, WIDTH)
    _round(x, numbers, basis, affine, vectors, rank, S)


def bases(writer: ChunkWriter, products: torch.Tensor, fitted: Fitted) -> torch.Tensor:
    """Write to ``fitted`` all but the steps, of what ``gram.sums`` has left.

    Returns the sums of each part as a whole, unweighted: float32 [2, B, G, parts, numbers], see ``gram.matrices_of``.
    """
    layout, geometry = writer.layout, writer.geometry
    *shape, spans, numbers = products.shape
    gram = torch.empty(*shape, numbers, dtype=torch.float32, device=products.device)
    width = max(layout.k.width, layout.v.width)
    room = eigen.Room.of(gram.numel() // numbers, width, max(layout.key.rank, layout.value.rank), gram.device)
    _, batch, _, parts = shape
    alike = geometry.k.heads == geometry.v.heads
    for first, side in ((0, geometry.k),) if alike else ((0, geometry.k), (1, geometry.v)):
        _basis_kernel[(parts, batch * side.groups, 1 + alike)](
            products, gram, room, writer.buffers.moment, fitted, eigen.FURTHER,
            eigen.padded(layout.key.rank), eigen.padded(layout.value.rank), parts, spans, batch, first, numbers, width,
            G=geometry, S=side, P=Pairs.of(layout), num_warps=eigen.WARPS,
        )  # fmt: skip
    return gram
