"""What was compiled with this backend and cannot reach it: wrappers whose ``generate`` runs the model within them.

``module.compile`` compiles the call of that module. ``generate`` of transformers calls the model that it belongs to; that of a
wrapper, such as PEFT's, hands everything on to the model within, whose call is not compiled.
"""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import torch


def misdirected() -> list[str]:
    """A sentence for each live module that was compiled with this backend and whose ``generate`` passes that call by."""
    compiled = [x for x in gc.get_objects() if issubclass(type(x), torch.nn.Module) and _by_us(x)]
    return [sentence for module in compiled if (sentence := passed_by(module)) is not None]


def being_compiled() -> torch.nn.Module | None:
    """The module whose ``compile`` is looking the backend up, if one is."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is torch.nn.Module.compile.__code__:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def passed_by(module: torch.nn.Module) -> str | None:
    """What to write instead where ``module.generate`` does not call ``module``; None where it does, or does not exist."""
    if not hasattr(type(module), "generate") or _generates(module):
        return None
    for path, inner in module.named_modules():
        if _generates(inner):
            if inner._compiled_call_impl is not None:
                return None
            name = type(module).__name__
            return (
                f"{name}.generate runs the {type(inner).__name__} within it, and {name}.compile compiles {name} alone,"
                f' so nothing is compressed: call model.get_submodule("{path}").compile(backend="spectral") and then'
                " model.generate()"
            )
    return None


def innermost(backend: Any) -> Any:
    """What the user asked for: ``torch.compile``'s own wrapper, which has the options, or the backend itself."""
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return backend


def _generates(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "GenerationMixin" for base in type(module).__mro__)


def _by_us(module: torch.nn.Module) -> bool:
    call = module.__dict__.get("_compiled_call_impl")
    if call is None or "callback" not in getattr(call, "__code__", _by_us.__code__).co_freevars:
        return False
    backend = innermost(call.__closure__[call.__code__.co_freevars.index("callback")].cell_contents)
    return getattr(getattr(backend, "compiler_fn", backend), "__module__", "").startswith("spectral_compile.")
