"""Canonicalise attention: every ``scaled_dot_product_attention`` becomes a ``Site`` with keys and values per KV head."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from spectral_compile.passes.trace import Site, Trace, argument, fake, is_call
from spectral_compile.report import Refusal


def canonicalise_attention(trace: Trace) -> None:
    """Find the sites, whichever way arguments are given and heads are repeated."""
    for node in trace.gm.graph.nodes:
        if is_call(node, "scaled_dot_product_attention"):
            trace.sites.append(_site(node))
    softmax = next((node for node in trace.gm.graph.nodes if is_call(node, "softmax")), None)
    if not trace.sites and softmax is not None:
        trace.refusals.append(Refusal("graph", _written_out(softmax)))


def _written_out(softmax: Node) -> str:
    """Why attention that is computed around ``softmax`` is left alone."""
    node = softmax
    while node.all_input_nodes and not is_call(node, "matmul", "baddbmm", "cat"):
        node = node.all_input_nodes[0]
        if is_call(node, "tanh"):
            return "its attention caps scores (softcapping), which attention to a compressed cache does not"
    if is_call(node, "cat"):
        return "its attention has learned sinks, which attention to a compressed cache does not"
    return "attention is computed by matmul and softmax: load the model with attn_implementation='sdpa' if it has that"


def _site(sdpa: Node) -> Site:
    query, key, value = (argument(sdpa, i, name) for i, name in enumerate(("query", "key", "value")))
    key, value = unwrap_repeat(key), unwrap_repeat(value)
    q, k, v = fake(query), fake(key), fake(value)
    scale = fake(argument(sdpa, 6, "scale"))
    if isinstance(scale, torch.SymFloat):
        scale = float(scale)  # a second model of one class makes Dynamo vary it; guards then hold it to this one
    site = Site(
        sdpa=sdpa,
        query=query,
        key=key,
        value=value,
        mask=argument(sdpa, 3, "attn_mask"),
        causal=bool(argument(sdpa, 5, "is_causal", False)),
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        where=_module(sdpa),
    )
    if argument(sdpa, 4, "dropout_p", 0.0):
        site.refusal = "attention dropout is on: call model.eval()"
    elif not q.ndim == k.ndim == v.ndim == 4:
        site.refusal = "queries, keys and values are not [batch, heads, tokens, head_dim]"
    elif k.shape[1] != v.shape[1] or k.shape[3] != v.shape[3] or q.shape[3] != k.shape[3]:
        site.refusal = "keys and values differ in heads or head_dim"
    elif not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int) or q.shape[1] % k.shape[1]:
        site.refusal = "the number of query heads is not a multiple of the number of KV heads"
    elif not isinstance(site.scale, (int, float)):
        site.refusal = "the scale of attention is computed in the graph"
    return site


def unwrap_repeat(node: Node) -> Node:
    """The keys or values before each head was repeated for its group of queries (``repeat_kv``), or ``node`` itself."""
    if is_call(node, "contiguous", "clone"):
        return unwrap_repeat(node.args[0])
    if is_call(node, "repeat_interleave") and argument(node, 2, "dim") == 1:
        return node.args[0]
    if not is_call(node, "reshape", "view", "flatten"):
        return node
    expanded = node.args[0]
    if not is_call(expanded, "expand") or fake(expanded).ndim != 5:
        return node
    inserted = expanded.args[0]
    if is_call(inserted, "unsqueeze") and argument(inserted, 1, "dim") in (2, -3):
        return inserted.args[0]
    if is_call(inserted, "getitem"):
        index = inserted.args[1]
        if (
            isinstance(index, tuple)
            and len(index) > 2
            and index[2] is None
            and all(_whole(i) for i in (*index[:2], *index[3:]))
        ):
            return inserted.args[0]
    return node


def _whole(index: object) -> bool:
    return index is Ellipsis or index == slice(None, None, None)


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].removeprefix("L['self'].") if stack else node.name
