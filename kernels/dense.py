"""A store, or a part of it, as dense keys and values; and RoPE."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from spectral_compile import codec
from spectral_compile.codec.layout import Layout, Rotary, Side
from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.buffers import Buffers


@functools.cache
def _frequencies(rotary: Rotary, device: torch.device) -> torch.Tensor:
    return torch.tensor(rotary.frequencies, dtype=torch.float32, device=device)  # a copy that waits for the device


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """``x`` [..., n, D] rotated to int ``positions`` [n] (RoPE; Su et al., arXiv 2104.09864), in the dtype of ``x``."""
    if rotary is None:
        return x
    angle = positions.to(torch.float32)[:, None] * _frequencies(rotary, x.device)
    cos, sin = (turn if rotary.scaling == 1 else turn * rotary.scaling for turn in (angle.cos(), angle.sin()))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def unrotate(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """The ``x`` whose ``rotate(x, positions, rotary)`` is given, in its dtype."""
    if rotary is None:
        return x
    back = replace(rotary, scaling=1 / rotary.scaling)
    return rotate(x.float(), -positions, back).to(x.dtype)


def group(x: torch.Tensor, side: Side) -> torch.Tensor:
    """[H, n, D] as joint channels [G, n, W]."""
    return x.unflatten(0, (side.groups, side.heads)).transpose(1, 2).flatten(-2)


def ungroup(x: torch.Tensor, side: Side) -> torch.Tensor:
    """[G, n, W] as heads [H, n, D]."""
    return x.unflatten(-1, (side.heads, side.width // side.heads)).transpose(1, 2).flatten(0, 1)


def recent(row: int, side: str, slots: torch.Tensor, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """Recent tokens [H, n, D] in these slots, in the model's dtype, or in float32 where they are in bytes."""
    exact, place = getattr(buffers, f"{side}_exact")[row], slots % buffers.recent_slots(layout)
    if layout.recent_bits != 8:
        return exact[:, layout.first_exact + place]
    codes, sizes = getattr(buffers, f"{side}_recent")[row], getattr(buffers, f"{side}_sizes")[row]
    return codec.recent_value(codes[:, place], sizes[:, place])


def spans(row: int, coded: int, buffers: Buffers, layout: Layout) -> list[tuple[int, slice]]:
    """The coded slots of a row, as (segment, slots)."""
    if coded == 0:
        return []
    if layout.lossless:
        return [(0, slice(0, coded))]
    starts = [s for s in buffers.starts[row].tolist() if s < coded]
    return [(i, slice(a, b)) for i, (a, b) in enumerate(zip(starts, [*starts[1:], coded], strict=True))]


def not_coded(row: int, side: str, before: int, coded: int, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """First and recent tokens of one row, [H, n, D], in the order of tokens and the model's dtype."""
    exact = getattr(buffers, f"{side}_exact")[row]
    slots = torch.arange(coded, max(before - layout.first_exact, coded), device=exact.device)
    last = recent(row, side, slots, buffers, layout).to(exact.dtype)
    return torch.cat((exact[:, : min(before, layout.first_exact)], last), 1)


def coded_side(side: str, buffers: Buffers, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Side]:
    """Codes, bases and affine numbers of keys ("k") or values ("v"), and how they are coded."""
    if side == "k":
        return buffers.k_codes, buffers.k_basis.mT, buffers.k_affine, layout.k
    return buffers.v_codes, buffers.v_basis.mT, buffers.v_affine, layout.v


def decode(row: int, segment: int, slots: slice, side: str, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """Coded tokens of one segment, [H, n, D]: float32, or the model's dtype where the store is lossless."""
    codes, basis, affine, how = coded_side(side, buffers, layout)
    if layout.lossless:
        return ungroup(codes[row, :, slots], how)
    x = codec.decode(codes[row, :, slots], basis[row, :, segment], affine[row, :, segment], how.tiers)
    if side == "v" and layout.normalised:
        x = x * codec.norm_value(buffers.v_norms[row, :, slots])[..., None]
    return ungroup(x, how)


@without_autocast
def materialise(
    row: int, before: int, coded: int, positions: torch.Tensor, buffers: Buffers, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys (rotated) and values [H, n, D] of the first ``before`` tokens of a row, in the model's dtype."""
    dense, segments = [], spans(row, coded, buffers, layout)
    for side in ("k", "v"):
        coded_tokens = [decode(row, i, slots, side, buffers, layout) for i, slots in segments]
        kept = not_coded(row, side, before, coded, buffers, layout)
        head = min(before, layout.first_exact)
        dense.append(torch.cat([kept[:, :head], *(x.to(kept.dtype) for x in coded_tokens), kept[:, head:]], 1))
    return rotate(dense[0], positions[:before], layout.rotary), dense[1]
