"""Slices: what turns each token by itself into something wide and back, as an MLP does, runs on a slice of them at a time.

Between the two a long prompt takes more memory than its cache does. A norm before it, and adding a residual behind it, are of
each token by itself as well: with them in the slice, hidden states are one tensor before it and one behind it.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spectral_compile.config import SpectralConfig
from spectral_compile.kernels.sliced import ROWS, sliced
from spectral_compile.passes.trace import Trace, argument, fake, is_call, is_float
from spectral_compile.passes.writes import changes_in_place

log = logging.getLogger(__name__)

WIDER = 2  # than what goes in and what comes out is what is worth it
_ALONE = (  # functions of the channels of a token and of nothing else
    *("linear", "add", "sub", "mul", "truediv", "neg", "pow", "square", "clamp", "to", "float", "type_as", "chunk", "getitem"),
    *("relu", "gelu", "silu", "mish", "elu", "tanh", "sigmoid", "softplus", "leaky_relu", "hardswish", "erf", "exp"),
    *("mean", "rsqrt", "rms_norm", "layer_norm", "dropout"),
)


@dataclass(frozen=True)
class Part:
    """A part as a graph of its own, of tokens [1, n, C] for any n of two and more, and of weights."""

    gm: GraphModule
    inputs: tuple[torch.Tensor, ...]  # as the graph that it was cut from has them

    def name(self, config: SpectralConfig) -> str:
        """The same for parts that compile to the same."""
        tokens, *weights = self.inputs
        inputs = [(tokens.shape[-1], tokens.dtype, tokens.device), *[(w.shape, w.stride(), w.dtype, w.device) for w in weights]]
        described = repr((self.gm.code, inputs, config.inner, config.inductor))
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def examples(self) -> tuple[FakeTensorMode, list[torch.Tensor]]:
        """Fake inputs with a number of tokens that no other graph knows, for it guards on what the number is.

        The values that nodes have for them are noted in the graph as Dynamo does it.
        """
        shapes = ShapeEnv()
        mode = FakeTensorMode(shape_env=shapes)
        source = torch._dynamo.source.ConstantSource("tokens")
        symbol = shapes.create_symbol(ROWS, source, DimDynamic.DYNAMIC)
        count = shapes.create_symintnode(symbol, hint=ROWS, source=source)
        tokens, *weights = self.inputs
        # as Dynamo traces: else torch 2.11 takes products apart in C++, which asks for sizes that are symbols
        with mode, enable_python_dispatcher():
            slice_ = torch.empty((1, count, tokens.shape[-1]), dtype=tokens.dtype, device=tokens.device)
            given = [slice_, *[torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device) for w in weights]]
            _Valued(self.gm).run(*given)
            return mode, given


class _Valued(Interpreter):
    """Gives every node the fake value that it has for fake inputs, by which AOTAutograd's cache tells methods of tensors."""

    def run_node(self, node: Node) -> Any:
        node.meta["example_value"] = value = super().run_node(node)
        return value


def slice_wide(trace: Trace) -> None:
    """Substitute ``sliced`` for each such part of a graph that may read more than a slice, and note what is to be compiled.

    Requires: edges, and the nodes as Dynamo traced them, each with a fake value and a place in ``trace.order``.
    Gives: one call of ``sliced`` in the place of each part, and the part in ``trace.parts`` by the name that the call has;
    what is left of the part is dead code. Decode steps, graphs that always have at most ``ROWS`` tokens and graphs under
    autocast stay as they are.
    """
    if not trace.matched or trace.kind == "decode":
        return
    graph, taken = trace.gm.graph, set()
    new = fake(trace.matched[0].edge.new[0])
    tokens = new.shape[0] * new.shape[2]
    if isinstance(tokens, int) and tokens <= ROWS:
        return
    if torch.is_autocast_enabled(new.device.type) or any(is_call(node, "_enter_autocast") for node in graph.nodes):
        return  # a part by itself would be computed in other dtypes
    for x in list(graph.nodes):  # the hidden states before what is normed
        if (
            x in taken
            or not _is_tokens(x)
            or any(map(changes_in_place, x.users))
            or (found := _wide_and_back(trace, x)) is None
        ):
            continue
        end, members = found
        taken |= members
        part, weights = _own_graph(trace, x, end, members)
        name = part.name(trace.config)
        trace.parts[name] = part
        end.args = (x, weights, name, fake(end).shape[-1], fake(end).dtype)
        end.op, end.target, end.kwargs = "call_function", sliced, {}
        log.debug("sliced: part %s, %d nodes from %s to %s", name, len(members), x, end)


