"""``spectral::attend_``: a chunk attends to one layer's compressed past and to itself, then enters the store."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append.op import append
from spectral_compile.kernels.attend import extend, reference
from spectral_compile.kernels.attend.native import attend as native
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.operation import operation
from spectral_compile.kernels.values import Chunk, Hidden, Past, Scoring


def _fake(query, *rest) -> torch.Tensor:
    batch, heads, count, dim = query.shape
    return query.new_empty(batch, count, heads, dim).transpose(1, 2)


@operation(_fake, mutates=Buffers._fields)
def attend_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    columns: torch.Tensor | None,
    ledger: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
    scale: float,
    sliding_window: int,
    softcap: float,
    sink_score: torch.Tensor | None,
    visible: torch.Tensor | None = None,
    enters: bool = True,
) -> torch.Tensor:
    """See ``reference.attend`` and ``reference.append``.

    One call a layer, instead of one to attend and one to append, keeps the host's share of a decode step small. Where the chunk
    does not enter the store, a later layer's call, which shares it, sees to that.
    """
    chunk, past = Chunk(query, key, value, valid), Past(ledger, positions, buffers, layout)
    hidden, scoring = Hidden(mask, columns, visible), Scoring(scale, sliding_window, softcap, sink_score)
    if extend.takes(query, hidden, scoring):
        out = extend.attend(chunk, past, scoring.scale, visible)
    elif native.takes(chunk, layout):
        out = native.attend(chunk, past, scoring, hidden)
    elif not query.is_cuda:
        out = reference.attend(chunk, past, scoring, hidden)
    else:
        from spectral_compile.kernels.attend.kernel import attend  # Triton is there only where a GPU is

        if chunk.columns == 1:
            return attend(chunk, past, scoring, hidden, enters=enters)
        out = attend(chunk, past, scoring, hidden)
    if enters:
        append(chunk, ledger, buffers, layout)
    return out
