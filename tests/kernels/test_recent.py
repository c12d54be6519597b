"""Recent tokens in bytes, attended to in a warp's registers, beside the form that takes them with all else that is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral_compile.kernels.attend.latent import plan as latent
from spectral_compile.kernels.values import Chunk
from tests.kernels.test_latent import DTYPES, assert_near, hiding, in_half, planned
from tests.stores import filled

__all__ = ["planned"]

# of each the preset, head_dim, new tokens, programs that take what is exact, and what else ``filled`` is told
STORES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "programs of their own": ("balanced", 64, 1, 3, {"head_group": 1}),
    "several times sixteen a warp": ("compact", 64, 1, 1, {"head_group": 1, "recent": 90}),
    "interleaved": ("compact", 64, 2, 1, {"head_group": 1, "interleaved": True}),
    "partial RoPE": ("compact", 96, 1, 2, {"head_group": 1, "turned": 32}),
    "no RoPE": ("compact", 64, 1, 2, {"head_group": 1, "turned": 0}),
    "joint heads and rows": ("compact", 64, 1, 2, {"head_group": 2, "batch": 2}),
    "two quartets": ("compact", 64, 4, 2, {"head_group": 1}),
    "positions with gaps": ("compact", 64, 1, 2, {"head_group": 1, "ids": torch.arange(118) + torch.arange(118) // 20}),
}


@in_half
@pytest.mark.parametrize("name", STORES)
def test_they_are_as_near_as_rebuilt_keys(name: str, dtype: torch.dtype, planned: dict[str, int]) -> None:
    preset, dim, new, programs, how = STORES[name]
    store, step = filled(preset, dim, past=(170 if "recent" in how else 118) - new, new=new, recent_bits=8, **how)
    before, coded = store.ledger[0, :2].tolist()
    recent, places = before - store.layout.first_exact - coded, store.buffers.recent_slots(store.layout)
    assert coded % places + recent > places, "none of them stands before an older one"
    planned["exact_splits"] = programs
    assert_near(store, step, 0.1, dtype, planned)


@in_half
@pytest.mark.parametrize("hides", ["a window", "padding", "a mask"])
def test_the_same_ones_are_seen(hides: str, dtype: torch.dtype, planned: dict[str, int]) -> None:
    store, step = filled("compact", 64, past=115, new=3, head_group=1, recent_bits=8)
    assert_near(store, step, 0.1, dtype, planned, **hiding(hides, 118, window=40))


@pytest.mark.parametrize(("how", "apart"), [({"recent_bits": 8}, True), ({}, False), ({"recent_bits": 8, "turned": 20}, False)])
def test_what_does_not_come_in_eights_of_pairs_or_bytes_is_attended_to_as_exact(
    how: dict[str, Any], apart: bool, planned: dict[str, int]
) -> None:
    store, step = filled("compact", 64, past=117, new=1, head_group=1, **how)
    found = latent.plan_of(store.past, Chunk(step.query.half(), step.key, step.value), 4, 3)
    assert found is not None and (found.recent is not None) == apart
    if not apart:
        assert_near(store, step, 0.1, DTYPES[0], planned)
