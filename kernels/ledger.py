"""The ledger as the host knows it, without waiting for the GPU once a layer."""

from __future__ import annotations

import torch

_read: dict[int, list[list[int]]] = {}  # ledgers by address as this step left them, which all layers read


def on_host(ledger: torch.Tensor) -> list[list[int]]:
    """The rows of a ledger; on a GPU the first layer of a step waits for them."""
    if not ledger.is_cuda:
        return ledger.tolist()
    key = ledger.data_ptr()
    if key not in _read:
        _read[key] = ledger.tolist()
    return _read[key]


def forget() -> None:
    """A step begins, and what ``on_host`` has read no longer holds."""
    _read.clear()
