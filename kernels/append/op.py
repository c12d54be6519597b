"""``spectral::append_``: a chunk of keys and values enters one layer's store, which codes what is not recent."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels import padding
from spectral_compile.kernels.append import reference
from spectral_compile.kernels.append.later import judged, kept
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


def _fake(*given) -> None:
    return None


@operation(_fake, mutates=Buffers._fields)
@without_autocast
def append_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    seen: torch.Tensor | None,
    scale: float,
    number: int,
    buffers: Buffers,
    layout: Layout,
) -> None:
    """See ``reference.append``. Tokens of a prompt are weighed by the attention that they get if ``seen`` is there, its keys as
    attention sees them; ``scale`` is that of scores. Store ``number`` of a graph may be written to later: ``later.keeping``."""
    chunk = Chunk(query, key, value, padding.asked(valid))
    by = judged(chunk, ledger, layout, seen, scale)
    if kept(chunk, ledger, buffers.moment, number, layout, by):
        return
    append(chunk, ledger, buffers, layout, None if by is None else by.token_weights(chunk.valid, layout))
