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
        kind = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
