"""Bytes of a cache of any kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import Cache, DynamicCache

from spectral_compile.evaluation.simulated import SimulatedCache
from spectral_compile.kernels.ledger import columns_of
from spectral_compile.stats import memory_stats, storage_bytes
from spectral_compile.tensor import SpectralTensor, store_of


@dataclass(frozen=True)
class Size:
    """Bytes of a cache; ``coded_ratio`` is dense bytes of the coded tokens over bytes of codes, bases and scales alone."""

    stored_bytes: int
    parts: dict[str, int]
    coded_ratio: float | None = None

    def share(self, rows: int) -> Size:
        """The size of one row, where ``rows`` rows hold equally many tokens."""
        parts = {name: size // rows for name, size in self.parts.items()}
        return replace(self, stored_bytes=self.stored_bytes // rows, parts=parts)


def weigh(cache: Cache) -> Size:
    """The ``Size`` of a cache of any kind, summed over the storages of its live tensors."""
    if isinstance(cache, SimulatedCache):
        stored = round(cache.stored_bytes)
        return Size(stored, {"simulated": stored})
    keys = compressed_keys(cache)
    if not keys:
        stored = storage_bytes(*map(vars, cache.layers))
        return Size(stored, {"dense" if isinstance(cache, DynamicCache) else "quantised": stored})
    stats = memory_stats(cache)
    row_bytes = sum(2 * key.shape[1] * key.shape[3] * key.element_size() for key in keys)
    coded = int(columns_of(store_of(keys[0]).timeline.ledger).coded_after.sum())
    coded_bytes = sum(stats.parts[name] for name in ("codes", "bases", "scales"))
    return Size(stats.stored_bytes, stats.parts, coded * row_bytes / coded_bytes if coded else None)


def compressed_keys(cache: Cache) -> list[SpectralTensor]:
    """The keys of the layers that this backend has compressed."""
    return [keys for layer in cache.layers if isinstance(keys := getattr(layer, "keys", None), SpectralTensor)]
