"""What a graph writes to, whichever view of it is named: tensors are the same memory where their fakes are."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node

from spectral_compile.passes.trace import call_name, fake

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")


def changes_in_place(node: Node) -> bool:
    """Whether ``node`` writes to its first argument, as PyTorch names what does."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return False
    name = call_name(node)
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def memory(node: Node) -> int | None:
    """What tells the memory that ``node`` is a view of from any other, if it is a tensor."""
    value = fake(node)
    return value.untyped_storage()._cdata if isinstance(value, FakeTensor) else None


def writes(graph: Graph) -> dict[int | None, list[Node]]:
    """The nodes that write, in order, by the memory that they write to."""
    found: dict[int | None, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for place in {memory(target) for target in _targets(node)} - {None}:
            found[place].append(node)
    return found


def _targets(node: Node) -> list[Node]:
    """What ``node`` writes to; of an operation that says nothing of it, whatever it is given."""
    if node.op not in ("call_function", "call_method"):
        return []
    if changes_in_place(node):
        return [node.args[0]]
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
        changed = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return [x for some in changed for x in (some if isinstance(some, (list, tuple)) else [some]) if isinstance(x, Node)]
    silent = isinstance(node.target, torch._ops.HigherOrderOperator) or node.kwargs.get("inplace")
    if silent or call_name(node).endswith("_"):  # as _foreach_add_, which is given a list
        return node.all_input_nodes
    return [node.kwargs["out"]] if isinstance(node.kwargs.get("out"), Node) else []
