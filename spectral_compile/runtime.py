"""Binds stores to a compiled graph: takes them off the arguments, feeds their buffers in, and wraps what comes out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from spectral_compile.cache.sharing import Prefix
from spectral_compile.cache.store import SpectralStore
from spectral_compile.cache.timeline import Timeline
from spectral_compile.config import SpectralConfig
from spectral_compile.kernels.append.later import keeping
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.padding import unpadded
from spectral_compile.plan import Plan
from spectral_compile.replay import Replay
from spectral_compile.report import GraphReport, Refusal, SpectralWarning, count_decode, record
from spectral_compile.tensor import Kind, SpectralTensor, shape_of, store_of

log = logging.getLogger(__name__)


class SizeReader:
    """Reads a size that was symbolic while tracing off the arguments of a call: an integer, or a dimension of a tensor.

    ValueError where ``size`` is symbolic and no argument of ``examples``, those of the trace, has it.
    """

    def __init__(self, size: int | torch.SymInt, examples: list[Any]) -> None:
        self.fixed: int | None = None
        if isinstance(size, int):
            self.fixed = size
            return
        self.place: tuple[int, int | None]
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
    """A compiled graph that takes and returns ``SpectralTensor``s where Dynamo's graph has dense keys and values."""

    def __init__(
        self,
        plan: Plan,
        compiled: Callable[..., Any],
        config: SpectralConfig,
        examples: list[Any],
        dense: Callable[..., Any],
        keeps: Sequence[object] = (),
        replay: Replay | None = None,
    ) -> None:
        """``replay`` is called instead of ``compiled`` where steps are recorded as CUDA graphs, and ``dense``, the graph as it
        came, after ``stay_dense``. ``examples`` are the fake arguments of that graph. What ``compiled`` refers to only weakly
        is in ``keeps``, and lives as long as this does."""
        self.plan, self.compiled, self.config, self.dense, self.replay = plan, compiled, config, dense, replay
        self.served = False  # some step on a cache that this prefill began was compressed
        self.stays_dense = False
        self._keeps = keeps
        self.batch, self.count = SizeReader(plan.batch, examples), SizeReader(plan.count, examples)
        places, self._converted = _places(plan)
        self._pick = itemgetter(*places)
        self._outputs = [(i, None if what == "result" else self._kind(what, i)) for what, i in plan.outputs]
        self._static = any(site.slots is not None for site in plan.sites)
        self._on_gpu = plan.sites[0].device.type != "cpu"
        log.debug("bound: %s with %d stores and %d inputs", plan.kind, len(plan.sites), len(plan.inputs))
        if plan.sites[0].device.type == "cuda":
            from spectral_compile.kernels.rotary import tables  # Triton is there only where a GPU is

            for site in plan.sites:  # made now: memory allocated while a CUDA graph is recorded belongs to that graph
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
            results = self._run(inputs, stores)
        else:
            results = self.replay(inputs, (timeline.batch, timeline.positions.shape[1], *[store.placement for store in stores]))
        timeline.enter(count, valid)
        if count == 1 and timeline.catch_up():
            for store in stores:
                store.catch_up()
        if count != 1 or timeline.next_due <= timeline.length:
            self._settle(timeline, stores)
        return self._wrap(results, stores)

    def _run(self, inputs: tuple[Any, ...], stores: list[SpectralStore]) -> Sequence[Any]:
        """Run the graph. What operations keep of a short prompt is handed to the stores, which write it when they are read."""
        if self.plan.kind != "prefill":
            return self.compiled(*inputs)
        timeline = stores[0].timeline
        with unpadded(not timeline.padded), keeping([store.buffers for store in stores]) as prompt:
            results = self.compiled(*inputs)
        for store in stores:
            store.kept = prompt
        return results

    def stay_dense(self, refusal: Refusal) -> None:
        """From now on run prompts densely, unless some step on their caches was compressed; warns, and records why."""
        if not (self.served or self.stays_dense):
            self.stays_dense = True
            why = Refusal(refusal.where, f"its decode steps are not compressed, so prompts stay dense too: {refusal.reason}")
            record(GraphReport("prefill", len(self.plan.sites), 0, (why,)))
            warnings.warn(str(why), SpectralWarning, stacklevel=2)

    def _begin(self, arguments: tuple[Any, ...], count: int) -> tuple[list[SpectralStore], torch.Tensor | None]:
        """Empty stores for a prompt of ``count`` columns, and which of these are tokens: bool [B, count], or None for all."""
        sites = self.plan.sites
        valid = self._valid(arguments, 0, count)
        tokens = count
        if valid is not None:
            tokens = int(valid.sum(1).min())
        timeline = Timeline(sites[0].layout, self.batch(arguments), count, tokens, sites[0].device, self.config.headroom)
        timeline.padded, timeline.prefill, timeline.model = tokens < count, self, self.plan.fingerprint
        log.debug("a prompt of %d rows and %d columns gets stores of %s", timeline.batch, count, timeline.capacity)
        return [SpectralStore(site.layout, timeline, site.dtype) for site in sites], valid

    def _resume(self, arguments: tuple[Any, ...], count: int) -> tuple[list[SpectralStore], torch.Tensor | None]:
        """The stores of the arguments, ready to be appended to, and which of the new columns are tokens, as in ``_begin``.

        RuntimeError where the arguments are not the layers of one cache, or were written to by halves, or where the mask
        shows what was never stored.
        """
        pasts = [site.past for site in self.plan.sites if site.past is not None]  # all of them: only a prefill has none
        keys, values = ([arguments[past[role]] for past in pasts] for role in range(2))
        prefix, length, timeline = keys[0].prefix, keys[0].length, keys[0].store.timeline
        stores = [key.store for key in keys]
        if timeline.prefill is not None:
            timeline.prefill.served = True
        # True for what one step of ours returned, which is by far the most frequent case and needs no closer look
        alike = (
            {x.prefix for x in keys + values} == {prefix}
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
            # the cache was copied layer by layer, or only some layers of it: these get a timeline that no other cache advances
            timeline = timeline.map(torch.clone)
            for store in stores:
                store.join(timeline)
        if len(set(stores)) < len(stores):  # one tensor stands in two layers, which append different tokens to it
            stores = [s.map(timeline, torch.clone) if s in stores[:i] else s for i, s in enumerate(stores)]
        if length != timeline.length or any(store.pending for store in stores):
            if self._static:
                raise RuntimeError("keys were written to this static cache and values were not: start with a new cache")
            stores = self._fork(stores, length)
            timeline = stores[0].timeline
        if timeline.reserve(count):
            log.debug("stores grow to %s", timeline.capacity)
            for store in stores:
                store.resize()
        # a decode step on a GPU does not wait for the device, unless strict, and so learns of a wrong mask one step late
        wait = self.plan.kind == "extend" or self.config.strict or not self._on_gpu
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
        """Shrink what was reserved before it was known how much is needed: places of recent tokens, and segments."""
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
        """Stores with ``length`` columns: these, truncated in place, if no live tensor reads more of them, or else copies."""
        timeline = stores[0].timeline
        if length < timeline.length and all(store.longest_prefix() <= length for store in stores):
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
        """The inputs of the compiled graph in its order: hundreds at every step, so by one ``itemgetter``."""
        timeline = stores[0].timeline
        given: list[Any] = [timeline.ledger, timeline.positions, timeline.columns, timeline.visible, valid]  # as in _SHARED
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
        """What Dynamo's graph would return, with each key and value as a ``SpectralTensor``; all share one ``Prefix``."""
        sites, timeline, prefill = self.plan.sites, stores[0].timeline, self.plan.kind == "prefill"
        prefix = Prefix(None if self._static else timeline.length)
        for store in stores:
            store.add_prefix(prefix)
        out, batch, length = [], timeline.batch, timeline.length
        for i, kind in self._outputs:
            if kind is None:
                out.append(results[i])
                continue
            store, layout = stores[i], kind.layout
            columns = length if (slots := sites[i].slots) is None else slots
            shape = torch.Size((batch, layout.kv_heads, columns, layout.head_dim))
            out.append(SpectralTensor(store.handle, shape, kind, store, prefix))
            if prefill and not kind.static:
                # Dynamo then traces the next call for all lengths, and not first for this one
                torch._dynamo.maybe_mark_dynamic(out[-1], 2)
        return tuple(out)


def _places(plan: Plan) -> tuple[list[int], list[tuple[int, Callable[[Any, Timeline], Any]]]]:
    """The place of each input of a compiled graph among what ``BoundGraph._feed`` lines up: ``_SHARED``, the buffers of all
    stores, the arguments of the call. Then the places of arguments that are converted first, and by what."""
    fields = Buffers._fields
    places: list[int] = []
    converted: list[tuple[int, Callable[[Any, Timeline], Any]]] = []
    for source in plan.inputs.values():
        match source:
            case ("buffer", i, name):
                places.append(len(_SHARED) + i * len(fields) + fields.index(name))
            case (what,):
                places.append(_SHARED.index(what))
            case (what, i):
                places.append(len(_SHARED) + len(plan.sites) * len(fields) + i)
                if what != "argument":
                    converted.append((places[-1], _CONVERSIONS[what]))
    return places, converted


class DenseGraph:
    """A compiled graph that was not rewritten, for calls with compressed tensors among the arguments: these are decoded, or
    only their shapes are passed on where their indices are in ``shapes``.

    ``refused`` is why it is no compressed decode step, where it is a decode step. The prefill that began the cache then stays
    dense (``BoundGraph.stay_dense``), since every conversation would be compressed only to be decoded.
    """

    def __init__(self, compiled: Callable[..., Any], shapes: set[int], refused: Refusal | None) -> None:
        self.compiled, self.shapes, self.refused = compiled, shapes, refused

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*(self._given(i, x) if isinstance(x, SpectralTensor) else x for i, x in enumerate(arguments)))

    def _given(self, i: int, tensor: SpectralTensor) -> torch.Tensor:
        if i in self.shapes:
            return shape_of(tensor)
        dense = densely(tensor)
        if self.refused and (prefill := store_of(tensor).timeline.prefill) is not None:
            prefill.stay_dense(self.refused)
        return dense


def densely(tensor: SpectralTensor) -> torch.Tensor:
    """``tensor`` decoded, which is counted. RuntimeError for a static cache, to which the graph would write, or if strict."""
    if tensor.kind.static:
        raise RuntimeError(
            "a graph that was not compressed would write to a compressed static cache: use the default DynamicCache; "
            "reports() says why it was not"
        )
    count_decode("a graph in which not every attention site matched", tensor.kind.strict)
    return tensor.dense()


_SHARED = ("ledger", "positions", "columns", "visible", "valid")  # inputs that all layers share, in the order of ``_feed``
_CONVERSIONS: dict[str, Callable[[Any, Timeline], Any]] = {
    "dense": lambda tensor, timeline: densely(tensor),
    "shape": lambda tensor, timeline: shape_of(tensor),
    "number": lambda number, timeline: torch.full((), number, device=timeline.ledger.device),
}
