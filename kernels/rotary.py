"""RoPE inside kernels: angles as wrapping integers, which are exact at any position, and a table for short distances."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Rotary

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
    phase = positions * turns
    quarter = (phase + (1 << 29)) >> 30
    x = (phase - (quarter << 30)).to(tl.float32) * (2 * 3.141592653589793 / 4294967296.0)  # within an eighth of a turn
    y = x * x
    sin = x * (1.0 + y * (-1.0 / 6 + y * (1.0 / 120 - y * (1.0 / 5040))))
    cos = 1.0 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320))))
    odd = (quarter & 1) != 0
    s, c = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return tl.where((quarter & 2) != 0, -s, s), tl.where(((quarter + 1) & 2) != 0, -c, c)
