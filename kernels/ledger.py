"""The ledger: what a store's rows hold, counted on the device, and as the host knows it without a wait a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class LedgerRow(NamedTuple):
    """The columns of a ledger, int64 [B, 6], in order: integers of one row (``rows_of``), or int64 [B] (``columns_of``)."""

    before: Any  # tokens before this step
    coded: Any  # of these, coded ones
    after: Any  # tokens after this step
    coded_after: Any
    waiting: Any  # 1 while the row has too few tokens to compute a basis from
    gaps: Any  # tokens whose position is not one more than that of the token before


COLUMNS = len(LedgerRow._fields)
_read: dict[int, list[LedgerRow]] = {}  # ledgers by address as this step left them, which all layers read


def columns_of(ledger: torch.Tensor) -> LedgerRow:
    """The columns of a ledger, views [B] of it."""
    return LedgerRow(*ledger.unbind(1))


def rows_of(ledger: torch.Tensor) -> list[LedgerRow]:
    """The rows of a ledger; on a GPU the host waits for them."""
    return [LedgerRow(*row) for row in ledger.tolist()]


def first(rows: list[LedgerRow]) -> bool:
    """Whether no row held a token before this step."""
    return all(row.before == 0 for row in rows)


def on_host(ledger: torch.Tensor) -> list[LedgerRow]:
    """The rows of a ledger; on a GPU the first layer of a step waits for them."""
    if not ledger.is_cuda:
        return rows_of(ledger)
    key = ledger.data_ptr()
    if key not in _read:
        _read[key] = rows_of(ledger)
    return _read[key]


def forget() -> None:
    """A step begins, and what ``on_host`` has read no longer holds."""
    _read.clear()
