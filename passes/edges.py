"""Classify cache edges: how each site's keys and values come from the cache and go back to it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.fx import Node

from spectral_compile.codec import Profile, largest_group
from spectral_compile.codec.layout import Layout
from spectral_compile.config import AUTO, SpectralConfig
from spectral_compile.fingerprint import known
from spectral_compile.passes.trace import Edge, Site, Trace, argument, fake, is_call
from spectral_compile.tensor import SpectralTensor

log = logging.getLogger(__name__)

NO_CACHE = "its keys and values go to no cache: it is an encoder, or the model is called with use_cache=False"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# by bytes of a number: channels of a group, and KiB of a GPU's shared memory that attention to so many takes at most
_SHARED = {2: ((64, 36), (128, 80), (192, 132), (256, 176)), 4: ((64, 132),)}


def classify_edges(trace: Trace) -> None:
    """Give every site its ``Edge`` and layout, or a refusal.

    Requires: sites with key and value per KV head.
    Gives: each matched site an ``edge`` and a ``layout``, that of the compressed tensor it continues, or of the options without
    RoPE. All edges of one graph are of the first one's kind and on its device; the others are refused. Where queries are those
    of the chunk's last tokens alone, ``last`` says of how many, and ``mask`` is the whole chunk's. The graph stays as it is.
    """
    leaving, options = set(trace.output.all_input_nodes), None
    for layer, site in enumerate(trace.sites):
        if site.refusal is not None:
            continue
        first = trace.matched[0]
        if (device := fake(site.query).device) != fake(first.query).device:
            site.refusal = (
                f"it is on {device} and the graph's first on {fake(first.query).device}: load the model onto one device"
            )
            continue
        edge = _edge(trace, site, leaving)
        if isinstance(edge, str):
            site.refusal = edge
        elif first.edge is not None and edge.kind != first.edge.kind:
            site.refusal = f"its cache edge is {edge.kind}, the graph's first is {first.edge.kind}"
        else:
            site.edge = edge
            options = options or _with_profile(trace, site)
            site.refusal = _give_layout(trace, site, layer, options)
            log.debug("%s: %s, new keys %s, past %s", site.where, edge.kind, edge.new[0], edge.past and edge.past[0])


def too_wide(layout: Layout, dtype: torch.dtype, shared: int) -> str | None:
    """Why the kernels cannot attend to this layout on a GPU with ``shared`` bytes of shared memory a block, if so."""
    widest = max((width for width, kib in _SHARED[dtype.itemsize] if 1024 * kib <= shared), default=0)
    width = max(layout.k.width, layout.v.width)
    if layout.lossless or width <= widest:
        return None
    if layout.head_dim <= widest:
        fits = largest_group(layout.kv_heads, layout.head_dim, widest)
        return f"its groups have {width} channels, and on this GPU at most {widest} fit: set head_group={fits}"
    if dtype == torch.float32:
        return "in float32 its heads do not fit the shared memory of this GPU: load the model in bfloat16 or float16"
    return f"its heads have {layout.head_dim} channels: on this GPU at most {widest} can be compressed"


def _with_profile(trace: Trace, first: Site) -> SpectralConfig:
    """The options, with the profile of this model where they ask for it and there is one."""
    if trace.config.profile != AUTO or first.edge.past is not None or (found := known(trace.fingerprint)) is None:
        return trace.config
    return replace(trace.config, profile=found)


def _give_layout(trace: Trace, site: Site, layer: int, options: SpectralConfig) -> str | None:
    """Set the layout that a site's store has, or is to have; why there can be none, if so."""
    key = fake(site.edge.new[0])
    if site.edge.past is not None:
        site.layout = fake(site.edge.past[0]).kind.layout
    else:
        if isinstance(options.profile, Profile):
            reason = options.profile.misfit(key.shape[1], key.shape[3], len(trace.sites))
            if reason is not None and trace.config.profile != AUTO:
                return reason
            if reason is not None:  # an untrained model of another shape has the same vectors, and nobody asked for a profile
                options = trace.config
            trace.profiled |= reason is None
        site.layout = options.layout(key.shape[1], key.shape[3], None, layer)
    if key.device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(key.device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stub
    return too_wide(site.layout, site.dtype, memory)


def _edge(trace: Trace, site: Site, leaving: set[Node]) -> Edge | str:
    if fake(site.key).dtype not in _DTYPES:
        dtype = str(fake(site.key).dtype).removeprefix("torch.")
        return f"keys are {dtype}: load the model in float16, bfloat16 or float32"
    key, value = _side(site.key), _side(site.value)
    if isinstance(key, str):
        return key
    if isinstance(value, str):
        return value
    if (key.past is None) != (value.past is None) or (key.write is None) != (value.write is None):
        return "keys have a past and values have none, or the reverse"
    new = (key.new, value.new)
    writes = tuple(side.write for side in (key, value) if side.write is not None)
    if (key.past is None or not writes) and not {key.grown, value.grown} <= leaving:
        if any(is_call(user, "getitem") and user in leaving for user in site.key.users):
            return "the cache keeps only a window of its tokens"
        return "the cache does not leave this graph"
    if key.past is None:
        if not trace.texts(site.query) <= trace.texts(key.new):
            return "its keys are not those of the tokens that ask (cross-attention)"
        return Edge("prefill", None, new, (key.grown, value.grown), writes)
    k, v = fake(key.past), fake(value.past)
    if not isinstance(k, SpectralTensor) or not isinstance(v, SpectralTensor):
        return "the cache holds dense tensors: it was filled outside of a graph that this backend compiled"
    if (k.kind.role, v.kind.role) != ("key", "value") or k.kind.layout is not v.kind.layout or k.kind.static != bool(writes):
        return "keys and values do not come from one compressed layer"
    if writes and site.mask is None:
        return "it attends to a static cache without a mask, so also to what is not there yet"
    asked, count = fake(site.query).shape[2], fake(key.new).shape[2]
    if not _same(asked, count):
        if not _asks_last(site, asked):
            return "it asks with other tokens than those that it adds to the cache"
        site.last = asked
    kind = "decode" if isinstance(count, int) and count == 1 else "extend"
    return Edge(kind, (key.past, value.past), new, () if writes else (key.grown, value.grown), writes)


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are one, without a guard on it."""
    return (a.node.expr if isinstance(a, torch.SymInt) else a) == (b.node.expr if isinstance(b, torch.SymInt) else b)


def _asks_last(site: Site, asked: int | torch.SymInt) -> bool:
    """Whether the queries are those of the chunk's last tokens, by the rows of its mask, which then is the whole chunk's.

    Where layers only read what others have cached, no more is needed of a prompt (Gemma 4).
    """
    if not isinstance(asked, int):
        return False
    if site.mask is None:
        return asked == 1  # it sees all, as the last one does
    rows = (slice(None), slice(None), slice(-asked, None), slice(None))
    if not is_call(site.mask, "getitem") or site.mask.args[1] != rows:
        return False
    site.mask = site.mask.args[0]
    return True


class _Side(NamedTuple):
    """Keys or values on their way: from ``past`` (if any) and ``new`` to ``grown``, by ``write`` where the cache is static."""

    past: Node | None
    new: Node
    grown: Node
    write: Node | None = None


def _side(node: Node) -> _Side | str:
    base = node.args[0] if is_call(node, "getitem") else node
    write = next((user for user in base.users if is_call(user, "index_copy_")), None)
    if write is not None:
        if write.args[0] is not base or write.args[1] not in (2, -2) or write.users:
            return "the cache is static and written to in an unknown way: use the default DynamicCache"
        if is_call(base, "zeros"):
            return _Side(None, write.args[3], base, write)
        if isinstance(fake(base), SpectralTensor):
            return _Side(base, write.args[3], base, write)
        return "the cache is static, a buffer that exists outside of the graph: use the default DynamicCache"
    if base is not node and is_call(base, "cat", "concat", "concatenate"):
        return "the cache keeps only a window of its tokens"
    if not is_call(node, "cat", "concat", "concatenate"):
        if node.op == "placeholder":
            return "the graph breaks between its cache and its attention"
        kept = node
        while is_call(kept, "to", "float", "type_as", "contiguous"):
            kept = kept.args[0]
        return "keys and values do not come from a growing cache" if _leaves(kept) else NO_CACHE
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if len(tensors) != 2 or dim not in (2, -2):
        return "the cache does not grow by one concatenation along tokens"
    past, new = tensors
    if not isinstance(fake(past), SpectralTensor) and any(isinstance(n, int) and n == 0 for n in fake(past).shape):
        return _Side(None, new, node)
    if past.op != "placeholder":
        return "the past of the cache is computed in the graph"
    return _Side(past, new, node)


def _leaves(node: Node) -> bool:
    """Whether keys or values go on to somewhere else than attention."""
    seen, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at.op == "output":
            return True
        if at not in seen and not is_call(at, "scaled_dot_product_attention", "matmul", "bmm"):
            seen.add(at)
            stack.extend(at.users)
    return False
