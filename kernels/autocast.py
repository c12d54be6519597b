"""What is computed does not depend on whether a program has turned autocast on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """``function`` with matrix products in the dtypes of what they multiply, on the device of its first tensor."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        kind = _first_tensor(args).device.type
        if not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def _first_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    """Of arguments, or of the values among them that hold tensors."""
    return next(x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(x, torch.Tensor))
