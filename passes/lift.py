"""Run some nodes of a traced graph on real tensors, to learn what it computes.

What it reads off the process, such as the frequencies of RoPE, is true of this graph only for as long as nobody changes it:
``constants.py`` has Dynamo ask for another graph then. What the graph itself changes is read by no piece of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from spectral_compile.passes.constants import CONSTANT, constant, name_of
from spectral_compile.passes.trace import begins_or_ends_vmap, fake
from spectral_compile.passes.writes import memory, writes

_HALF = (torch.float16, torch.bfloat16)
_DEVICE = re.compile(r"(cuda|xpu|mps|hpu|npu)(:\d+)?")


class Unliftable(Exception):
    """The piece depends on something that has no value yet."""


def real_value(node: Node) -> Any:
    """The value that a leaf had when the graph was traced: a placeholder's tensor, which is noted as a constant, or a size."""
    if is_size(node):
        return hint(fake(node))
    if CONSTANT not in node.meta:
        argument = node.meta.get("grapharg")
        if argument is None or not isinstance(argument.example, torch.Tensor):
            raise Unliftable(f"{node.name} has no value while tracing")
        if not belongs_to_model(node):
            raise Unliftable(f"they depend on an argument of the call, {name_of(node)}")
        if (value := constant(argument.example)) is None:
            raise Unliftable(f"{name_of(node)} has changed between calls")
        node.meta[CONSTANT] = value
    return node.meta[CONSTANT]


def belongs_to_model(node: Node) -> bool:
    """Whether a placeholder is a parameter or a buffer, by Dynamo's word, and no argument of the call."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def is_size(node: Node) -> bool:
    """Whether ``node`` is a size: an int of the graph, or what it reads off a tensor's shape."""
    value = fake(node)
    if not isinstance(value, (int, torch.SymInt, torch.Size)):
        return False
    return node.op == "placeholder" or any(isinstance(fake(parent), torch.Tensor) for parent in node.all_input_nodes)


def hint(size: Any) -> Any:
    """The size, or the shape, that a symbolic one was when the graph was traced."""
    if isinstance(size, torch.Size):
        return torch.Size(map(hint, size))
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def free_symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def symbol_hints(gm: GraphModule) -> dict[Any, int]:
    """The value of every symbol that stands alone as a size among the graph's inputs."""
    hints = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = fake(node)
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    hints[size.node.expr] = hint(size)
    return hints


def evaluate(size: Any, symbols: dict[Any, int]) -> Any:
    """A symbolic size, or shape, under other values of its symbols."""
    if isinstance(size, torch.Size):
        return torch.Size(evaluate(n, symbols) for n in size)
    return int(size.node.expr.xreplace(symbols)) if isinstance(size, torch.SymInt) else int(size)


def _order(graph: Graph, inputs: list[Node], output: Node, written: dict[int | None, list[Node]]) -> list[Node]:
    """What has to be run for ``output`` where ``inputs`` are given, in the order of the graph."""

    def writes_to(node: Node) -> list[Node]:
        return [write for write in written.get(memory(node), ()) if write < output]

    order, stack = [], [output, *filter(begins_or_ends_vmap, graph.nodes)]
    stack += [write for at in inputs for write in writes_to(at) if at < write]
    seen = set(inputs)
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        order.append(at)
        if not is_size(at):
            stack += [*at.all_input_nodes, *writes_to(at)]
    return sorted(order)


class _Run(Interpreter):
    """Evaluates some nodes of a graph, in float32 where the model computes in half precision."""

    def __init__(
        self,
        gm: GraphModule,
        values: Callable[[Node], Any],
        numbers: dict[int, int],
        written: dict[int | None, list[Node]],
        device: torch.device | None,
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values, self.numbers, self.written, self.device = values, numbers, written, device

    def evaluate(self, order: list[Node], known: dict[Node, Any]) -> None:
        """Fill ``env`` with the values of ``order``, given those that are ``known``."""
        self.env = dict(known)
        for at in order:
            self.env[at] = self._leaf(at) if at.op == "placeholder" or is_size(at) else self.run_node(at)

    def _leaf(self, node: Node) -> Any:
        if memory(node) in self.written:
            raise Unliftable(f"the model changes {name_of(node)} while it runs")
        return self._own(self.values(node))

    def get_attr(self, target: str, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._own(value.clone()) if isinstance(value, torch.Tensor) else value  # the piece may write to it

    def _own(self, value: Any) -> Any:
        return value.to(self.device) if self.device is not None and isinstance(value, torch.Tensor) else value

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tree_map(self._other, args), tree_map(self._other, kwargs)

    def _other(self, x: Any) -> Any:
        if isinstance(x, torch.dtype) and x in _HALF:
            return torch.float32
        if self.device is not None and (isinstance(x, torch.device) or (isinstance(x, str) and _DEVICE.fullmatch(x))):
            return self.device
        return self.numbers.get(x, x) if type(x) is int else x


def lift(
    gm: GraphModule,
    inputs: list[Node],
    output: Node,
    values: Callable[[Node], Any] = real_value,
    numbers: dict[int, int] | None = None,
    device: torch.device | None = None,
    written: dict[int | None, list[Node]] | None = None,
) -> Callable[..., torch.Tensor]:
    """The function from ``inputs`` to ``output`` that the graph computes.

    Placeholders that are no input take what ``values`` gives for them: by default what they had while tracing. ``numbers``
    stand in for constants of the graph, such as sizes, ``device`` for that of every tensor, and ``written`` are the ``writes``
    of the graph, for whoever knows them. The function raises ``Unliftable``, or whatever the operations raise.
    """
    written = writes(gm.graph) if written is None else written
    order = _order(gm.graph, inputs, output, written)
    runner = _Run(gm, values, numbers or {}, written, device)

    def run(*given: Any) -> torch.Tensor:
        level = _vmaps()
        try:
            with torch.no_grad():
                runner.evaluate(order, dict(zip(inputs, given, strict=True)))
                return runner.env[output]
        finally:
            runner.env = {}
            while _vmaps() > level:  # what failed in a vmap has not ended it
                torch._C._functorch._vmap_decrement_nesting()

    return run


def _vmaps() -> int:
    return torch._C._functorch.maybe_current_level() or 0


def placeholders_of(node: Node) -> set[Node]:
    """The placeholders whose values, not only sizes, ``node`` is computed from."""
    return {at for at in computed_from(node) if at.op in ("placeholder", "get_attr")}


def arguments_of(node: Node) -> set[Node]:
    """The arguments of the call, and no parameters or buffers, whose values ``node`` is computed from."""
    return {at for at in placeholders_of(node) if at.op == "placeholder" and not is_size(at) and not belongs_to_model(at)}


def numbers_in(node: Node) -> set[float]:
    """The constants among what ``node`` is computed from, sizes left out where they are read off a tensor."""
    found: set[float] = set()
    for at in computed_from(node):
        if not is_size(at):
            tree_map(lambda x: found.add(x) if type(x) in (int, float) else None, (at.args, at.kwargs))
    return found


def computed_from(node: Node) -> set[Node]:
    """``node`` and the nodes whose values, not only sizes, it is computed from."""
    seen, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at not in seen:
            seen.add(at)
            stack.extend(() if is_size(at) else at.all_input_nodes)
    return seen
