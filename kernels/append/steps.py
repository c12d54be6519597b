"""The search for steps as one kernel: in PyTorch it is a hundred launches a layer, which a short prompt waits for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Tiers
from spectral_compile.codec.quantise import FACTORS, LEAST_RMS

_TOKENS, _CHANNELS = 64, 16  # that a program takes at a time


@triton.jit(do_not_specialize=["n"])
def _search_kernel(
    coefficients, live, out, n,
    R: tl.constexpr, BITS8: tl.constexpr, BITS4: tl.constexpr, FACTORS: tl.constexpr, LEAST: tl.constexpr,
    TRIALS: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The steps of some channels of one matrix."""
    matrix = tl.program_id(0).to(tl.int64)
    c, j = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, TRIALS)
    half = tl.where(c < BITS8, 128.0, tl.where(c < BITS8 + BITS4, 8.0, 2.0))
    rows, counts = coefficients + matrix * n * R, live + matrix * n
    squares, tokens = tl.zeros([C], tl.float32), 0.0
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        x = tl.load(rows + i[:, None] * R + c[None, :], mask=(i < n)[:, None] & (c < R)[None, :], other=0.0)
        squares += tl.sum(x * x, 0)
        tokens += tl.sum(tl.load(counts + i, mask=i < n, other=0).to(tl.float32), 0)
    factor = tl.zeros([TRIALS, C], tl.float32)
    for trial in tl.static_range(len(FACTORS[0])):
        tier = tl.where(c < BITS8, FACTORS[0][trial], tl.where(c < BITS8 + BITS4, FACTORS[1][trial], FACTORS[2][trial]))
        factor = tl.where((j == trial)[:, None], tier[None, :], factor)
    step = tl.maximum(tl.sqrt(squares / tl.maximum(tokens, 1.0)), LEAST)[None, :] * tl.maximum(factor, FACTORS[0][0])
    error = tl.zeros([TRIALS, C], tl.float32)
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        counted = tl.load(counts + i, mask=i < n, other=0).to(tl.float32)
        x = tl.load(rows + i[:, None] * R + c[None, :], mask=(i < n)[:, None] & (c < R)[None, :], other=0.0)[:, None, :]
        code = tl.minimum(tl.maximum(tl.floor(x / step[None]), -half[None, None]), half[None, None] - 1)
        lost = (code + 0.5) * step[None] - x
        error += tl.sum(lost * lost * counted[:, None, None], 0)
    best = tl.argmin(tl.where((factor > 0) & (c < R)[None, :], error, float("inf")), 0)
    tl.store(out + matrix * R + c, tl.sum(tl.where(j[:, None] == best[None, :], step, 0.0), 0), mask=c < R)


def search_step(coefficients: torch.Tensor, tiers: Tiers) -> torch.Tensor:
    """``codec.search_step``: float32 [..., n, R] -> float32 [..., R]."""
    *shape, count, rank = coefficients.shape
    out = coefficients.new_empty(*shape, rank)
    live = (coefficients != 0).any(-1)
    _search_kernel[(out.numel() // rank, triton.cdiv(rank, _CHANNELS))](
        coefficients.contiguous(), live.view(torch.uint8), out, count,
        R=rank, BITS8=tiers.bits8, BITS4=tiers.bits4, FACTORS=FACTORS, LEAST=LEAST_RMS,
        TRIALS=triton.next_power_of_2(len(FACTORS[0])), N=_TOKENS, C=_CHANNELS,
    )  # fmt: skip
    return out
