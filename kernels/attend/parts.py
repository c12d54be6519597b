"""Triton functions that attention to coded tokens and to exact ones share, and the arguments of both."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.kernels.digits import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))


class Masks(NamedTuple):
    """What decides beside causality which tokens are seen; None where nothing does."""

    mask: torch.Tensor | None  # uint8 [B, n, mask_slots]: which tokens each query sees, instead of causality
    visible: torch.Tensor | None  # uint8 [B, slots]: 0 hides a stored token
    mask_slots: int
    sliding_window: int


class Angles(NamedTuple):
    """See ``rotary.tables``."""

    turns: torch.Tensor
    table: torch.Tensor


class Left(NamedTuple):
    """What splits leave for the merge, for each row, group, (query, head) pair and split: sums, maxima, sums of weights."""

    sums: torch.Tensor  # float32 [..., left]
    maxima: torch.Tensor  # float32 [...]
    totals: torch.Tensor  # float32 [...]


@triton.jit
def prefetch(first, count, part, parts):
    """Begin to bring ``count`` bytes from ``first`` on to the L2 cache; each of ``parts`` programs asks for its share.

    A step's first loads come from memory, each after another that says where it is; so these are on their way by then.
    """
    if not INTERPRETED:
        line = part * 128 + tl.arange(0, 128)
        for begin in range(0, count, parts * (128 * 128)):
            at = begin + line * 128
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l,r", [first.to(tl.int64) + at, (at < count).to(tl.int32)], tl.int32, False, 1,
            )  # fmt: skip


@triton.jit
def capped(s, CAP: tl.constexpr):
    """``CAP * tanh(s / CAP)``, or scores as they are where ``CAP`` is 0; all counted in powers of two."""
    return CAP - 2 * CAP / (tl.exp2(s * (2 * LOG2E / CAP)) + 1) if CAP > 0 else s


@triton.jit
def own_tokens(chunk, b, n, before, after, columns, live, F: tl.constexpr):
    """Which token of its row each of these columns of the chunk is."""
    if F.one:
        return columns * 0 + (after - 1)
    if chunk.index is not None:
        return before + tl.load(chunk.index + b * n + columns, mask=live, other=0)
    return before + columns


@triton.jit
def of_head(x, head, h: tl.constexpr, G: tl.constexpr):
    """Rows of ``x`` that belong to head ``h`` of the group, and zeros for the others."""
    return x if G.heads == 1 else tl.where((head == h)[:, None], x, tl.zeros_like(x))


@triton.jit
def queries_of(
    q_row, live, turns, scale, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, G: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Queries [M, pairs], first and second halves, and turns [pairs], each a tuple of parts; and what is not rotated."""
    p = tl.arange(0, AT_ONCE)
    q1, q2, q3, turn = (), (), (), ()
    for i in tl.static_range(PARTS):
        half = i * AT_ONCE + p
        first, second = (half * 2, half * 2 + 1) if R.interleaved else (half, half + R.pairs)
        held = live[:, None] & (half < R.pairs)[None, :]
        q1 = q1 + (tl.load(q_row[:, None] + first[None, :], mask=held, other=0.0).to(tl.float32) * (scale * R.scaling),)
        q2 = q2 + (tl.load(q_row[:, None] + second[None, :], mask=held, other=0.0).to(tl.float32) * (scale * R.scaling),)
        turn = turn + (tl.load(turns + half, mask=half < R.pairs, other=0),)
    if R.REST > 0:
        rest = 2 * R.pairs + tl.arange(0, R.REST)
        held = live[:, None] & (rest < G.dim)[None, :]
        q3 = (tl.load(q_row[:, None] + rest[None, :], mask=held, other=0.0).to(tl.float32) * scale,)
    return q1, q2, q3, turn


@triton.jit
def leave(sums, highest, total, left, at, F: tl.constexpr):
    """Store what one split has come to, ``F.left`` numbers for each of M pairs, for the merge."""
    tl.store(left.maxima + at, highest)
    tl.store(left.totals + at, total)
    for i in tl.static_range(len(sums)):
        tl.store(left.sums + at[:, None] * F.left + (F.places[i] + tl.arange(0, sums[i].shape[1]))[None, :], sums[i])
