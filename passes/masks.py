"""Classify masks by what they are, not by how they were built: run the part of the graph that makes one, and compare.

A mask that turns out to be causal, perhaps within a window and with columns of padding left out, need not be read at all:
the store knows which tokens it holds. Any other bool mask is handed to attention as it is.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch.fx import Node

from spectral_compile.passes.lift import (
    Unliftable,
    belongs_to_model,
    evaluate,
    free_symbols,
    hint,
    is_size,
    lift,
    numbers_in,
    placeholders_of,
    real_value,
    symbol_hints,
)
from spectral_compile.passes.trace import Site, Trace, fake, is_float

log = logging.getLogger(__name__)

_WIDEST = 1 << 19  # a window is looked for up to this many columns
_CELLS = 1 << 26  # and a mask is computed up to this many cells, four times as many where nothing is cached
_FAILURES = (Unliftable, RuntimeError, IndexError, TypeError, ValueError)  # of a piece of a graph that is run by itself
_FEWEST = 1025  # columns of a prompt that stand for more than that


def classify_masks(trace: Trace) -> None:
    """Set ``mask_kind``, ``padding`` and ``sliding_window`` of every site, or a refusal.

    Requires: edges.
    Gives: each matched site the ``mask_kind`` "causal", with the placeholder [B, T] that hides ``padding`` and a
    ``sliding_window`` (0 for none), or "tensor", a mask that must be read. All sites that have padding have the same. Refused
    are chunks that see their past without a mask, and masks that decode steps would have to read and that add numbers to scores
    or differ from head to head. The graph stays as it is; constants that were read are noted in the ``meta`` of placeholders.
    """
    known: dict[tuple[Any, ...], tuple[str, Node | None, int]] = {}
    for site in trace.matched:
        several = not (isinstance(count := fake(site.query).shape[2], int) and count == 1)
        if site.mask is None:
            if site.edge.past is not None and several:
                site.refusal = "a chunk attends to a cached past without a mask, so not causally"
            continue
        key = (site.mask, site.edge.past is None)
        if key not in known:
            known[key] = _classify(site)
            log.debug("mask %s of %s: (kind, padding, sliding_window) = %s", site.mask, site.where, known[key])
        site.mask_kind, site.padding, site.sliding_window = known[key]
        if site.edge.writes and site.edge.past is not None and site.mask_kind != "tensor":
            site.refusal = "the mask of its static cache does not say which columns are there"
        stays = site.edge.past is not None or site.edge.writes or trace.is_data(site.mask)  # what decode steps will have too
        if site.mask_kind == "tensor" and stays:
            mask = fake(site.mask)
            if mask.dtype != torch.bool:
                site.refusal = "its mask adds numbers to the scores"
            elif mask.ndim != 4 or mask.shape[1] != 1:
                site.refusal = "its mask is not [batch, 1, queries, keys]"
    paddings = {site.padding for site in trace.matched if site.padding is not None}
    for site in trace.matched:
        if len(paddings) > 1:
            site.refusal = "attention sites disagree about which tokens are padding"


def _classify(site: Site) -> tuple[str, Node | None, int]:
    """(kind, padding placeholder, sliding_window) of one mask."""
    tensors = [n for n in placeholders_of(site.mask) if isinstance(fake(n), torch.Tensor)]
    paddings = [n for n in tensors if fake(n).ndim == 2 and not fake(n).is_floating_point()]
    others = [n for n in tensors if n not in paddings and n not in (site.edge.past or ())]
    if fake(site.mask).dtype != torch.bool:
        return "tensor", None, 0
    if len(paddings) < 2 and not others:
        padding = paddings[0] if paddings else None
        with contextlib.suppress(*_FAILURES):
            windows = {_window_at(site, padding, extra) for extra in _extras(site, padding)}
            found = {w for w in windows if w}
            if None not in windows and len(found) < 2:
                return "causal", padding, found.pop() if found else 0
    hides = [n for n in paddings if site.edge.past is None and _hides_columns(site, n)]
    return "tensor", hides[0] if len(hides) == 1 else None, 0


def _hides_columns(site: Site, given: Node) -> bool:
    """Whether the mask of a prompt hides each column where ``given`` is 0, whatever other arguments of the call say."""
    rows, count = (hint(n) for n in fake(given).shape)
    if count != hint(fake(site.query).shape[2]) or count * count > 4 * _CELLS:
        return False
    generator = torch.Generator().manual_seed(0)

    def value(node: Node) -> Any:
        if is_size(node) or is_float(node) or belongs_to_model(node):
            return real_value(node)
        drawn = torch.randint(0, 2, hint(fake(node).shape), generator=generator)
        return drawn.to(fake(node).device, fake(node).dtype)

    run = lift(site.attended.graph.owning_module, [given], site.mask, value)
    valid = torch.rand(rows, count, generator=generator) < 0.7
    with contextlib.suppress(*_FAILURES):
        seen = run(valid.to(fake(given).dtype).to(fake(given).device)).cpu()
        return not bool((seen & valid[:, None, :, None] & ~valid[:, None, None, :]).any())
    return False


def _extras(site: Site, padding: Node | None) -> list[int]:
    """By how many columns the past is made longer than it was while tracing, where it may grow."""
    if site.edge.past is None or isinstance(fake(site.edge.past[0]).shape[2], int):
        return [0]
    if padding is not None and isinstance(fake(padding).shape[1], int):
        return [0]  # the graph then serves this one length
    past, count = hint(fake(site.edge.past[0]).shape[2]), hint(fake(site.query).shape[2])
    return [0, max(min(_WIDEST, _CELLS // count) - past - count, 7)]


def _window_at(site: Site, padding: Node | None, extra: int) -> int | None:
    """The window of the mask with a past ``extra`` columns longer, 0 where it hides nothing; None if it is not causal."""
    count = hint(fake(site.query).shape[2])
    past = hint(fake(site.edge.past[0]).shape[2]) if site.edge.past else 0
    graph = site.attended.graph.owning_module
    fixed, sizes, numbers = free_symbols(fake(site.query).shape[2]), symbol_hints(graph), {}
    if count * (past + extra + count) > 4 * _CELLS:
        if past + extra:
            raise Unliftable("the mask is too large to be probed")
        whole, count = count, _fewer(site, count)
        numbers = {whole: count}
        sizes = {symbol: count if size == whole else size for symbol, size in sizes.items()}
    for symbol, size in sizes.items():
        if size in (past, past + count) and symbol not in fixed:
            sizes[symbol] = size + extra

    def value(node: Node) -> Any:
        if is_size(node):
            size = evaluate(fake(node), sizes)
            return numbers.get(size, size) if isinstance(size, int) else torch.Size(numbers.get(n, n) for n in size)
        if extra:
            raise Unliftable("the mask depends on a tensor that may grow")
        return real_value(node)

    total = past + extra + count
    q, k = torch.arange(past + extra, total)[:, None], torch.arange(total)[None]
    run = lift(graph, [padding] if padding else [], site.mask, value, numbers)
    rows = hint(fake(padding).shape[0]) if padding else 1
    columns = hint(fake(padding).shape[1]) + extra if padding else total
    columns = numbers.get(columns, columns)
    if columns != total:
        return None
    sliding_window = 0
    for trial in range(3 if padding else 1):
        valid = torch.ones(rows, total, dtype=torch.bool)
        if trial:
            generator = torch.Generator().manual_seed(trial)
            valid = torch.rand(rows, total, generator=generator) < 0.7
            valid[:, -1] = True
        given = [valid.to(fake(padding).dtype).to(fake(padding).device)] if padding else []
        mask = run(*given).cpu()
        if mask.shape[-2:] != (count, total) or mask.shape[1] != 1:
            return None
        seen = mask[:, 0]
        if not trial:
            nearest = int(seen[0, -1].int().argmax())  # the first key that the last query sees
            sliding_window = total - nearest if nearest else 0
        expected = (k <= q) & (k > q - sliding_window if sliding_window else True) & valid[:, None]
        real = valid[:, past + extra :, None]  # what padding attends to is of no consequence
        if not torch.equal(*torch.broadcast_tensors(seen & real, expected & real)):
            return None
    return sliding_window


def _fewer(site: Site, count: int) -> int:
    """How many columns show what a mask does to ``count``, if its sizes are replaced: more than any number in it reaches."""
    reach = max((abs(x) for x in numbers_in(site.mask) if abs(x) < count), default=0)
    fewer = max(_FEWEST, 2 * int(reach) + 1)
    if fewer >= count or fewer * fewer > 4 * _CELLS:
        raise Unliftable("the mask is too large to be probed")
    return fewer
