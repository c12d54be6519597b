"""The transform: a weighted eigenbasis for one side (K or V) of a group of heads, and coding against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Rotary, Tiers
from .quantise import dequantise, quantise, search_step

LEAST_WEIGHT = 1e-3  # of a channel against the mean, so that it can be divided by
SAMPLE = 1024  # steps are searched on this many tokens, or up to twice as many
REFRESH = 2.0  # a new segment starts when its old basis loses this many times what a fresh one would, in keys or values
RANGE = (0.1, 50.0)  # of a token_weight against the mean: it is an estimate from a few queries, and others come later
_TINY = torch.finfo(torch.float32).tiny


def _matrix(basis: Tensor, scale: Tensor) -> Tensor:
    return basis * scale[..., None, :]


def _split(affine: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return affine.split((rank, rank, affine.shape[-1] - 2 * rank), dim=-1)


def _analyse(y: Tensor, matrix: Tensor) -> Tensor:
    """The c of least ``|y - c @ matrix.mT|``, with products alone, so that it can be captured in a CUDA graph."""
    coefficients = y @ matrix
    # Rounding to int8 leaves the columns not quite orthonormal; one correction leaves the square of that error.
    return coefficients + (y - coefficients @ matrix.mT) @ matrix


def fit(
    x: Tensor, weight: Tensor, tiers: Tiers, margin: float = 1.0, token_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the basis and the steps for a segment of tokens.

    The basis holds the leading eigenvectors of ``y.mT @ y`` with ``y = x * weight`` (uncentred Karhunen-Loeve transform), each
    token times its ``token_scale``, rounded to int8 with a scale a column; steps are ``margin`` times those of least error on
    tokens at even distances. ``weight`` counts up to a factor: its mean becomes 1. Rows of zeros do not count.

    x: float32 ``[..., n, W]``; weight: float32 ``[..., W]``, not negative; token_scale: float32 ``[..., n]``
    -> basis int8 ``[..., W, R]``, affine float32 ``[..., 2 * R + W]`` = step ``[R]``, column scale ``[R]``, weight ``[W]``.
    """
    weight = even(weight)
    y = x * weight[..., None, :]
    vectors = torch.linalg.eigh(_gram(y, token_scale)).eigenvectors.flip(-1)[..., : tiers.rank]
    scale = torch.linalg.vector_norm(vectors, torch.inf, -2) / 127
    basis = (vectors / scale[..., None, :]).round().to(torch.int8)
    sample = y[..., :: max(1, y.shape[-2] // SAMPLE), :]
    step = margin * search_step(_analyse(sample, _matrix(basis, scale)), tiers)
    return basis, torch.cat([step, scale, weight.expand(*step.shape[:-1], -1)], dim=-1)


def _gram(y: Tensor, token_scale: Tensor | None) -> Tensor:
    if token_scale is None:
        return y.mT @ y
    # SAMPLE tokens at a time: a scaled copy of all tokens would not fit beside the prompt on a full GPU
    slices = zip(y.split(SAMPLE, -2), token_scale.square().split(SAMPLE, -1), strict=True)
    return sum(some.mT @ (some * squared[..., None]) for some, squared in slices)


def even(weight: Tensor) -> Tensor:
    """Weights [..., W] with mean 1, and none so small that it could not be divided by."""
    return (weight / weight.mean(-1, keepdim=True).clamp_min(_TINY)).clamp_min(LEAST_WEIGHT)


def token_scale(token_weight: Tensor) -> Tensor:
    """What to multiply each token by where a basis is chosen: the fourth root of its token_weight over the mean one.

    The quotient is clamped to ``RANGE``: without a floor the basis would lose all of what few queries have attended to yet.

    token_weight: float32 ``[..., n]``, not negative -> ``[..., n]``.
    """
    mean = token_weight.mean(-1, keepdim=True)
    return (token_weight / mean.clamp_min(_TINY)).clamp(*RANGE) ** 0.25


def encode(x: Tensor, basis: Tensor, affine: Tensor, tiers: Tiers) -> Tensor:
    """Code tokens against a basis that ``fit`` made, of these tokens or of earlier ones.

    x: float32 ``[..., n, W]``; basis: int8 ``[..., W, R]``; affine: float32 ``[..., 2 * R + W]``
    -> uint8 ``[..., n, row_bytes]``.
    """
    step, scale, weight = _split(affine, tiers.rank)
    return quantise(_analyse(x * weight[..., None, :], _matrix(basis, scale)), step, tiers)


def latent(packed: Tensor, affine: Tensor, tiers: Tiers) -> Tensor:
    """The quantised coefficients: uint8 ``[..., n, row_bytes]``, float32 ``[..., 2 * R + W]`` -> float32 ``[..., n, R]``."""
    return dequantise(packed, affine[..., : tiers.rank], tiers)


def synthesis(basis: Tensor, affine: Tensor) -> Tensor:
    """The matrix from coefficients to channels, unweighted: int8 ``[..., W, R]`` -> float32 ``[..., R, W]``."""
    _, scale, weight = _split(affine, basis.shape[-1])
    return (_matrix(basis, scale) / weight[..., None]).mT


def decode(packed: Tensor, basis: Tensor, affine: Tensor, tiers: Tiers) -> Tensor:
    """Undo ``encode`` up to what was dropped and rounded: uint8 ``[..., n, row_bytes]`` -> float32 ``[..., n, W]``."""
    return latent(packed, affine, tiers) @ synthesis(basis, affine)


def residual(x: Tensor, basis: Tensor, affine: Tensor) -> Tensor:
    """The share of the tokens' weighted energy that the basis misses: float32 ``[..., n, W]`` -> float32 ``[...]``."""
    _, scale, weight = _split(affine, basis.shape[-1])
    y, matrix = x * weight[..., None, :], _matrix(basis, scale)
    missed = y - _analyse(y, matrix) @ matrix.mT
    return missed.square().sum((-2, -1)) / y.square().sum((-2, -1)).clamp_min(_TINY)


def gram_residual(gram: Tensor, basis: Tensor, affine: Tensor) -> Tensor:
    """``residual`` of tokens of which only sums of products, ``x.mT @ x``, are known: float32 ``[..., W, W]`` -> ``[...]``."""
    _, scale, weight = _split(affine, basis.shape[-1])
    gram = gram * weight[..., None, :] * weight[..., None]
    missing = torch.eye(gram.shape[-1], device=gram.device)
    matrix = _matrix(basis, scale)
    missing = missing - (2 * matrix - matrix @ (matrix.mT @ matrix)) @ matrix.mT  # what ``_analyse`` leaves of each channel
    lost = (missing * (gram @ missing)).sum((-2, -1))
    return lost / gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(_TINY)


def key_weight(moment: Tensor, rotary: Rotary | None) -> Tensor:
    """How much each key channel counts: the root mean square of the queries there, equal within a RoPE pair.

    RoPE mixes the two channels of a pair by position, so before rotation neither can count for more than the other.

    moment: float32 ``[..., H, D]``, squared queries summed over tokens and over the KV head's query heads
    -> float32 ``[..., H, D]``; ones if nothing was summed.
    """
    if rotary is not None:
        rotated, rest = moment.split((rotary.dim, moment.shape[-1] - rotary.dim), dim=-1)
        half = rotary.dim // 2
        shape, axis = ((half, 2), -1) if rotary.interleaved else ((2, half), -2)
        pairs = rotated.unflatten(-1, shape)
        moment = torch.cat([pairs.mean(axis, keepdim=True).expand_as(pairs).flatten(-2), rest], dim=-1)
    return torch.where(moment.sum((-2, -1), keepdim=True) > 0, moment.sqrt(), 1.0)
