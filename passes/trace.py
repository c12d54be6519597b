"""What the passes hand on to each other: one ``Trace`` a graph, one ``Site`` an attention in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node

from spectral_compile.codec.layout import Layout, Rotary
from spectral_compile.config import SpectralConfig
from spectral_compile.fingerprint import fingerprint
from spectral_compile.report import PassReport, Refusal


@dataclass(frozen=True)
class Edge:
    """How a site's keys and values meet the cache.

    ``kind`` is prefill, extend or decode; ``past`` are the placeholders of keys and values (none in a prefill), ``new`` the
    chunk's own keys (as attended to) and values, ``grown`` the two nodes that leave the graph as the new cache. A static cache
    leaves only the graph that allocates it; ``writes`` are the calls that put the chunk there.
    """

    kind: str
    past: tuple[Node, Node] | None
    new: tuple[Node, Node]
    grown: tuple[Node, ...]
    writes: tuple[Node, ...] = ()


@dataclass
class Site:
    """One attention of queries to keys and values per KV head, and what later passes learn of it.

    ``attended`` is what it comes to. Scores, times ``scale``, become ``softcap * tanh(scores / softcap)`` where that is not 0;
    ``sink_score`` [Hq] is a score of each query head that takes its share and gives no value.
    """

    attended: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    where: str
    softcap: float = 0.0
    sink_score: Node | None = None
    # None until ``classify_edges``, after which every site that is not refused has both
    edge: Edge = None  # type: ignore[assignment]
    layout: Layout = None  # type: ignore[assignment]
    stored_key: Node | None = None
    positions: Node | None = None
    rotary: Rotary | None = None
    mask_kind: str = "causal"  # or "tensor": whatever the mask says
    padding: Node | None = None
    sliding_window: int = 0
    last: int = 0  # where not 0, queries are those of so many last tokens of the chunk alone
    refusal: str | None = None
    note: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in, and the cache holds: under autocast not what all of its arguments are."""
        return fake(self.attended).dtype


@dataclass
class Trace:
    """A graph on its way through the passes, with what they found and what the runtime must know."""

    gm: GraphModule
    examples: dict[Node, Any]
    config: SpectralConfig
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[Refusal] = field(default_factory=list)
    plan: Any = None
    parts: dict[str, Any] = field(default_factory=dict)
    profiled: bool = False  # whether layers get bytes by a profile
    passes: list[PassReport] = field(default_factory=list)

    @property
    def matched(self) -> list[Site]:
        """The sites that no pass has refused."""
        return [site for site in self.sites if site.refusal is None]

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """Of the weights in this graph, by which a profile is found."""
        return fingerprint(x for x in self.examples.values() if isinstance(x, torch.nn.Parameter))

    @functools.cached_property
    def order(self) -> dict[Node, int]:
        """The place of every node in the graph as it came."""
        return {node: i for i, node in enumerate(self.gm.graph.nodes)}

    @functools.cached_property
    def _data(self) -> set[Node]:
        data: set[Node] = set()
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                if isinstance(self.examples.get(node), torch.nn.Parameter):
                    data.add(node)
            elif isinstance(fake(node), (int, torch.SymInt, torch.Size)):
                continue  # a size says nothing of values
            elif any(parent in data for parent in node.all_input_nodes):
                data.add(node)
        return data

    def is_data(self, node: Node) -> bool:
        """Whether ``node`` depends on the model's parameters; masks and angles do not."""
        return node in self._data

    @functools.cached_property
    def _texts(self) -> dict[Node, frozenset[Node]]:
        texts: dict[Node, frozenset[Node]] = {}
        for node in self.gm.graph.nodes:
            found = frozenset().union(*(texts[parent] for parent in node.all_input_nodes))
            if node.op == "placeholder" and not isinstance(self.examples.get(node), torch.nn.Parameter):
                embedded = is_float(node) and fake(node).ndim == 3
                if embedded or any(is_call(user, "embedding") for user in node.users):
                    found = frozenset((node,))
            texts[node] = found
        return texts

    def texts(self, node: Node) -> frozenset[Node]:
        """The inputs that ``node`` is computed from which may be text: tokens that are embedded, or hidden states [B, n, W]."""
        return self._texts[node]

    @property
    def output(self) -> Node:
        return next(n for n in reversed(self.gm.graph.nodes) if n.op == "output")

    @property
    def kind(self) -> str:
        return self.matched[0].edge.kind if self.matched else "other"


def fake_mode_of(*values: torch.Tensor) -> FakeTensorMode:
    """The mode in which Dynamo made these fake ``values``."""
    mode = detect_fake_mode(values)
    assert mode is not None, "what Dynamo traces with is fake"
    return mode


def fake(node: Any) -> Any:
    """The fake value that Dynamo traced for ``node``; constants are their own."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_call(node: Any, *names: str) -> bool:
    """Whether ``node`` calls a function or method of one of these names, in whichever spelling."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return False
    return call_name(node) in names


def call_name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def module_of(node: Node) -> str:
    """The module that a node was traced in, or the node's name."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else node.name


def begins_or_ends_vmap(node: Node) -> bool:
    """Whether ``node`` gives nothing, but has what comes after it run under one more ``vmap``, or one fewer."""
    return is_call(node, "lazy_load_decompositions", "_vmap_increment_nesting", "_vmap_decrement_nesting")


def is_float(node: Any) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()
