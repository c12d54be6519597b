"""Rewrite: matched sites run on the store's buffers, and the graph is told nothing of how long the cache is.

prefill attends to its own tokens, and stores keys and values in the same layer, so that one layer's dense ones die before the
next's are born; extend and decode attend to the compressed past. What runs outside of the graph is left in ``trace.plan``.
"""

from __future__ import annotations

import logging
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from spectral_compile.kernels.advance.op import advance_
from spectral_compile.kernels.append.op import append_
from spectral_compile.kernels.attend.op import attend_
from spectral_compile.kernels.buffers import Buffers, Capacity, allocate
from spectral_compile.kernels.causal import causal
from spectral_compile.kernels.ledger import COLUMNS
from spectral_compile.passes.trace import Site, Trace, fake, fake_mode_of
from spectral_compile.plan import Plan, SitePlan

log = logging.getLogger(__name__)


def rewrite(trace: Trace) -> None:
    """Substitute the operations and take the cache out of the graph's inputs and outputs.

    Requires: matched sites with edge, layout, stored key and kind of mask.
    Gives: ``trace.plan``, and a graph in which no matched site's attention reads a cached tensor: a prefill attends to its own
    tokens and has one ``append_`` a store, extend and decode have one ``attend_`` a site; one ``advance_`` comes before all of
    them. New placeholders stand behind the old ones, and the cache is no output any more. What has no users is left to
    ``clean_up``. Sites that share keys and values with a refused one are refused. Without a matched site the graph stays as it
    is and ``trace.plan`` None.
    """
    stores = _stores(trace)
    if not stores:
        return
    graph, sites = trace.gm.graph, [readers[0] for readers in stores]
    arguments = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    inputs: dict[Node, tuple[Any, ...]] = {node: ("argument", i) for node, i in arguments.items()}
    fake_mode = fake_mode_of(*(fake(site.query) for site in sites))
    first = sites[0]
    batch, count = fake(first.edge.new[0]).shape[0], fake(first.edge.new[0]).shape[2]
    device = fake(first.query).device
    padding = next((site.padding for site in sites if site.padding is not None), None)
    last = [next(reversed(arguments))]

    def placeholder(name: str, source: tuple[Any, ...], value: torch.Tensor, static: bool = True) -> Node:
        with graph.inserting_after(last[0]):
            node = graph.placeholder(name)
        last[0] = node
        node._dynamo_source = None
        # what hardly ever lies elsewhere is not asked at each call how it is aligned, and recorded steps read it where it lies
        node.meta = {"example_value": value, "tensor_dict": {"_dynamo_static_input_type": "unguarded"} if static else {}}
        inputs[node], trace.examples[node] = source, value
        return node

    def empty(*shape: Any, dtype: torch.dtype) -> torch.Tensor:
        with fake_mode:
            return torch.empty(shape, dtype=dtype, device=device)

    ledger = placeholder("spectral_ledger", ("ledger",), empty(batch, COLUMNS, dtype=torch.int64))
    positions = placeholder("spectral_positions", ("positions",), empty(batch, 1, dtype=torch.int32))
    valid = columns = visible = None
    if padding is not None:
        valid = placeholder("spectral_valid", ("valid",), empty(batch, count, dtype=torch.bool), static=False)
        if first.edge.past is not None:
            visible = placeholder("spectral_visible", ("visible",), empty(batch, 1, dtype=torch.uint8))
    if any(site.mask_kind == "tensor" and site.edge.past for site in sites):
        columns = placeholder("spectral_columns", ("columns",), empty(batch, 1, dtype=torch.bool))

    ids = next((site.positions for site in sites if site.positions is not None), None)
    with graph.inserting_before(first.attended):
        graph.call_function(advance_, (ledger, positions, ids, valid, first.edge.new[0], first.layout.spec()))
    for i, readers in enumerate(stores):
        site, layout = readers[0], readers[0].layout
        capacity = Capacity(layout.block, layout.recent + layout.block, 1)  # any: no compiled code depends on it
        with fake_mode:
            values = allocate(layout, batch, capacity, site.dtype, device)
        buffers = [placeholder(f"spectral_{i}_{name}", ("buffer", i, name), value) for name, value in values._asdict().items()]
        timeline = _TimelineNodes(ledger, positions, valid, columns, visible)
        # a prompt enters with the first that reads it, since nothing reads the store yet, and what follows with the last
        enters = readers[0] if site.edge.past is None else readers[-1]
        for reader in readers:
            reader.layout, reader.stored_key = layout, site.stored_key
            _substitute(reader, timeline, i, buffers, reader is enters)

    outputs: list[tuple[str, int]] = []
    kept: list[Node] = []
    leaving = {
        node: (role, i) for i, site in enumerate(sites) for role, node in zip(("key", "value"), site.edge.grown, strict=False)
    }
    for node in trace.output.args[0]:
        if node in leaving:
            outputs.append(leaving[node])
        else:
            outputs.append(("result", len(kept)))
            kept.append(node)
    trace.output.args = (tuple(kept),)
    trace.plan = Plan(
        kind=trace.kind,
        sites=tuple(
            SitePlan(
                layout=site.layout,
                dtype=site.dtype,
                device=fake(site.query).device,
                past=None if (past := site.edge.past) is None else (arguments[past[0]], arguments[past[1]]),
                slots=fake(site.edge.grown[0]).shape[2] if site.edge.grown and site.edge.writes else None,
            )
            for site in sites
        ),
        inputs=inputs,
        outputs=tuple(outputs),
        masked=any(site.mask_kind == "tensor" for site in sites),
        padding=arguments[padding] if padding is not None else None,
        batch=batch,
        count=count,
        fingerprint=trace.fingerprint if trace.kind == "prefill" else None,
    )
    log.debug("%d stores of %d sites; results: %s", len(stores), len(trace.matched), [node.name for node in kept])


