"""Rival codecs written down for comparison: the prompt's keys and values are coded and decoded at once, and attended densely.

They get the windows of the presets: the first and last tokens stay exact, and so do all that follow the prompt. Bytes are those
that packed codes and their scales would take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from spectral_compile.codec import PRESETS

_WINDOWS = PRESETS["balanced"]
_GROUP = 32  # numbers with one scale and one zero
Codec = Callable[[torch.Tensor], tuple[torch.Tensor, float]]  # float32 [B, H, n, D] -> the same with losses, and bytes


def ranged(x: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, float]:
    """Integers between the least and the greatest of ``_GROUP`` numbers along ``axis`` < 0; scale and zero take 16 bits each.

    What remains of tokens over whole groups stays exact.
    """
    whole = x.shape[axis] // _GROUP * _GROUP
    groups, rest = x.split((whole, x.shape[axis] - whole), axis)
    parts = groups.unflatten(axis, (-1, _GROUP))
    least, most = parts.amin(axis, keepdim=True), parts.amax(axis, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    coded = ((parts - least) / scale).round() * scale + least
    restored = torch.cat([coded.flatten(axis - 1, axis), rest], axis)
    return restored, groups.numel() * (bits / 8 + 4 / _GROUP) + 2 * rest.numel()


def kivi(bits: int) -> tuple[Codec, Codec]:
    """After KIVI (Liu et al. 2024, arXiv:2402.02750): keys by channel over tokens, values by token over channels."""
    return partial(ranged, bits=bits, axis=-2), partial(ranged, bits=bits, axis=-1)


@cache
def _lloyd(bits: int) -> torch.Tensor:
    """The quantiser of least squared error for a standard normal variable, float32 [2 ** bits]."""
    x = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    density = torch.exp(-0.5 * x.square())
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(200):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, cell, density)
        levels = torch.zeros_like(levels).index_add_(0, cell, density * x) / mass
    return levels.float()


def _rotated(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], generator=generator))[0].to(x.device)
    size = x.square().mean(-1, keepdim=True).sqrt().half().float().clamp_min(torch.finfo(torch.float16).tiny)
    levels = _lloyd(bits).to(x.device)
    codes = torch.bucketize(x @ rotation / size, (levels[1:] + levels[:-1]) / 2)
    return levels[codes] * size @ rotation.mT, x.numel() * bits / 8 + 2 * size.numel()


def turbo(bits: int) -> tuple[Codec, Codec]:
    """After TurboQuant (Zandieh et al. 2025, arXiv:2504.19874): a random rotation, a norm a token, a normal quantiser."""
    return partial(_rotated, bits=bits), partial(_rotated, bits=bits)


SIMULATED = {
    **{f"kivi-{bits}": kivi(bits) for bits in (4, 3, 2)},
    **{f"turbo-{bits}": turbo(bits) for bits in (4, 3, 2)},
}


class SimulatedCache(DynamicCache):
    """A dense cache that loses of its prompt what a codec would lose; ``stored_bytes`` is what that codec would hold."""

    def __init__(self, codecs: tuple[Codec, Codec], config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.codecs, self.stored_bytes = codecs, 0.0

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """The prompt attends to itself as it is; later tokens see what is left of it."""
        prompt = self.get_seq_length(layer_idx) == 0
        attended = super().update(key, value, layer_idx, *rest, **more)
        if prompt:
            layer = self.layers[layer_idx]
            layer.keys, layer.values = (self._lose(x, codec) for x, codec in zip((key, value), self.codecs, strict=True))
        return attended

    def _lose(self, x: torch.Tensor, codec: Codec) -> torch.Tensor:
        end = max(_WINDOWS.sinks, x.shape[2] - _WINDOWS.recent)
        first, middle, last = x.tensor_split((_WINDOWS.sinks, end), 2)
        coded, size = codec(middle.float())
        self.stored_bytes += size + x.element_size() * (first.numel() + last.numel())
        return torch.cat([first, coded.to(x.dtype), last], 2)
