"""What caches would take, computed without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.buffers import allocate

_STEP, _FINE, _LONGEST = 16, 8192, 2**20  # lengths that are tried, in tokens: each 16th up to 8192, then powers of two


def stored(layout: Layout, tokens: int, dtype: torch.dtype, headroom: int | None = None) -> tuple[int, int]:
    """Bytes of one layer for one text of ``tokens`` tokens: of a dense cache, and of the store that a prompt has filled.

    The store has room for ``headroom`` more tokens, None for as many as on a CPU.
    """
    timeline = Timeline(layout, 1, tokens, tokens, torch.device("meta"), headroom)  # which takes no memory
    buffers = allocate(layout, 1, timeline.capacity, dtype, "meta")
    return 2 * layout.kv_heads * layout.head_dim * tokens * dtype.itemsize, sum(buffer.nbytes for buffer in buffers)


def summed(layouts: Sequence[Layout], tokens: int, dtype: torch.dtype, headroom: int | None = None) -> tuple[int, int]:
    """The same of several layers together."""
    sizes = {layout: stored(layout, tokens, dtype, headroom) for layout in set(layouts)}
    dense, compressed = zip(*(sizes[layout] for layout in layouts), strict=True)
    return sum(dense), sum(compressed)


def pays_from(layouts: Sequence[Layout], dtype: torch.dtype, headroom: int | None = None) -> int | None:
    """The least number of tokens, to a multiple of 16, from which on the layers are smaller than dense; None where never.

    Bytes jump where a basis is computed, so lengths are tried from the longest one down.
    """
    powers = [2**i for i in range(_FINE.bit_length(), _LONGEST.bit_length())]
    least = None
    for tokens in (*reversed(powers), *range(_FINE, 0, -_STEP)):
        dense, compressed = summed(layouts, tokens, dtype, headroom)
        if compressed >= dense:
            break
        least = tokens
    return least


def when_it_pays(layouts: Sequence[Layout], dtype: torch.dtype, headroom: int | None = None) -> str:
    """From which length on the compressed cache is the smaller one, in a sentence."""
    least = pays_from(layouts, dtype, headroom)
    if least is None:
        return "With these options the cache is larger than a dense one at any length: choose another preset, such as balanced."
    if least <= _STEP:
        return "Compression pays at any length of the prompt."
    return f"Shorter prompts make the cache larger than a dense one: compression pays from about {least} tokens."