def _stores(trace: Trace) -> list[list[Site]]:
    """The matched sites by the keys and values that they read: a layer may read those of another one, which enter once.

    If one of these stays dense all do, since its keys and values would be decoded at every step.
    """
    sharing: dict[tuple[Node, Node], list[Site]] = {}
    for site in trace.sites:
        sharing.setdefault((site.key, site.value), []).append(site)
    for sites in sharing.values():
        refused = next((site for site in sites if site.refusal is not None), None)
        if refused is None:
            continue
        for site in sites:
            site.refusal = site.refusal or f"{refused.where} reads its keys and values too, and stays dense: {refused.refusal}"
    return [sites for sites in sharing.values() if sites[0].refusal is None]


class _TimelineNodes(NamedTuple):
    """What all layers of a cache read beside their buffers; see ``Timeline``."""

    ledger: Node
    positions: Node
    valid: Node | None
    columns: Node | None
    visible: Node | None


def _substitute(site: Site, timeline: _TimelineNodes, number: int, buffers: list[Node], enters: bool) -> None:
    """Make one site run on the buffers of store ``number``; what it adds to the cache ``enters`` with it, or with another site
    that shares them."""
    graph, layout, spec = site.attended.graph, site.layout, site.layout.spec()
    ledger, positions, valid, columns, visible = timeline
    assert len(buffers) == len(Buffers._fields)
    query, stored_key, new_value = (_in_dtype(site, node) for node in (site.query, site.stored_key, site.edge.new[1]))
    if site.edge.past is None:
        key, value = _in_dtype(site, site.key), _in_dtype(site, site.value)
        if enters:
            seen = key if layout.token_weighted else None
            entering = (query, stored_key, new_value, ledger, valid, seen, float(site.scale), number)
            with graph.inserting_before(site.attended):  # what only the store reads dies before attention's output is born
                graph.call_function(append_, (*entering, *buffers, spec))
        for grown, new in zip(site.edge.grown, site.edge.new, strict=True) if not site.edge.writes else ():
            grown.replace_all_uses_with(new, delete_user_cb=lambda user: user.op != "output")
        plain = not site.sliding_window and not site.softcap and site.sink_score is None
        if site.mask is not None and site.mask_kind == "causal" and plain:
            _replace(site, causal, (query, key, value, ledger, valid, float(site.scale)))
        return
    mask = site.mask if site.mask_kind == "tensor" else None
    if site.edge.writes:
        mask = _as_if_grown(site, mask)
        for write in site.edge.writes if enters else ():
            graph.erase_node(write)
    head = (query, stored_key, new_value, mask, columns if mask is not None else None, ledger, positions, valid)
    how = (float(site.scale), site.sliding_window, site.softcap, site.sink_score, visible, enters)
    if not site.last:
        _replace(site, attend_, (*head, *buffers, spec, *how))
        return
    with graph.inserting_before(site.attended):
        rest = graph.call_function(operator.sub, (graph.call_method("size", (stored_key, 2)), site.last))
        whole = graph.call_function(torch.nn.functional.pad, (query, (0, 0, rest, 0)))
        out = graph.call_function(attend_, (whole, *head[1:], *buffers, spec, *how))
    _replace(site, operator.getitem, (out, (slice(None), slice(None), slice(-site.last, None))))


def _as_if_grown(site: Site, mask: Node) -> Node:
    """A mask of a static cache's columns and behind them, as if it had grown, those that are written now.

    Where they are written the cache holds nothing yet, so what the mask says there is not read.
    """
    graph = mask.graph
    with graph.inserting_before(site.attended):
        own = graph.call_method("index_select", (mask, 3, site.edge.writes[0].args[2]))
        return graph.call_function(torch.cat, ((mask, own), -1))


def _in_dtype(site: Site, node: Node) -> Node:
    """``node`` in the dtype of the site's attention."""
    if fake(node).dtype == site.dtype:
        return node
    with site.attended.graph.inserting_before(site.attended):
        cast = site.attended.graph.call_method("to", (node, site.dtype))
    cast.meta = {"example_value": fake(node).to(site.dtype)}
    return cast


def _replace(site: Site, operation: Any, arguments: tuple[Any, ...]) -> None:
    """Make attention the operation in place, since the next attention may be to what this one comes to."""
    node = site.attended
    node.op, node.target, node.args, node.kwargs = "call_function", operation, arguments, {}
