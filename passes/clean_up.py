"""Clean up: drop what nothing uses any more, inputs included, and give what is left of the old cache a dense value."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from spectral_compile.passes.trace import Trace, begins_or_ends_vmap, fake, fake_mode_of, is_call
from spectral_compile.passes.writes import changes_in_place
from spectral_compile.tensor import SpectralTensor, shape_of

log = logging.getLogger(__name__)

_ARITHMETIC = ("add", "iadd", "sub", "isub", "mul", "imul")
_OF_A_SHAPE = ("shape", "ndim", "dtype", "device")  # attributes that say nothing of values
_VIEWS = (
    *("view", "reshape", "flatten", "unflatten", "expand", "permute", "transpose", "unsqueeze", "squeeze", "getitem", "select"),
    *("narrow", "chunk", "split", "unbind", "detach", "to", "contiguous", "view_as", "expand_as"),
)


def clean_up(trace: Trace) -> None:
    """Leave a graph that lints, without lengths, handles or cache outputs.

    Requires: ``trace.plan``; without one the graph stays as it is.
    Gives: a graph of nodes that results or effects depend on alone, compiled anew, whose placeholders are the keys of
    ``trace.plan.inputs`` and have their values in ``trace.examples``. None of those is a compressed tensor: one that is still
    read has become a dense one or, where only its shape is read, one of a single element. Integers that a decode step only
    counts with have become tensors. If a decode step would read a dense copy of what is cached, all sites are refused and
    ``trace.plan`` is None; the graph is then not to be used.
    """
    if trace.plan is None:
        return
    graph = trace.gm.graph
    live, before = _live(graph), len(graph.nodes)
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)
    inputs = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if not node.users:
            graph.erase_node(node)
            continue
        inputs[node] = trace.plan.inputs[node]
        if isinstance(fake(node), SpectralTensor):
            inputs[node] = ("shape" if is_asked_for_its_shape(node) else "dense", inputs[node][1])
            if trace.kind == "decode" and inputs[node][0] == "dense" and _is_past(trace, inputs[node][1]):
                _refuse_all(trace)
                return
            trace.examples[node] = stand_in(node)
        elif trace.kind == "decode" and isinstance(fake(node), torch.SymInt) and _counts(node):
            inputs[node] = ("number", inputs[node][1])
            trace.examples[node] = node.meta["example_value"] = _number(trace)
    log.debug("%d of %d nodes and %d of %d inputs are left", len(graph.nodes), before, len(inputs), len(trace.plan.inputs))
    trace.plan = replace(trace.plan, inputs=inputs)
    graph.lint()
    trace.gm.recompile()


def _is_past(trace: Trace, argument: int) -> bool:
    return any(argument in site.past for site in trace.plan.sites if site.past)


def _refuse_all(trace: Trace) -> None:
    """Leave a decode step as it came that reads a compressed past outside of attention too: it would be decoded every time."""
    trace.plan = None
    for site in trace.matched:
        site.refusal = "what is cached is read by something else than its attention, too"


def _live(graph: Graph) -> set[Node]:
    """The nodes that results depend on, or something outside of the graph; FX knows of no change in place by a method."""
    changes: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if changes_in_place(node):
            changes[_viewed(node.args[0])].append(node)
    live: set[Node] = set()
    stack = [node for node in graph.nodes if node.is_impure() or begins_or_ends_vmap(node)]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += (*node.all_input_nodes, *changes[_viewed(node)])
    return live


def _viewed(node: Node) -> Node:
    """What ``node`` may be a view of, or change in place and give."""
    while is_call(node, *_VIEWS) or changes_in_place(node):
        node = node.args[0]
    return node


def _counts(node: Node) -> bool:
    """Whether an integer is only counted with, so that a tensor may stand for it: a CUDA graph keeps integers as they were."""
    return all(is_call(user, *_ARITHMETIC) and (isinstance(fake(user), torch.Tensor) or _counts(user)) for user in node.users)


def _number(trace: Trace) -> torch.Tensor:
    with fake_mode_of(*(fake(site.query) for site in trace.matched)):
        return torch.empty((), dtype=torch.int64, device=trace.plan.sites[0].device)


def is_asked_for_its_shape(node: Node) -> bool:
    """Whether nothing but the shape of a compressed tensor is read, and the tensor does not leave the graph."""

    def of_shape(user: Node) -> bool:
        return is_call(user, "size", "numel", "dim") or (is_call(user, "getattr") and user.args[1] in _OF_A_SHAPE)

    return all(map(of_shape, node.users))


def stand_in(node: Node) -> torch.Tensor:
    """What a compressed tensor becomes in a graph that is not rewritten for it; ``node`` is given its fake value."""
    example = shape_of(fake(node)) if is_asked_for_its_shape(node) else dense_example(fake(node))
    node.meta["example_value"] = example
    return example


def dense_example(x: SpectralTensor) -> torch.Tensor:
    """A fake dense tensor in the place of a fake compressed one."""
    with fake_mode_of(x.handle):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
