"""What the passes tell the runtime: which stores a rewritten graph runs on, and what each input and output of it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from spectral_compile.codec.layout import Layout


@dataclass(frozen=True)
class SitePlan:
    """One store, for a matched attention site or for several that read the same keys and values.

    ``past`` holds the indices of the arguments of Dynamo's graph that are its keys and its values so far, and is None in a
    prefill. ``slots`` is the number of columns that a static cache has room for, and None for a growing one.
    """

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    past: tuple[int, int] | None
    slots: int | None = None


@dataclass(frozen=True)
class Plan:
    """How the runtime feeds a rewritten graph and what it makes of the results.

    ``inputs`` names each input of the new graph: ("argument", i), ("ledger",), ("positions",), ("valid",), ("columns",),
    ("visible",), ("buffer", site, field), and after clean-up ("dense", i), ("shape", i) or ("number", i). ``outputs`` names
    each output of the old one: ("result", i) or ("key" | "value", site). ``padding`` is the argument that holds the 2-D mask;
    ``masked`` says that some mask is none that the store could know by itself. ``batch`` and ``count``, the columns of a step,
    are integers, or symbolic where they vary. ``fingerprint`` is the model's.
    """

    kind: str
    sites: tuple[SitePlan, ...]
    inputs: dict[Node, tuple[Any, ...]]
    outputs: tuple[tuple[Any, ...], ...]
    padding: int | None
    masked: bool
    batch: int | torch.SymInt
    count: int | torch.SymInt
    fingerprint: str | None = None
