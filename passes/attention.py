"""Canonicalise attention: every one, called or written out, becomes a ``Site`` with keys and values per KV head."""

from __future__ import annotations

import logging
import math

import torch
from torch.fx import Node

from spectral_compile.passes.eager import ALIBI, DROPS_OUT, written_out
from spectral_compile.passes.trace import Site, Trace, argument, fake, is_call, is_float, module_of
from spectral_compile.report import Refusal

log = logging.getLogger(__name__)


def canonicalise_attention(trace: Trace) -> None:
    """Find the sites, whichever way attention is called or written out, arguments are given and heads are repeated.

    Requires: a graph as Dynamo hands it over, with a fake value on every node.
    Gives: ``trace.sites`` in the order of the graph, with the query [B, Hq, n, D], key and value [B, Hkv, T, D] of KV heads
    before they are repeated, mask, scale, softcap and sink score of each. A site is refused if its shapes are no cache's, or if
    attention drops out, adds a bias to each head's scores or takes a scale that the graph computes. Where no attention can be
    read, ``trace.refusals`` says why. The graph stays as it is.
    """
    reasons: list[str] = []
    for node in trace.gm.graph.nodes:
        found: Site | str | None = None
        if is_call(node, "scaled_dot_product_attention"):
            found = _called(node)
        elif is_call(node, "softmax"):
            found = written_out(node)
        if isinstance(found, Site):
            if is_float(mask := found.mask) and fake(mask).ndim == 4 and fake(mask).shape[1] != 1 and not trace.is_data(mask):
                found.refusal = ALIBI  # what is added to one head's scores is not what is added to another's
            trace.sites.append(_per_kv_head(found))
            log.debug("%s: attention at %s of %s to %s", found.where, node, fake(found.query).shape, fake(found.key).shape)
        elif found is not None:
            reasons.append(found)
    if not trace.sites and reasons:
        trace.refusals.append(Refusal("graph", reasons[0]))


def _called(sdpa: Node) -> Site:
    query, key, value = (argument(sdpa, i, name) for i, name in enumerate(("query", "key", "value")))
    scale = fake(argument(sdpa, 6, "scale"))
    if isinstance(scale, torch.SymFloat):
        scale = float(scale)  # a second model of one class makes Dynamo vary it; guards then hold it to this one
    return Site(
        attended=sdpa,
        query=query,
        key=key,
        value=value,
        mask=argument(sdpa, 3, "attn_mask"),
        scale=1 / math.sqrt(fake(query).shape[-1]) if scale is None else scale,
        where=module_of(sdpa),
        refusal=DROPS_OUT if argument(sdpa, 4, "dropout_p", 0.0) else None,
    )


def _per_kv_head(site: Site) -> Site:
    """The site with keys and values as they were before heads were repeated, and a refusal if their shapes are no cache's."""
    site.key, site.value = unwrap_repeat(site.key), unwrap_repeat(site.value)
    q, k, v = fake(site.query), fake(site.key), fake(site.value)
    if site.refusal is not None:
        return site
    if not q.ndim == k.ndim == v.ndim == 4:
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
    node = _before_copies(node)
    repeated = _repeated(node)
    return node if repeated is None else _before_copies(repeated)


def _before_copies(node: Node) -> Node:
    """``node`` before it was copied, or moved to where it is already in the dtype that it has."""
    while is_call(node, "contiguous", "clone") or (is_call(node, "to") and _alike(node, node.args[0])):
        node = node.args[0]
    return node


def _alike(a: Node, b: Node) -> bool:
    return is_float(b) and (fake(a).dtype, fake(a).device) == (fake(b).dtype, fake(b).device)


def _repeated(node: Node) -> Node | None:
    """What ``node`` has with each head repeated, in one of the ways to write that; None where it is not so."""
    if is_call(node, "repeat_interleave") and argument(node, 2, "dim") == 1:
        return node.args[0]
    if not is_call(node, "reshape", "view", "flatten"):
        return None
    expanded = node.args[0]
    if not is_call(expanded, "expand") or fake(expanded).ndim != 5:
        return None
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
    return None


def _whole(index: object) -> bool:
    return index is Ellipsis or index == slice(None, None, None)
