"""Which stored tokens a step's attention mask hides: rows that ended early, or a turn that is taken back."""

from __future__ import annotations

import torch

HIDES, REVEALS = 1, 2  # flags of a row: a stored token is hidden, and a column is shown of which nothing was stored


def hide(visible: torch.Tensor, columns: torch.Tensor, shown: torch.Tensor) -> None:
    """Write to uint8 ``visible`` [B, slots + 1] whether each stored token is shown, and flags of its row to the last place.

    ``columns`` bool [B, N] says which columns are stored tokens, ``shown`` [B, n] with n <= N, of any integer dtype, what the
    mask of this step says of the first n of them: 0 hides. Nothing waits for the device.
    """
    if visible.is_cuda:
        from spectral_compile.kernels.encode import hide_triton  # Triton is there only where a GPU is

        hide_triton(visible, columns, shown)
        return
    columns, shown = columns[:, : shown.shape[1]], shown != 0
    slots = visible.shape[1] - 1
    visible.scatter_(1, torch.where(columns, columns.cumsum(1) - 1, slots), shown.to(torch.uint8))
    visible[:, slots] = HIDES * (columns & ~shown).any(1) + REVEALS * (shown & ~columns).any(1)
