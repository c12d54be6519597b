"""What a cache really holds, summed over the storages of its live tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from spectral_compile.kernels.buffers import PART
from spectral_compile.outputs import cache_of
from spectral_compile.tensor import SpectralTensor, store_of


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of a cache.

    ``logical_bytes`` is what dense keys and values of this shape and dtype take, and states as they are; ``stored_bytes`` is
    what is really allocated for them; ``ratio`` is the first over the second. ``parts`` splits the stored bytes into codes,
    bases, scales, recent (first and recent tokens, which are not coded), dense, states and other; states are what layers hold
    whatever the number of tokens, such as those of linear attention and convolutions. ``layers`` holds the stored bytes of
    each layer; what layers share is counted with the first.
    """

    logical_bytes: int
    stored_bytes: int
    ratio: float
    parts: dict[str, int]
    layers: tuple[int, ...]


def memory_stats(cache: Any) -> MemoryStats:
    """The ``MemoryStats`` of a transformers cache, compressed or not, of a sequence of (keys, values), or of an output's cache.

    A layer of an encoder-decoder's cache is the decoder's own and what it keeps of the encoder, together. Every storage is
    counted once and whole, with its spare capacity. TypeError where there is no cache.
    """
    if isinstance(cache, Mapping):  # as outputs are
        cache = cache_of(cache)
    if cache is None:
        raise TypeError("there is no cache to measure: call the model with use_cache=True")
    parts = dict.fromkeys(("codes", "bases", "scales", "recent", "dense", "states", "other"), 0)
    seen: set[int] = set()
    logical, layers = 0, []

    def add(tensor: torch.Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage._cdata in seen:
            return 0
        seen.add(storage._cdata)
        parts[part] += storage.nbytes()
        return storage.nbytes()

    for pair, states, rest in _layers(cache):
        stored = sum(add(x, "states") for x in states) + sum(add(x, "other") for x in rest)
        for tensor in (*pair, *states, *rest):
            logical += tensor.numel() * tensor.element_size()
        for tensor in pair:
            if not isinstance(tensor, SpectralTensor):
                stored += add(tensor, "dense")
                continue
            store = store_of(tensor)
            stored += sum(add(buffer, PART[name]) for name, buffer in store.buffers._asdict().items())
            stored += sum(add(x, "other") for x in (*store.timeline.tensors(), store.handle))
            stored += sum(add(x, "recent") for x in store.pending.values())
        layers.append(stored)
    total = sum(layers)
    return MemoryStats(logical, total, logical / total if total else 1.0, parts, tuple(layers))


def tensors(*roots: Any) -> Iterator[torch.Tensor]:
    """All plain tensors within nested containers and tensor subclasses."""
    for x in roots:
        if isinstance(x, Mapping):
            yield from tensors(*x.values())
        elif isinstance(x, (list, tuple)):
            yield from tensors(*x)
        elif hasattr(x, "__tensor_flatten__"):
            yield from tensors(*(getattr(x, name) for name in x.__tensor_flatten__()[0]))
        elif isinstance(x, torch.Tensor):
            yield x


def storage_bytes(*roots: Any) -> int:
    """Bytes of all tensors within nested containers and tensor subclasses, every storage once and whole."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors(*roots)}
    return sum(storages.values())


_Held = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def _layers(cache: Any) -> list[_Held]:
    """What each layer holds: keys and values, states of constant size, and the rest, such as the keys of an indexer."""
    if hasattr(cache, "cross_attention_cache"):
        nothing: _Held = ([], [], [])
        both = zip_longest(_layers(cache.self_attention_cache), _layers(cache.cross_attention_cache), fillvalue=nothing)
        return [(own[0] + cross[0], own[1] + cross[1], own[2] + cross[2]) for own, cross in both]
    found: list[_Held] = []
    linear = getattr(cache, "linear_cache", [])  # MiniMax keeps states beside its layers
    for i, layer in enumerate(getattr(cache, "layers", cache)):
        held = dict(zip(("keys", "values"), layer, strict=False)) if isinstance(layer, (list, tuple)) else dict(vars(layer))
        pair = [x for name in ("keys", "values") if isinstance(x := held.pop(name, None), torch.Tensor)]
        states = list(tensors(held.pop("conv_states", None), held.pop("recurrent_states", None), linear[i : i + 1]))
        found.append((pair, states, list(tensors(held))))
    return found
