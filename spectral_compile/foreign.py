"""``spectral::decoded``: what a compressed tensor becomes in a graph of another compiler, which sees its handle alone.

AOTAutograd, and so Inductor and most others, takes a tensor subclass apart into its inner tensors while it compiles. What it
then asks the subclass to compute stands in the graph as this operation on the handle, and finds the store when the graph runs.
"""

from __future__ import annotations

import weakref

import torch

from spectral_compile.kernels.operation import operation
from spectral_compile.report import count_decode


def remember(handle: torch.Tensor, store: object) -> None:
    """Let ``decoded`` find the ``store`` by its handle, as long as it lives."""
    handle.spectral_store = weakref.ref(store)  # type: ignore[attr-defined]  # tensors take any attribute, unlike their stub


def _fake(handle, role, size, dtype, strict) -> torch.Tensor:
    return handle.new_empty(size, dtype=dtype)


@operation(_fake, tags=(torch.Tag.cudagraph_unsafe,))
def decoded(handle: torch.Tensor, role: str, size: list[int], dtype: torch.dtype, strict: bool) -> torch.Tensor:
    """The ``role``, key or value, of the handle's store as a dense tensor of ``size`` [B, H, T, D], which is counted.

    RuntimeError where ``strict``, and where the handle is another tensor than the store's own, whose values would be unknown.
    """
    store = getattr(handle, "spectral_store", lambda: None)()
    if store is None:
        raise RuntimeError(
            "a graph of another compiler holds a compressed cache that it copied or made itself: compile the model, and"
            ' whatever calls it, with backend="spectral", or give that graph the cache\'s keys.dense() and values.dense()'
        )
    count_decode('a graph of another compiler than backend="spectral"', strict)
    return store.dense(role, size[2])
