"""``spectral::append_``: a chunk of keys and values enters one layer's store, coded where the window is full."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels import reference
from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import on_host
from spectral_compile.kernels.operation import operation


@without_autocast
def append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
) -> None:
    """See ``reference.append``; on a GPU it is ``append_triton``."""
    run = append_triton if key.is_cuda else reference.append
    run(query, key, value, ledger, valid, token_weight, buffers, layout)


def append_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
) -> None:
    """``reference.append`` in Triton. One column is one launch that waits for nothing; more columns, or none, may wait."""
    from spectral_compile.kernels.encode import Tokens, tiles_of  # Triton is there only where a GPU is
    from spectral_compile.kernels.fit import fit

    tokens = Tokens(query, key, value, ledger, valid, buffers, layout)
    if tokens.count == 1:
        tokens.write(tiles_of(layout.block), keep=True)
        return
    if tokens.count:
        tokens.add_moment()
    books = on_host(ledger)
    if not layout.lossless:
        fit(tokens, books, token_weight)
    # coding reads the places in the window that new tokens are then written to
    tokens.write(tiles_of(max(coded_after - coded for _, coded, _, coded_after, *_ in books)), keep=False)
    if tokens.count:
        tokens.write(0, keep=True)


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
) -> None:
    """See ``reference.append``; ``layout`` is ``Layout.spec()``."""
    coded = k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine
    buffers = Buffers(*coded, k_exact, v_exact, k_recent, v_recent, k_sizes, v_sizes, starts, moment)
    append(query, key, value, ledger, valid, token_weight, buffers, Layout.parse(layout))
