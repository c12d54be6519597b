"""Numbers to bytes: the mid-rise quantiser, its step search, tier packing and the token norm's logarithmic code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Tiers

# Steps to try, in units of the channel's RMS, one row a tier: from "hardly clips" over the Gaussian optimum to heavy tails.
FACTORS = (
    (0.0085, 0.013, 0.02, 0.031, 0.045, 0.065),
    (0.17, 0.23, 0.29, 0.335, 0.4, 0.5),
    (0.65, 0.8, 0.9, 1.0, 1.15, 1.4),
)
_TINY = torch.finfo(torch.float32).tiny
LEAST_RMS = _TINY**0.5  # of a channel, so that its step can be divided by
_OCTAVE, _UNIT = 8, 128
_MOST, _SIZE_UNIT = 127, 192  # of recent tokens in bytes: the largest code of a channel, and the code of the size 1


def _by_channel(tiers: Tiers, per_tier: tuple[float, float, float], like: Tensor) -> Tensor:
    counts = (tiers.bits8, tiers.bits4, tiers.bits2)
    return torch.cat([like.new_full((count,), value) for count, value in zip(counts, per_tier, strict=True)])


def _half(tiers: Tiers, like: Tensor) -> Tensor:
    return _by_channel(tiers, (128.0, 8.0, 2.0), like)


def _pack_tier(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits in bytes, ``8 // bits`` to a byte from its low bits up: uint8 ``[..., n]`` -> ``[..., bytes]``."""
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (codes.shape[-1] // per_byte, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def _unpack_tier(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of 4 or 2 ``bits``: uint8 ``[..., bytes]`` -> ``[..., count]``.

    Each byte is widened to a word of as many bytes as it holds codes, into which shifts and masks spread them.
    """
    word = packed.to(torch.int16 if bits == 4 else torch.int32, memory_format=torch.contiguous_format)
    for shift, mask in ((4, 0x0F0F),) if bits == 4 else ((12, 0x000F000F), (6, 0x03030303)):
        word |= word << shift
        word &= mask
    return word.view(torch.uint8)[..., :count]


def pack(codes: Tensor, tiers: Tiers) -> Tensor:
    """Lay a token's codes out in bytes: the 8-bit tier, the 4-bit tier two to a byte, the 2-bit tier four to a byte.

    Codes fill a byte from the low bits up; each tier starts on a byte and is padded with zeros, and so is the row.

    codes: any integer dtype, ``[..., rank]``, each below ``2**bits`` of its tier -> uint8 ``[..., row_bytes]``.
    """
    codes8, codes4, codes2 = codes.to(torch.uint8).split((tiers.bits8, tiers.bits4, tiers.bits2), dim=-1)
    row = torch.cat([codes8, _pack_tier(codes4, 4), _pack_tier(codes2, 2)], dim=-1)
    return F.pad(row, (0, tiers.row_bytes - row.shape[-1]))


def unpack(packed: Tensor, tiers: Tiers) -> Tensor:
    """Undo ``pack``: uint8 ``[..., row_bytes]`` -> uint8 ``[..., rank]``."""
    bytes4 = -(-tiers.bits4 // 2)
    packed8, packed4, packed2 = packed.tensor_split((tiers.bits8, tiers.bits8 + bytes4), dim=-1)
    return torch.cat([packed8, _unpack_tier(packed4, 4, tiers.bits4), _unpack_tier(packed2, 2, tiers.bits2)], dim=-1)


def _codes(coefficients: Tensor, step: Tensor, half: Tensor) -> Tensor:
    return torch.floor(coefficients / step[..., None, :]).clamp(-half, half - 1) + half


def _values(codes: Tensor, step: Tensor, half: Tensor) -> Tensor:
    return (codes - half + 0.5) * step[..., None, :]


def quantise(coefficients: Tensor, step: Tensor, tiers: Tiers) -> Tensor:
    """Code each channel with a uniform mid-rise quantiser: ``clamp(floor(c / step), -half, half - 1) + half``.

    coefficients: float32 ``[..., n, R]``; step: float32 ``[..., R]``, positive -> uint8 ``[..., n, row_bytes]``.
    """
    return pack(_codes(coefficients, step, _half(tiers, step)), tiers)


def dequantise(packed: Tensor, step: Tensor, tiers: Tiers) -> Tensor:
    """The midpoint of each code's cell, ``(code - half + 0.5) * step``.

    packed: uint8 ``[..., n, row_bytes]``; step: float32 ``[..., R]`` -> float32 ``[..., n, R]``.
    """
    return _values(unpack(packed, tiers), step, _half(tiers, step))


def search_step(coefficients: Tensor, tiers: Tiers) -> Tensor:
    """Each channel's step: its RMS times that one of six factors which gives the least squared error.

    Rows of zeros (padding) do not count. coefficients: float32 ``[..., n, R]`` -> float32 ``[..., R]``, positive.
    """
    live = (coefficients != 0).any(-1, keepdim=True)
    rms = (coefficients.square().sum(-2) / live.sum(-2).clamp_min(1)).sqrt().clamp_min(LEAST_RMS)
    half = _half(tiers, coefficients)

    def tried(factors: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        step = rms * _by_channel(tiers, factors, coefficients)
        return step, ((_values(_codes(coefficients, step, half), step, half) - coefficients).square() * live).sum(-2)

    first, *others = zip(*FACTORS, strict=True)
    best, least = tried(first)
    for step, error in map(tried, others):
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def norm_code(x: Tensor) -> Tensor:
    """A token's root mean square on a logarithmic scale, eight codes an octave from ``2**-16`` up; zero vectors get code 0.

    x: floating ``[..., n, W]`` -> uint8 ``[..., n]``.
    """
    rms = x.float().square().mean(-1).sqrt()
    return (torch.log2(rms.clamp_min(_TINY)) * _OCTAVE + _UNIT).round().clamp(0, 255).to(torch.uint8)


def norm_value(code: Tensor) -> Tensor:
    """The scale that a norm code stands for, ``2 ** ((code - 128) / 8)``: uint8 ``[...]`` -> float32 ``[...]``, positive."""
    return _power(code, _UNIT)


def recent_code(x: Tensor) -> tuple[Tensor, Tensor]:
    """A token's channels in bytes, and their size on a logarithmic scale, eight codes an octave from ``2**-24`` up.

    x: floating ``[..., D]`` -> int8 ``[..., D]``, uint8 ``[...]``.
    """
    x = x.float()
    size = torch.log2((x.abs().amax(-1) / _MOST).clamp_min(_TINY)) * _OCTAVE + _SIZE_UNIT
    size = size.ceil().clamp(0, 255).to(torch.uint8)
    codes = torch.floor(x / _power(size, _SIZE_UNIT)[..., None] + 0.5)
    return codes.clamp(-_MOST, _MOST).to(torch.int8), size


def recent_value(codes: Tensor, size: Tensor) -> Tensor:
    """Undo ``recent_code`` up to rounding: int8 ``[..., D]``, uint8 ``[...]`` -> float32 ``[..., D]``."""
    return codes.float() * _power(size, _SIZE_UNIT)[..., None]


def _power(code: Tensor, unit: int) -> Tensor:
    return torch.exp2((code.float() - unit) / _OCTAVE)
