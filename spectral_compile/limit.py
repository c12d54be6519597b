"""Dynamo's limit on graphs: of this backend's functions it counts those that the safety cap counts, and who meets it is told.

Past ``torch._dynamo.config.recompile_limit`` graphs of one function, 8 by default, Dynamo runs that function as it came and
asks no backend again. All models of transformers share one function since 5.24, and one conversation of two turns takes three
graphs or more. Just before Dynamo looks at its limits it asks the hooks of ``register_hook_for_recompile_user_context`` for a
remark, which is where this backend raises the first limit to the second, ``accumulated_recompile_limit``, for its functions.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

import torch

from spectral_compile import report
from spectral_compile.asked import innermost
from spectral_compile.config import SpectralConfig
from spectral_compile.report import GraphReport, Refusal, SpectralWarning

_usual: int | None = None  # the limit of other backends, while it is raised
# what a function was compiled by, for each function that was reported to run densely; held, so that no other gets its ``id``
_reported: dict[tuple[int, int], Any] = {}


def watch(backend: Any) -> None:
    """See to it that functions compiled by ``backend`` are counted by the safety cap alone, and runs past it are told of.

    Whoever asks for the backend calls this: to import Dynamo, which knows the hooks, takes seconds.
    """
    hooks = torch._dynamo.utils.get_hook_for_recompile_user_context() or ()
    if not any(isinstance(hook, _Hook) for hook in hooks):
        torch._dynamo.utils.register_hook_for_recompile_user_context(_Hook(backend))


def restore() -> None:
    """Give other backends their limit back: Dynamo has looked at it."""
    global _usual
    if _usual is not None:
        torch._dynamo.config.recompile_limit, _usual = _usual, None


def clear() -> None:
    """Report anew what has been reported."""
    _reported.clear()


class _Hook:
    """What Dynamo calls before it looks at its limits."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __call__(self) -> str:
        restore()
        attempt = _attempt(sys._getframe())
        if attempt is None:
            return ""
        asked = innermost(attempt["compiler_fn"])
        if getattr(asked, "compiler_fn", asked) is not self.backend:
            return ""
        _raise()
        exceeded, name = torch._dynamo.cache_size.exceeds_recompile_limit(attempt["cache_size"], attempt["compile_id"])
        if exceeded:
            limit = f"torch._dynamo.config.{name} = {getattr(torch._dynamo.config, name)}"
            _tell(asked, attempt["compile_id"].frame_id, limit)
        return "spectral"


def _attempt(frame: FrameType | None) -> dict[str, Any] | None:
    """What Dynamo knows of the function that it is about to compile: the variables of its own ``_compile``."""
    while frame is not None:
        known = frame.f_locals
        if {"compiler_fn", "cache_size", "compile_id"} <= known.keys():
            return known
        frame = frame.f_back
    return None


def _raise() -> None:
    global _usual
    config = torch._dynamo.config
    if config.recompile_limit < config.accumulated_recompile_limit:
        _usual = config.recompile_limit
        config.recompile_limit = config.accumulated_recompile_limit


def _tell(asked: Any, function: int, limit: str) -> None:
    """Report and warn that a call runs densely, and make Dynamo run it so; RuntimeError where the options are strict.

    Past its limit Dynamo would skip the function for good, without asking the hooks again, so that other models which share
    the function would be neither reported nor warned of. The exception raised here skips this one call.
    """
    reason = (
        f"Dynamo has compiled this function too often ({limit}), so this call runs densely: raise that limit, or call"
        " spectral_compile.reset() to forget graphs that are no longer needed"
    )
    if SpectralConfig.parse(getattr(asked, "kwargs", {}).get("options")).strict:
        raise RuntimeError(f"strict: {reason}")
    if (function, id(asked)) not in _reported:
        _reported[function, id(asked)] = asked
        report.record(GraphReport("other", 0, 0, (Refusal("graph", reason),)))
        warnings.warn(f"nothing in this call was compressed; {reason}", SpectralWarning, stacklevel=2)
    restore()
    stop = torch._dynamo.exc.Unsupported(reason)
    types = torch._dynamo.types
    stop.frame_exec_strategy = types.FrameExecStrategy(types.FrameAction.DEFAULT, types.FrameAction.SKIP)
    raise stop
