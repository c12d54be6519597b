"""How much is tried: in CI enough to meet every kind of bug, all of it with ``SPECTRAL_TESTS=full`` (``make test-full``)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

PROFILE = os.environ.get("SPECTRAL_TESTS", "repeatable")
FULL = PROFILE == "full"


def examples(few: int, full: int) -> int:
    """How many examples of a property are drawn: ``few`` in CI."""
    return full if FULL else few


def combinations(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All combinations; in CI as few as have each pair of values of any two parameters, or of two parameters each value."""
    rows = list(itertools.product(*map(range, map(len, values))))
    if not FULL:
        rows = covering(rows, min(2, len(values) - 1))
    return [tuple(x[i] for x, i in zip(values, row, strict=True)) for row in rows]


def covering(rows: list[tuple[int, ...]], strength: int) -> list[tuple[int, ...]]:
    """Some of the rows, in which every ``strength`` numbers occur together that do in all of them."""

    def groups(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), strength))

    chosen, missing = [], set().union(*map(groups, rows))
    while missing:
        chosen.append(max(rows, key=lambda row: len(groups(row) & missing)))
        missing -= groups(chosen[-1])
    return sorted(chosen)
