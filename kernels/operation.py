"""Registers the operations that stand in graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.buffers import Buffers

_LIBRARY = torch.library.Library("spectral", "FRAGMENT")


def operation(
    fake: Callable[..., Any], mutates: Iterable[str] = (), tags: Iterable[torch.Tag] = (), name: str | None = None
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Make a function ``torch.ops.spectral.<name>``, its own by default, which writes to the arguments that ``mutates`` names.

    ``fake`` gives the shapes of what it returns. A parameter of type ``Buffers`` is a tensor for each buffer in the operation's
    schema, and a ``Layout`` is its ``spec()``. To a compiler this is ``torch.library.custom_op``; that one runs Python of its
    own at each call, which with as many arguments as a store has buffers takes longer than a small layer (torch 2.13: 0.15 ms).
    """

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        called, flat = name or function.__name__, flattened(function)
        schema = torch.library.infer_schema(flat, mutates_args=tuple(mutates))
        _LIBRARY.define(called + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(called, flat, "CompositeExplicitAutograd")
        torch.library.register_fake(f"spectral::{called}", fake, lib=_LIBRARY)
        return getattr(torch.ops.spectral, called).default

    return register


def flattened(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the types of which an operation's schema can be made."""
    signature = inspect.signature(function, eval_str=True)
    order = list(signature.parameters)
    types = [parameter.annotation for parameter in signature.parameters.values()]
    at = types.index(Buffers) if Buffers in types else len(types)
    layout = types.index(Layout) if Layout in types else None
    if layout is not None and layout < at < len(types):
        raise TypeError(f"the layout of {function.__name__} must follow its buffers")

    def flat(*args: Any) -> Any:
        given = list(args)
        if at < len(types):
            given[at : at + len(Buffers._fields)] = [Buffers(*given[at : at + len(Buffers._fields)])]
        if layout is not None:
            given[layout] = Layout.parse(given[layout])
        return function(*given)

    def parameters() -> Iterator[inspect.Parameter]:
        for name, kind in zip(order, types, strict=True):
            parameter = signature.parameters[name]
            if kind is Buffers:
                yield from (parameter.replace(name=field, annotation=torch.Tensor) for field in Buffers._fields)
            else:
                yield parameter.replace(annotation=str if kind is Layout else kind)

    flat.__name__, flat.__doc__ = function.__name__, function.__doc__
    flat.__signature__ = signature.replace(parameters=list(parameters()))  # type: ignore[attr-defined] # as inspect documents it
    return flat
