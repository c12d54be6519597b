"""``spectral::attend_``: a chunk attends to one layer's compressed past and to itself, then enters the store."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels import extend, reference
from spectral_compile.kernels.append import append
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.operation import operation


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
    k_codes: torch.Tensor,
    v_codes: torch.Tensor,
    v_norms: torch.Tensor,
    k_basis: torch.Tensor,
    v_basis: torch.Tensor,
    k_affine: torch.Tensor,
    v_affine: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    k_recent: torch.Tensor,
    v_recent: torch.Tensor,
    k_sizes: torch.Tensor,
    v_sizes: torch.Tensor,
    starts: torch.Tensor,
    moment: torch.Tensor,
    layout: str,
    scale: float,
    sliding_window: int,
    softcap: float,
    sink_score: torch.Tensor | None,
    visible: torch.Tensor | None = None,
    enters: bool = True,
) -> torch.Tensor:
    """See ``reference.attend`` and ``reference.append``; ``layout`` is ``Layout.spec()``. One call a layer keeps the host's
    share of a decode step small. Where the chunk does not ``enter`` the store, a later layer's call, which shares it, sees to
    that."""
    coded = k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine
    buffers = Buffers(*coded, k_exact, v_exact, k_recent, v_recent, k_sizes, v_sizes, starts, moment)
    parsed = Layout.parse(layout)
    how = (parsed, scale, sliding_window, softcap, sink_score, visible)
    chunk = (query, key, value, mask, columns, ledger, positions, valid, buffers, *how)
    if extend.takes(query, mask, sliding_window, softcap, sink_score):
        out = extend.attend(query, key, value, ledger, positions, valid, buffers, parsed, scale, visible)
    elif not query.is_cuda:
        out = reference.attend(*chunk)
    else:
        from spectral_compile.kernels.fused import attend  # Triton is there only where a GPU is

        if query.shape[2] == 1:
            return attend(*chunk, enters=enters)
        out = attend(*chunk)
    if enters:
        append(query, key, value, ledger, valid, None, buffers, parsed)
    return out
