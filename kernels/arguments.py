"""What kernels take as one argument each: the tensors of a chunk, and what is fixed about a store.

Triton takes a NamedTuple apart into its members, so that a kernel compiles to what it would with each of them as an argument;
integers in it are always specialised for 1 and for multiples of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec import layout as layouts
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.digits import RowField, row_fields
from spectral_compile.kernels.ledger import COLUMNS
from spectral_compile.kernels.values import Chunk

LEAST = 16  # the smallest extent of a matrix product
LEDGER_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


class Strides(NamedTuple):
    """Of a tensor [B, H, n, D] whose channels lie beside each other."""

    row: int
    head: int
    column: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Strides:
        return cls(*x.stride()[:3])


class ChunkArguments(NamedTuple):
    """A ``Chunk`` whose channels lie beside each other.

    Where it has several columns, some of which may be padding, int32 ``index`` says which token a column is, or which column a
    token; a kernel says which way.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    index: torch.Tensor | None  # type: ignore[assignment]  # which may well hide the method of tuples
    query_strides: Strides
    key_strides: Strides
    value_strides: Strides

    @classmethod
    def of(cls, chunk: Chunk, index: torch.Tensor | None) -> ChunkArguments:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in chunk[:3])
        return cls(query, key, value, index, Strides.of(query), Strides.of(key), Strides.of(value))


class Side(NamedTuple):
    """How keys, or values, are coded. Names in capitals are padded to a power of two."""

    heads: int  # KV heads that are coded jointly
    groups: int  # of such
    share: int  # of the geometry's groups are in one of these
    width: int  # channels of such a group
    WIDTH: int
    tiers: tuple[int, int, int]  # channels at 8, 4 and 2 bits
    rank: int  # their sum
    halfwords: int  # of a token's codes
    fields: tuple[RowField, ...]

    @classmethod
    def of(cls, side: layouts.Side, heads: int) -> Side:
        """Where a program takes ``heads`` KV heads."""
        tiers = side.tiers
        return cls(
            heads=side.heads,
            groups=side.groups,
            share=side.heads // heads,
            width=side.width,
            WIDTH=max(LEAST, triton.next_power_of_2(side.width)),
            tiers=(tiers.bits8, tiers.bits4, tiers.bits2),
            rank=tiers.rank,
            halfwords=tiers.row_bytes // 2,
            fields=row_fields(tiers),
        )


class Geometry(NamedTuple):
    """What is fixed about a store, as kernels are compiled for it. Names in capitals are padded to a power of two.

    Programs take groups of ``heads`` KV heads, those of the side that has fewer heads in a group; of a group of the other side
    one has but a share, and where what it does is for all of the group, the first of those that have one does it.
    """

    kv_heads: int
    groups: int
    heads: int  # KV heads of a group
    query_heads: int  # of a KV head
    dim: int  # channels of a head
    DIM: int
    k: Side  # not ``key``, and not ``value``: Triton's own tuples have members of such names
    v: Side
    lossless: bool
    normalised: bool
    first_exact: int
    recent_in_bytes: bool

    @classmethod
    def of(cls, layout: Layout, query_heads: int) -> Geometry:
        """For a model with ``query_heads`` query heads in all."""
        return cls(
            kv_heads=layout.kv_heads,
            groups=layout.groups,
            heads=layout.heads,
            query_heads=query_heads // layout.kv_heads,
            dim=layout.head_dim,
            DIM=triton.next_power_of_2(layout.head_dim),
            k=Side.of(layout.k, layout.heads),
            v=Side.of(layout.v, layout.heads),
            lossless=layout.lossless,
            normalised=layout.normalised,
            first_exact=layout.first_exact,
            recent_in_bytes=layout.recent_bits == 8,
        )


def as_bytes(valid: torch.Tensor | None) -> torch.Tensor | None:
    """Which columns are tokens as kernels read it: bool [B, n] -> uint8 [B, n], one row after another."""
    return None if valid is None else valid.contiguous().view(torch.uint8)
