"""``spectral::append_``: a chunk of keys and values enters one layer's store, coded where the window is full."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels import reference
from spectral_compile.kernels.buffers import Buffers

listeners: list[Callable[[], None]] = []  # told of each layer that a prefill has stored: how else to see how far one call is


@torch.library.custom_op("spectral::append_", mutates_args=Buffers._fields)
def append_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    o_weight: torch.Tensor | None,
    k_codes: torch.Tensor,
    v_codes: torch.Tensor,
    v_norms: torch.Tensor,
    k_basis: torch.Tensor,
    v_basis: torch.Tensor,
    k_affine: torch.Tensor,
    v_affine: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    starts: torch.Tensor,
    moment: torch.Tensor,
    layout: str,
) -> None:
    """See ``reference.append``; ``layout`` is ``Layout.spec()``."""
    buffers = Buffers(k_codes, v_codes, v_norms, k_basis, v_basis, k_affine, v_affine, k_exact, v_exact, starts, moment)
    reference.append(query, key, value, ledger, valid, o_weight, buffers, Layout.parse(layout))
    for listener in listeners:
        listener()


@append_.register_fake
def _(query, key, value, ledger, valid, o_weight, *rest) -> None:
    return None
