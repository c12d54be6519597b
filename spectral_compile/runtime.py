"""Binds stores to a compiled graph: takes them off the arguments, feeds their buffers in, and wraps what comes out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from spectral_compile.config import SpectralConfig
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.passes.clean_up import shape_of
from spectral_compile.passes.rewrite import Plan
from spectral_compile.replay import Replay
from spectral_compile.report import GraphReport, Refusal, SpectralWarning, count_decode, record
from spectral_compile.store import SpectralStore, Timeline, View
from spectral_compile.tensor import Kind, SpectralTensor

log = logging.getLogger(__name__)


class SizeReader:
    """Reads a size that was symbolic while tracing off the arguments of a call."""

    def __init__(self, size: Any, examples: list[Any]) -> None:
        self.fixed = size if isinstance(size, int) else None
        if self.fixed is not None:
            return
        wanted = size.node.expr
        for i, example in enumerate(examples):
            if isinstance(example, torch.SymInt) and example.node.expr == wanted:
                self.place = (i, None)
                return
            for dim, n in enumerate(example.shape if isinstance(example, torch.Tensor) else ()):
                if isinstance(n, torch.SymInt) and n.node.expr == wanted:
                    self.place = (i, dim)
                    return
        raise ValueError(f"the size {wanted} stands in no argument of the graph")

    def __call__(self, arguments: tuple[Any, ...]) -> int:
        if self.fixed is not None:
            return self.fixed
        i, dim = self.place
        return int(arguments[i] if dim is None else arguments[i].shape[dim])


class BoundGraph:
    """A compiled graph that takes and returns compressed caches where Dynamo believes that there are dense ones."""

    def __init__(
        self,
        plan: Plan,
        compiled: Callable[..., Any],
        config: SpectralConfig,
        examples: list[Any],
        dense: Callable[..., Any],
        parts: Sequence[object] = (),
        replay: Replay | None = None,
    ) -> None:
        """``replay`` is called instead of ``compiled`` where steps are recorded, and ``dense``, the graph as it came, once it
        is known that no step would be compressed. ``parts`` of ``compiled`` live as long as this."""
        self.plan, self.compiled, self.config, self.dense, self.replay = plan, compiled, config, dense, replay
        self.served = self.stays_dense = False  # whether steps on what it stored were compressed; whether it stores no more
        self._parts = parts
        self.batch, self.count = SizeReader(plan.batch, examples), SizeReader(plan.count, examples)
        places, self._converted = _places(plan)
        self._pick = itemgetter(*places)
        self._outputs = [(i, None if what == "result" else self._kind(what, i)) for what, i in plan.outputs]
        self._static = any(site.slots is not None for site in plan.sites)
        self._on_gpu = plan.sites[0].device.type != "cpu"
        log.debug("bound: %s with %d stores and %d inputs", plan.kind, len(plan.sites), len(plan.inputs))
        if plan.sites[0].device.type == "cuda":
            from spectral_compile.kernels.rotary import tables  # Triton is there only where a GPU is

            for site in plan.sites:  # what outlives a CUDA graph must not be made while one is recorded
                tables(site.layout.rotary, site.device, site.dtype)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        if self.stays_dense:
            return self.dense(*arguments)
        count = self.count(arguments)
        if self.plan.kind == "prefill":
            stores, valid = self._begin(arguments, count)
        else:
            stores, valid = self._resume(arguments, count)
        timeline = stores[0].timeline
        inputs = self._feed(arguments, stores, valid)
        if self.replay is None:
            results = self.compiled(*inputs)
        else:
            results = self.replay(inputs, (timeline.batch, timeline.positions.shape[1], *[store.edition for store in stores]))
        timeline.enter(count, valid)
        if count == 1 and timeline.catch_up():
            for store in stores:
                store.catch_up()
        if count != 1 or timeline.next_due <= timeline.length:
            self._settle(timeline, stores)
        return self._wrap(results, stores)

    def stay_dense(self, refusal: Refusal) -> None:
        """Compress no more prompts if none of their steps has been compressed, and say why."""
        if not (self.served or self.stays_dense):
            self.stays_dense = True
            why = Refusal(refusal.where, f"its decode steps are not compressed, so prompts stay dense too: {refusal.reason}")
            record(GraphReport("prefill", len(self.plan.sites), 0, (why,)))
            warnings.warn(str(why), SpectralWarning, stacklevel=2)

    def _begin(self, arguments: tuple[Any, ...], count: int) -> tuple[list[SpectralStore], torch.Tensor | None]:
        """Empty stores for a prompt, and which of its columns are tokens."""
        sites = self.plan.sites
        valid = self._valid(arguments, 0, count)
        tokens = count
        if valid is not None:
            tokens = int(valid.sum(1).min())
        timeline = Timeline(sites[0].layout, self.batch(arguments), count, tokens, sites[0].device, self.config.headroom)
        timeline.padded, timeline.prefill = tokens < count, self
        log.debug("a prompt of %d rows and %d columns gets stores of %s", timeline.batch, count, timeline.capacity)
        return [SpectralStore(site.layout, timeline, site.dtype) for site in sites], valid

    def _resume(self, arguments: tuple[Any, ...], count: int) -> tuple[list[SpectralStore], torch.Tensor | None]:
        """The stores that the arguments read, ready to be appended to, and which of the new columns are tokens."""
        keys, values = ([arguments[site.past[role]] for site in self.plan.sites] for role in range(2))
        view, length, timeline = keys[0].reach, keys[0].length, keys[0].store.timeline
        stores = [key.store for key in keys]
        if timeline.prefill is not None:
            timeline.prefill.served = True
        # what the step before has returned is one view of stores on one timeline; all else is looked at closely
        alike = (
            {x.reach for x in keys + values} == {view}
            and stores == [value.store for value in values]
            and {store.timeline for store in stores} == {timeline}
        )
        if not alike:
            if any(x.length != length for x in keys + values):
                raise RuntimeError("the layers of the compressed cache have different lengths")
            if any(k.store is not v.store and not k.store.same_as(v.store) for k, v in zip(keys, values, strict=True)):
                raise RuntimeError("keys and values of the compressed cache belong to different caches")
            if any(not timeline.same_as(store.timeline) for store in stores):
                raise RuntimeError("the layers of the compressed cache hold different tokens")
        if len(timeline.users) > len(stores) or not (alike or all(store.timeline is timeline for store in stores)):
            # copied layer by layer, or only in part: these layers get books that no other cache writes in
            timeline = timeline.map(torch.clone)
            for store in stores:
                store.join(timeline)
        if len(set(stores)) < len(stores):  # what two layers were given grows for each of them by itself
            seen: set[SpectralStore] = set()
            stores = [s.map(timeline, torch.clone) if s in seen or seen.add(s) else s for s in stores]
        if length != timeline.length or any(store.pending for store in stores):
            if self._static:
                raise RuntimeError("keys were written to this static cache and values were not: start with a new cache")
            stores = self._fork(stores, length)
            timeline = stores[0].timeline
        if timeline.reserve(count):
            log.debug("stores grow to %s", timeline.capacity)
            for store in stores:
                store.resize()
        wait = self.plan.kind == "extend" or self.config.strict or not self._on_gpu  # which a lenient decode does not
        if self.plan.padding is not None:
            timeline.hide(arguments[self.plan.padding][:, :length], wait)
        if timeline.padded and not self.plan.masked and self.plan.padding is None:
            raise RuntimeError(
                "earlier calls on this cache masked tokens and this one does not: pass the mask of all tokens so far"
            )
        valid = self._valid(arguments, length, count)
        if wait and valid is not None:
            timeline.padded |= not bool(valid.all())
        return stores, valid

    @staticmethod
    def _settle(timeline: Timeline, stores: list[SpectralStore]) -> None:
        """Give back what was reserved and is not needed."""
        settled = timeline.settle()
        if timeline.offered:
            used = max(store.segments_used() for store in stores)
            settled |= used < timeline.capacity.segments
            timeline.capacity = timeline.capacity._replace(segments=used)
            timeline.offered = False
        if settled:
            for store in stores:
                store.resize()

    @staticmethod
    def _fork(stores: list[SpectralStore], length: int) -> list[SpectralStore]:
        """Stores with ``length`` columns: these ones, if nobody can read what comes after, else copies."""
        timeline = stores[0].timeline
        if length < timeline.length and all(store.longest_view() <= length for store in stores):
            timeline.truncate(length)
            for store in stores:
                store.pending = {}
                store.drop_segments()
            return stores
        log.debug("%d of %d columns are continued: they are copied to stores of their own", length, timeline.length)
        cropped = timeline.crop(length)
        return [store.fork(length, cropped) for store in stores]

    def _valid(self, arguments: tuple[Any, ...], length: int, count: int) -> torch.Tensor | None:
        if self.plan.padding is None:
            return None
        return arguments[self.plan.padding][:, length : length + count].bool()

    def _feed(self, arguments: tuple[Any, ...], stores: list[SpectralStore], valid: torch.Tensor | None) -> tuple[Any, ...]:
        """The inputs of the compiled graph, which are hundreds at every step."""
        timeline = stores[0].timeline
        given = [timeline.ledger, timeline.positions, timeline.columns, timeline.visible, valid]
        for store in stores:
            given += store.buffers
        given += arguments
        for place, convert in self._converted:
            given[place] = convert(given[place], timeline)
        return self._pick(given)

    def _kind(self, role: str, i: int) -> Kind:
        site = self.plan.sites[i]
        return Kind(site.dtype, role, site.layout, self.config.strict, site.slots is not None)

    def _wrap(self, results: Sequence[Any], stores: list[SpectralStore]) -> tuple[Any, ...]:
        """What the graph returns, with all stores as tensors, which are one view of the cache."""
        sites, timeline, prefill = self.plan.sites, stores[0].timeline, self.plan.kind == "prefill"
        view = View(None if self._static else timeline.length)
        for store in stores:
            store.add_view(view)
        out, batch, length = [], timeline.batch, timeline.length
        for i, kind in self._outputs:
            if kind is None:
                out.append(results[i])
                continue
            store, layout = stores[i], kind.layout
            shape = (batch, layout.kv_heads, sites[i].slots if kind.static else length, layout.head_dim)
            out.append(SpectralTensor(store.handle, shape, kind, store, view))
            if prefill and not kind.static:
                # the next call then traces a graph for every length at once
                torch._dynamo.maybe_mark_dynamic(out[-1], 2)
        return tuple(out)


def _places(plan: Plan) -> tuple[list[int], list[tuple[int, Callable[[Any, Timeline], Any]]]]:
    """Where the inputs of a compiled graph stand among the books, the stores' buffers and the arguments, in this order, and
    which of the arguments are converted first."""
    books, fields = ("ledger", "positions", "columns", "visible", "valid"), Buffers._fields
    places, converted = [], []
    for source in plan.inputs.values():
        match source:
            case ("buffer", i, name):
                places.append(len(books) + i * len(fields) + fields.index(name))
            case (what,):
                places.append(books.index(what))
            case (what, i):
                places.append(len(books) + len(plan.sites) * len(fields) + i)
                if what != "argument":
                    converted.append((places[-1], _CONVERSIONS[what]))
    return places, converted


class DenseGraph:
    """A compiled graph that was not rewritten but is given compressed tensors: decoded, or those at ``shapes`` as shapes.

    Where it is a decode step, ``refused`` for a reason, the graph that compressed the prompt does so no more if there are no
    other steps: each conversation would be decoded.
    """

    def __init__(self, compiled: Callable[..., Any], shapes: set[int], refused: Refusal | None) -> None:
        self.compiled, self.shapes, self.refused = compiled, shapes, refused

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*(self._given(i, x) if isinstance(x, SpectralTensor) else x for i, x in enumerate(arguments)))

    def _given(self, i: int, tensor: SpectralTensor) -> torch.Tensor:
        if i in self.shapes:
            return shape_of(tensor)
        dense = densely(tensor)
        if self.refused and (prefill := tensor.store.timeline.prefill) is not None:
            prefill.stay_dense(self.refused)
        return dense


def densely(tensor: SpectralTensor) -> torch.Tensor:
    """``tensor`` decoded, which is counted; RuntimeError for a static cache, to which the graph would write."""
    if tensor.kind.static:
        raise RuntimeError(
            "a graph that was not compressed would write to a compressed static cache: use the default DynamicCache; "
            "reports() says why it was not"
        )
    count_decode("a graph in which not every attention site matched", tensor.kind.strict)
    return tensor.dense()


_CONVERSIONS: dict[str, Callable[[Any, Timeline], Any]] = {
    "dense": lambda tensor, timeline: densely(tensor),
    "shape": lambda tensor, timeline: shape_of(tensor),
    "number": lambda number, timeline: torch.full((), number, device=timeline.ledger.device),
}
