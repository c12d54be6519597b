"""Registers the operations that stand in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_LIBRARY = torch.library.Library("spectral", "FRAGMENT")


def operation(
    fake: Callable[..., Any], mutates: Iterable[str] = (), tags: Iterable[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Make a function ``torch.ops.spectral.<its name>``, which writes to the arguments that ``mutates`` names.

    ``fake`` gives the shapes of what it returns. To a compiler this is ``torch.library.custom_op``; that one runs Python of its
    own at each call, which with as many arguments as a store has buffers takes longer than a small layer (torch 2.13: 0.15 ms).
    """

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"spectral::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.spectral, name).default

    return register
