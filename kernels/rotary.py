"""RoPE inside kernels: angles as wrapping integers, which are exact at any position, and a table for short distances."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Rotary
from spectral_compile.kernels.digits import INTERPRETED

TILE = 64  # tokens that a kernel takes at a time, and rows of the table


@functools.cache
def tables(rotary: Rotary | None, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns per position as fractions of 2**32, int32 [pairs], and cos and sin of the first distances, [2, TILE, pairs].

    They live as long as the process, so they must be made before a CUDA graph is captured.
    """
    frequencies = torch.tensor(rotary.frequencies if rotary else (0.0,), dtype=torch.float64)
    turns = (frequencies / (2 * math.pi) * 2**32).round().to(torch.int64).to(torch.int32)
    angles = torch.arange(TILE, dtype=torch.float64)[:, None] * frequencies
    table = torch.stack((angles.cos(), angles.sin()))
    return turns.to(device), table.to(device, dtype)


@triton.jit
def sincos(positions, turns):
    """Sine and cosine of the angles by which ``positions`` turn pairs: int32 products wrap at a full turn, as angles do."""
    x = (positions * turns).to(tl.float32) * (2 * 3.141592653589793 / 4294967296.0)
    if INTERPRETED:
        return tl.sin(x), tl.cos(x)
    # the hardware's own are off by at most 1e-6 within half a turn, and take a quarter of the instructions of a polynomial
    return tl.inline_asm_elementwise(
        "sin.approx.f32 $0, $2; cos.approx.f32 $1, $2;", "=f,=f,f", [x], (tl.float32, tl.float32), True, 1
    )
