"""``spectral::append_``: a chunk of keys and values enters one layer's store, which codes what is not recent."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels import padding
from spectral_compile.kernels.append import reference
from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.operation import operation
from spectral_compile.kernels.values import Chunk


@without_autocast
def append(
    chunk: Chunk, ledger: torch.Tensor, buffers: Buffers, layout: Layout, token_weight: torch.Tensor | None = None
) -> None:
    """See ``reference.append``; on a GPU ``device.append`` does the same."""
    chunk = chunk._replace(valid=padding.asked(chunk.valid))
    if chunk.key.is_cuda:
        from spectral_compile.kernels.append import device  # Triton is there only where a GPU is

        device.append(chunk, ledger, buffers, layout, token_weight)
    else:
        reference.append(chunk, ledger, buffers, layout, token_weight)


def _fake(query, key, value, ledger, valid, token_weight, *rest) -> None:
    return None


@operation(_fake, mutates=Buffers._fields)
def append_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
) -> None:
    """See ``reference.append``."""
    append(Chunk(query, key, value, valid), ledger, buffers, layout, token_weight)
