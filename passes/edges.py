"""Classify cache edges: how each site's keys and values come from the cache and go back to it."""

from __future__ import annotations

import torch
from torch.fx import Node

from spectral_compile.codec.layout import Layout
from spectral_compile.passes.trace import Edge, Site, Trace, argument, fake, is_call
from spectral_compile.tensor import SpectralTensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 256  # channels of a group whose basis fits the shared memory of a GPU, beside what else attention holds there


def classify_edges(trace: Trace) -> None:
    """Give every site its ``Edge`` and layout, or a refusal. All edges of one graph are of one kind."""
    leaving = set(trace.output.all_input_nodes)
    for layer, site in enumerate(trace.sites):
        if site.refusal is not None:
            continue
        edge = _edge(trace, site, leaving)
        if isinstance(edge, str):
            site.refusal = edge
        elif trace.matched[0].edge is not None and edge.kind != trace.matched[0].edge.kind:
            site.refusal = f"its cache edge is {edge.kind}, the graph's first is {trace.matched[0].edge.kind}"
        else:
            site.edge = edge
            site.refusal = _give_layout(trace, site, layer)


def too_wide(layout: Layout, device: torch.device) -> str | None:
    """Why the kernels cannot attend to this layout, if so."""
    if device.type == "cpu" or layout.lossless or layout.width <= _WIDEST:
        return None
    if layout.head_group > 1:
        return f"head_group={layout.head_group} joins {layout.width} channels: on a GPU lower it to at most {_WIDEST} of them"
    return f"its heads have {layout.head_dim} channels: on a GPU at most {_WIDEST} can be compressed"


def _give_layout(trace: Trace, site: Site, layer: int) -> str | None:
    """Set the layout that a site's store has, or is to have; why there can be none, if so."""
    key, profile = fake(site.edge.new[0]), trace.config.profile
    if site.edge.past is not None:
        site.layout = fake(site.edge.past[0]).store_layout
    elif profile and (reason := profile.misfit(key.shape[1], key.shape[3], len(trace.sites))):
        return reason
    else:
        site.layout = trace.config.layout(key.shape[1], key.shape[3], None, layer)
    return too_wide(site.layout, key.device)


def _edge(trace: Trace, site: Site, leaving: set[Node]) -> Edge | str:
    if fake(site.key).dtype not in _DTYPES:
        dtype = str(fake(site.key).dtype).removeprefix("torch.")
        return f"keys are {dtype}: load the model in float16, bfloat16 or float32"
    sides = [_side(node) for node in (site.key, site.value)]
    for side in sides:
        if isinstance(side, str):
            return side
    (k_past, k_new), (v_past, v_new) = sides
    if site.key not in leaving or site.value not in leaving:
        if any(is_call(user, "getitem") and user in leaving for user in site.key.users):
            return "the cache keeps only a window of its tokens"
        return "the cache does not leave this graph"
    count = fake(site.query).shape[2]
    if (k_past is None) != (v_past is None):
        return "keys have a past and values have none, or the reverse"
    if k_past is None:
        if not trace.texts(site.query) <= trace.texts(site.key):
            return "its keys are not those of the tokens that ask (cross-attention)"
        return Edge("prefill", None, (k_new, v_new), (site.key, site.value))
    k, v = fake(k_past), fake(v_past)
    if not isinstance(k, SpectralTensor) or not isinstance(v, SpectralTensor):
        return "the cache holds dense tensors: it was filled outside of a graph that this backend compiled"
    if (k.role, v.role) != ("key", "value") or k.store_layout is not v.store_layout:
        return "keys and values do not come from one compressed layer"
    kind = "decode" if isinstance(count, int) and count == 1 else "extend"
    return Edge(kind, (k_past, v_past), (k_new, v_new), (site.key, site.value))


def _side(node: Node) -> tuple[Node | None, Node] | str:
    """(past, new) of one concatenation along tokens; past is None where it is empty."""
    base = node.args[0] if is_call(node, "getitem") else node
    if is_call(base, "index_copy_") or any(is_call(user, "index_copy_") for user in base.users):
        where = "exists outside of the graph" if base.op == "placeholder" else "this graph allocates"
        return f"the cache is static, a buffer that {where}: use the default DynamicCache"
    if base is not node and is_call(base, "cat", "concat", "concatenate"):
        return "the cache keeps only a window of its tokens"
    if not is_call(node, "cat", "concat", "concatenate"):
        return "keys and values do not come from a growing cache"
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if len(tensors) != 2 or dim not in (2, -2):
        return "the cache does not grow by one concatenation along tokens"
    past, new = tensors
    if not isinstance(fake(past), SpectralTensor) and any(isinstance(n, int) and n == 0 for n in fake(past).shape):
        return None, new
    if past.op != "placeholder":
        return "the past of the cache is computed in the graph"
    return past, new
