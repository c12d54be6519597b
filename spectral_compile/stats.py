"""What a cache really holds, summed over the storages of its live tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectral_compile.kernels.buffers import PART, Buffers
from spectral_compile.tensor import SpectralTensor


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of a cache.

    ``logical_bytes`` is what dense keys and values of this shape and dtype take, ``stored_bytes`` what is alive for them, and
    ``ratio`` the quotient. ``parts`` splits the stored bytes into codes, bases, scales, windows, dense and other;
    ``layers`` holds the stored bytes of each layer (what layers share is counted with the first).
    """

    logical_bytes: int
    stored_bytes: int
    ratio: float
    parts: dict[str, int]
    layers: tuple[int, ...]


def memory_stats(cache: Any) -> MemoryStats:
    """The ``MemoryStats`` of a transformers cache, compressed or not, or of a sequence of (keys, values).

    Every storage is counted once and whole, with its spare capacity. TypeError where there is no cache.
    """
    if cache is None:
        raise TypeError("there is no cache to measure: call the model with use_cache=True")
    parts = dict.fromkeys(("codes", "bases", "scales", "windows", "dense", "other"), 0)
    seen: set[int] = set()
    logical, layers = 0, []

    def add(tensor: torch.Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage._cdata in seen:
            return 0
        seen.add(storage._cdata)
        parts[part] += storage.nbytes()
        return storage.nbytes()

    for pair in _pairs(cache):
        stored = 0
        for tensor in pair:
            logical += tensor.numel() * tensor.element_size()
            if not isinstance(tensor, SpectralTensor):
                stored += add(tensor, "dense")
                continue
            store = tensor.store
            stored += sum(add(buffer, PART[i]) for i, buffer in enumerate(store.buffers))
            stored += sum(add(x, "other") for x in (*store.timeline.tensors(), store.handle))
            stored += sum(add(x, "windows") for x in store.pending.values())
        layers.append(stored)
    total = sum(layers)
    assert len(PART) == len(Buffers._fields)
    return MemoryStats(logical, total, logical / total if total else 1.0, parts, tuple(layers))


def _pairs(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers = getattr(cache, "layers", cache)
    pairs = [(layer.keys, layer.values) if hasattr(layer, "keys") else tuple(layer) for layer in layers]
    return [(k, v) for k, v in pairs if isinstance(k, torch.Tensor)]
