"""Rival codecs written down for comparison: keys and values are coded and decoded at once, and attended densely.

Their first and last tokens stay exact. Bytes are those that packed codes and their scales would take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from spectral_compile.stats import storage_bytes

_FIRST_EXACT = 4  # tokens, as in ``Layout``
RECENT = 96  # tokens: in 16 bits about the bytes of ``balanced``'s recent tokens, of which it keeps 216 in 8 bits
_GROUP = 32  # numbers with one scale and one zero; as many tokens are coded at a time
Codec = Callable[[torch.Tensor], tuple[torch.Tensor, float]]  # float32 [B, H, n, D] -> the same with losses, and bytes


def ranged(x: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, float]:
    """Integers between least and greatest of ``_GROUP`` numbers along ``axis`` < 0; scale and zero take 16 bits each."""
    groups = x.unflatten(axis, (-1, _GROUP))
    least, most = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    coded = ((groups - least) / scale).round() * scale + least
    return coded.flatten(axis - 1, axis), x.numel() * (bits / 8 + 4 / _GROUP)


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
    """A dense cache that loses what a codec would lose of all tokens between its first and its last.

    Layers with a sliding window, or with states instead of tokens, stay as they are.
    """

    def __init__(self, codecs: tuple[Codec, Codec], config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.codecs = codecs
        self.coded: dict[int, int] = {}  # by layer: the first token that is not coded yet, after the first exact ones
        self.coded_bytes = 0.0

    @property
    def stored_bytes(self) -> float:
        """What codes, scales and exact tokens would take."""
        exact = (
            x[:, :, :1].nbytes * (x.shape[2] - coded + _FIRST_EXACT)
            for i, coded in self.coded.items()
            for x in (self.layers[i].keys, self.layers[i].values)
        )
        others = (vars(layer) for i, layer in enumerate(self.layers) if i not in self.coded)
        return self.coded_bytes + sum(exact) + storage_bytes(*others)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Tokens attend to each other as they come, and to what is left of those before them."""
        attended = super().update(key, value, layer_idx, *rest, **more)
        layer = self.layers[layer_idx]
        if layer.is_sliding:
            return attended
        begin = self.coded.setdefault(layer_idx, _FIRST_EXACT)
        end = begin + max(0, layer.keys.shape[2] - RECENT - begin) // _GROUP * _GROUP
        if end > begin:
            layer.keys, layer.values = (
                self._lose(x, codec, begin, end) for x, codec in zip((layer.keys, layer.values), self.codecs, strict=True)
            )
            self.coded[layer_idx] = end
        return attended

    def _lose(self, x: torch.Tensor, codec: Codec, begin: int, end: int) -> torch.Tensor:
        coded, size = codec(x[:, :, begin:end].float())
        self.coded_bytes += size
        return torch.cat([x[:, :, :begin], coded.to(x.dtype), x[:, :, end:]], 2)
