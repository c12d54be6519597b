"""Constants: what passes have read off the process holds for one graph, which Dynamo's guards keep to.

A frequency of RoPE that was read while tracing is built into a layout. When somebody writes other numbers to the buffer, or
another model comes that shares the code, the guard fails and Dynamo asks for another graph: with a layout of its own for a new
cache, and for a cache that is rotated in the old way one that runs densely.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import Guard, TracingContext
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from spectral_compile.passes.trace import Trace, fake

log = logging.getLogger(__name__)

CONSTANT = "spectral_constant"
PLANES = "spectral_planes"  # of an argument, which is then guarded to hold the same in each of its planes
_MOST = 2  # contents of one tensor that graphs are made for
_contents: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def constant(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of ``tensor``, the same for the same content; None where it changes so often that it is no constant."""
    known = _contents.setdefault(tensor, [])
    found = next((content for content in known if torch.equal(content, tensor)), None)
    if found is None and len(known) < _MOST:
        known.append(found := tensor.detach().clone())
    return found if found is not None and torch.equal(found, tensor) else None  # what is not a number equals nothing


def planes_equal(x: torch.Tensor) -> bool:
    """Whether positions in time, height and width [3 or 4, batch, tokens] are the same; waits for a GPU."""
    return x.ndim == 3 and bool((x == x[:1]).all())


def name_of(node: Node) -> str:
    """What the model calls the parameter or buffer, or the caller the argument, that is given for a placeholder."""
    return re.split(r"_(?:buffers|parameters)_|^l_(?:kwargs_)?", node.name)[-1].strip("_")


def guard_constants(trace: Trace) -> None:
    """Let Dynamo check at each call that what was read as a constant is still the same.

    Requires: ``CONSTANT`` and ``PLANES`` in the ``meta`` of the placeholders that earlier passes have read, and Dynamo's
    tracing context; without one there is nobody to guard for.
    Gives: a guard for each of them. Sites and the graph stay as they are.
    """
    if TracingContext.try_get() is None:
        return
    steps = {site.edge.kind for site in trace.sites if site.edge is not None} == {"decode"}
    for node in trace.gm.graph.nodes:
        if node.op == "placeholder" and PLANES in node.meta:
            _guard(node, planes_equal)
        if node.op == "placeholder" and CONSTANT in node.meta:
            _guard(node, _Holds(node.meta[CONSTANT], trusts=steps))


def _guard(node: Node, holds: Callable[[Any], bool]) -> None:
    """Let Dynamo ask whether the tensor of a placeholder ``holds`` what it did, at every call.

    From Python 3.12 on Dynamo takes a module's tensors for immutable, and skips their guards as long as the module's
    dictionaries are the same, unless a tensor is asked for an attribute too.
    """
    from torch._dynamo.guards import install_guard  # here, since Dynamo takes seconds to import
    from torch._dynamo.source import AttrSource

    log.debug("guarded: %s", name_of(node))
    dtype = fake(node).dtype
    install_guard(Guard(node._dynamo_source, functools.partial(_add, holds)))
    install_guard(Guard(AttrSource(node._dynamo_source, "dtype"), functools.partial(_add, lambda x: x is dtype)))


def _add(holds: Callable[[Any], bool], builder: Any, guard: Guard) -> None:
    said = [f"{guard.name} holds what was read while tracing"]
    builder.get_guard_manager(guard).add_lambda_guard(holds, said, guard.user_stack)


class _Holds:
    """Whether a tensor holds ``value``. To compare waits for a GPU, so on one a decode step ``trusts`` the tensor's version."""

    def __init__(self, value: torch.Tensor, trusts: bool) -> None:
        self.value, self.trusts = value, trusts and value.device.type != "cpu"
        self.last: tuple[Any, int, int] | None = None

    def __call__(self, x: Any) -> bool:
        value = self.value
        if not isinstance(x, torch.Tensor) or (x.shape, x.dtype, x.device) != (value.shape, value.dtype, value.device):
            return False
        if self.trusts and not x.is_inference():
            if self.last is not None and self.last[0]() is x and self.last[1:] == (x.data_ptr(), x._version):
                return True
            self.last = (weakref.ref(x), x.data_ptr(), x._version) if torch.equal(x, value) else None
            return self.last is not None
        return torch.equal(x, value)
