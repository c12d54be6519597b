"""``spectral::advance_``: a step's new columns enter the ledger that all layers of a cache share."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.advance import reference
from spectral_compile.kernels.operation import operation


def advance(
    ledger: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    chunk: torch.Tensor,
    layout: Layout,
) -> None:
    """See ``reference.advance``; on a GPU it is one kernel."""
    if ledger.is_cuda:
        from spectral_compile.kernels.advance import kernel  # Triton is there only where a GPU is

        kernel.advance(ledger, positions, position_ids, valid, chunk, layout)
    else:
        reference.advance(ledger, positions, position_ids, valid, chunk, layout)


def _fake(ledger, positions, position_ids, valid, chunk, layout) -> None:
    return None


advance_ = operation(_fake, mutates=("ledger", "positions"), name="advance_")(advance)
