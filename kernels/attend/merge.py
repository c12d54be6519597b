"""Merges what splits have left, by log-sum-exp, and writes what enters the store to its place among the recent tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_compile.kernels.append.kernel import enter
from spectral_compile.kernels.attend.coded import inverse
from spectral_compile.kernels.attend.parts import LOG2E
from spectral_compile.kernels.digits import digit_rows


@triton.jit
def _some_splits(left, at, start, splits, d, G: tl.constexpr, F: tl.constexpr, P: tl.constexpr):
    """Of splits from ``start`` on references [AT_ONCE] and sums: values [AT_ONCE, channels], or digits of each row field."""
    some = start + tl.arange(0, P.AT_ONCE)
    there = (some < splits)[:, None]
    sums = ()
    for i in tl.static_range(len(G.v.fields) if F.latent_out else 1):
        c = F.places[i] + tl.arange(0, G.v.fields[i].padded * (16 // G.v.fields[i].bits)) if F.latent_out else d
        sums = sums + (tl.load(left.sums + (at + some)[:, None] * F.left + c[None, :], mask=there, other=0.0),)
    return tl.load(left.maxima + at + some, mask=some < splits, other=float("-inf")), sums


@triton.jit(do_not_specialize=["splits", "exact_splits", "first", "stride", "merged"])
def merge_kernel(
    left, result, splits, exact_splits, count, first, stride, merged, entering, code_tiles, v_basis, v_affine, sink_score,
    G: tl.constexpr, A: tl.constexpr, F: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one (query, head) pair, counted from ``first``, and the sink score into ``result`` [B, n, Hq, D].

    Where one column enters the store, two programs after the ``merged`` ones of a group write it to the recent tokens, which
    have been read by then; what leaves these has been coded beside the attention.
    """
    m, row_group = tl.program_id(0), tl.program_id(1)
    ROWS: tl.constexpr = G.heads * G.query_heads
    V: tl.constexpr = G.v
    PRECISION: tl.constexpr = A.precision
    if m < merged:
        g = row_group % G.groups
        at = (row_group.to(tl.int64) * stride + m) * (splits + exact_splits)
        m += first
        s, e = tl.arange(0, P.ALL), tl.arange(0, P.EXACT)
        d = tl.program_id(2) * P.channels + tl.arange(0, P.channels)
        channel, back = (g % V.share * G.heads + m % ROWS // (ROWS // G.heads)) * G.dim + d, ()
        which = row_group // G.groups * V.groups + g // V.share
        affine = v_affine + which * (2 * V.rank + V.width)
        if F.latent_out:  # loaded beside what splits have left, not after it
            for i in tl.static_range(len(G.v.fields)):
                basis = v_basis + which * (V.width * V.rank)
                x, scale = digit_rows(basis, affine, channel, d < G.dim, V, i)
                back = back + ((x, scale),)
            even = inverse(tl.load(affine + 2 * V.rank + channel, mask=d < G.dim, other=1.0))
        every = s < splits + exact_splits
        highest = tl.load(left.maxima + at + s, mask=every, other=float("-inf"))
        total = tl.load(left.totals + at + s, mask=every, other=0.0)
        exact = tl.load(left.maxima + at + splits + e, mask=e < exact_splits, other=float("-inf"))
        held = (e < exact_splits)[:, None]
        exact_sums = tl.load(left.sums + (at + splits + e)[:, None] * F.left + d[None, :], mask=held, other=0.0)
        maxima, sums = _some_splits(left, at, 0, splits, d, G, F, P)
        top = tl.max(highest, 0)
        if sink_score is not None:
            taken = tl.load(sink_score + g * ROWS + m % ROWS).to(tl.float32) * LOG2E
            top = tl.maximum(top, taken)
        top = tl.where(top == float("-inf"), 0.0, top)
        norm = tl.sum(tl.exp2(highest - top) * total, 0)
        if sink_score is not None:
            norm += tl.exp2(taken - top)
        norm = tl.where(norm == 0, 1.0, norm)
        latent = ()
        for i in tl.static_range(len(sums)):
            latent = latent + (tl.sum(sums[i] * tl.exp2(maxima - top)[:, None], 0),)
        for start in range(P.AT_ONCE, P.SPLITS, P.AT_ONCE):
            maxima, sums = _some_splits(left, at, start, splits, d, G, F, P)
            grown = ()
            for i in tl.static_range(len(latent)):
                grown = grown + (latent[i] + tl.sum(sums[i] * tl.exp2(maxima - top)[:, None], 0),)
            latent = grown
        place = ((row_group // G.groups * count + m // ROWS) * G.groups + g) * ROWS + m % ROWS
        mixed = tl.sum(exact_sums * tl.exp2(exact - top)[:, None], 0)
        if F.latent_out:
            CHANNELS: tl.constexpr = P.channels
            valued = tl.zeros([CHANNELS], tl.float32)
            for i in tl.static_range(len(G.v.fields)):
                valued += tl.sum(back[i][0].to(tl.float32) * (latent[i] * back[i][1])[:, None], 0)
            mixed += valued * even
        else:
            mixed += latent[0]
        tl.store(result + place * G.dim + d, (mixed * (1 / norm)).to(result.dtype.element_ty), mask=d < G.dim)
    else:
        if F.enters and tl.program_id(2) == 0:
            enter(code_tiles, row_group, m - merged, 0, 1, entering, entering.columns, entering.code_tiles, entering.segments,
                  G, False, True, True, PRECISION)  # fmt: skip
