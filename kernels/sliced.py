"""``spectral::sliced``: what is computed token by token is computed for a slice of the tokens at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from spectral_compile.kernels.operation import operation

ROWS = 2048  # tokens in a slice at most: enough to fill a GPU, and few enough that what lies between hardly counts


class CompiledPart:
    """A part as it runs, which the graphs that it was cut from keep alive."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run


PARTS: weakref.WeakValueDictionary[str, CompiledPart] = weakref.WeakValueDictionary()  # by what they compute


def _fake(x, weights, part, width, dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)


@operation(_fake)
def sliced(x: torch.Tensor, weights: list[torch.Tensor], part: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    """What ``PARTS[part]`` runs, of [..., C] and the weights, as [..., width] in ``dtype``; up to twice ``ROWS`` in one piece.

    A part takes contiguous [1, n, C] with n of two and more and returns a tuple of one [1, n, width].
    """
    tokens = x.reshape(1, -1, x.shape[-1])
    if tokens.shape[1] <= 2 * ROWS:  # a short prompt waits for the host, which a slice costs as much as some layers' kernels
        whole = PARTS[part].run(tokens.contiguous(), *weights)[0]
        return whole.to(dtype, memory_format=torch.contiguous_format).view(*x.shape[:-1], width)
    out = x.new_empty((1, tokens.shape[1], width), dtype=dtype)
    count = -(-tokens.shape[1] // ROWS)
    for given, place in zip(tokens.tensor_split(count, 1), out.tensor_split(count, 1), strict=True):
        place.copy_(PARTS[part].run(given.contiguous(), *weights)[0])
    return out.view(*x.shape[:-1], width)
