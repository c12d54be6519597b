"""Which stored tokens a step's attention mask hides: rows that ended early, or a turn that is taken back."""

from __future__ import annotations

import torch

HIDES, REVEALS = 1, 2  # of a row: a stored token is hidden; a column is shown of which nothing was stored


def hide(visible: torch.Tensor, flags: torch.Tensor, columns: torch.Tensor, shown: torch.Tensor) -> None:
    """Write to uint8 ``visible`` [B, slots] whether each stored token is shown, and to int32 ``flags`` [B] what that comes to.

    ``columns`` bool [B, N] says which columns are stored tokens, ``shown`` [B, n] with n <= N, of any integer dtype, what the
    mask of this step says of the first n of them: 0 hides. The last slot is scratch. Nothing waits for the device.
    """
    if visible.is_cuda:
        from spectral_compile.kernels.advance import kernel  # Triton is there only where a GPU is

        kernel.hide(visible, flags, columns, shown)
        return
    columns, shown = columns[:, : shown.shape[1]], shown != 0
    visible.scatter_(1, torch.where(columns, columns.cumsum(1) - 1, visible.shape[1] - 1), shown.to(torch.uint8))
    flags.copy_(HIDES * (columns & ~shown).any(1) + REVEALS * (shown & ~columns).any(1))