def _is_tokens(node: Node) -> bool:
    return is_float(node) and fake(node).ndim == 3 and isinstance(fake(node).shape[-1], int)


def _wide_and_back(trace: Trace, x: Node) -> tuple[Node, set[Node]] | None:
    """A node that is computed from ``x`` by way of something wide and is not wide itself, with all on the way to it.

    It is the first one to which ``x`` is added, or without a residual the first one.
    """
    reached, stack = {x: None}, [x]
    while stack:
        for user in stack.pop().users:
            if user not in reached and _alone(trace, user, reached):
                reached[user] = None
                stack.append(user)
    found = None
    for end in sorted(reached, key=lambda node: trace.order.get(node, -1)):
        if not _is_tokens(end) or end is x or (found and x not in end.all_input_nodes):
            continue
        members, stack = {end}, [end]
        while stack:
            for node in stack.pop().all_input_nodes:
                if node in reached and node is not x and node not in members:
                    members.add(node)
                    stack.append(node)
        closed = all(user in members for node in members - {end} for user in node.users)
        widths = [fake(node).shape[-1] for node in members if _is_tokens(node)]
        if closed and max(widths) >= WIDER * max(fake(x).shape[-1], fake(end).shape[-1]):
            found = end, members
            if x in end.all_input_nodes:
                break
    return found


def _alone(trace: Trace, node: Node, reached: dict[Node, None]) -> bool:
    """Whether ``node`` does to each token by itself what depends on ``reached`` and on parameters alone."""
    if not is_call(node, *_ALONE) or node.kwargs.get("inplace") or "out" in node.kwargs:
        return False
    if is_call(node, "chunk") and argument(node, 2, "dim", 0) not in (-1, 2):
        return False
    if is_call(node, "mean") and (argument(node, 1, "dim") not in (-1, 2) or not argument(node, 2, "keepdim", False)):
        return False
    if is_call(node, "rms_norm", "layer_norm") and len(argument(node, 1, "normalized_shape")) != 1:
        return False
    if is_call(node, "dropout") and argument(node, 2, "training", True):
        return False
    if is_call(node, "getitem") and not is_call(node.args[0], "chunk"):
        return False
    most = 2 if is_call(node, "linear") else 1  # dimensions of a parameter that is the same for all tokens
    return all(n in reached or _is_weight(trace, n, most) for n in node.all_input_nodes)


def _is_weight(trace: Trace, node: Node, most: int) -> bool:
    """Whether ``node`` is a parameter of ``most`` dimensions, or made of such alone, as the factor in Gemma's norms is."""
    value, made_of = fake(node), node.all_input_nodes
    if not isinstance(value, torch.Tensor) or value.ndim > most:
        return False
    if node.op == "placeholder":
        return isinstance(trace.examples.get(node), torch.nn.Parameter) and not is_traceable_wrapper_subclass(value)
    return is_call(node, *_ALONE) and bool(made_of) and all(_is_weight(trace, n, most) for n in made_of)


def _own_graph(trace: Trace, x: Node, end: Node, members: set[Node]) -> tuple[Part, list[Node]]:
    graph, order = Graph(), sorted(members, key=lambda node: trace.order.get(node, -1))
    weights = list(dict.fromkeys(n for node in order for n in node.all_input_nodes if n is not x and n not in members))
    copies = {node: graph.placeholder(f"given_{i}") for i, node in enumerate((x, *weights))}
    for node in order:  # named by what they do, so that all layers give the same code
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output((copies[end],))
    return Part(GraphModule(torch.nn.Module(), graph), tuple(map(fake, (x, *weights)))), weights
