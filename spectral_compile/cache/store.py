"""A store: the compressed keys and values of one layer.

Appending writes to buffers in place. Whoever reads fewer columns than the store has (a crop, a shared prefix, an old reference)
forks it before appending, so that two generations never see each other's tokens.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from spectral_compile.cache.sharing import Prefix, SharedResults
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec.layout import Layout
from spectral_compile.foreign import remember
from spectral_compile.kernels import dense
from spectral_compile.kernels.advance.op import advance
from spectral_compile.kernels.append.later import KeptPrompt
from spectral_compile.kernels.append.op import append
from spectral_compile.kernels.buffers import UNUSED, Buffers, allocate
from spectral_compile.kernels.ledger import columns_of, rows_of
from spectral_compile.kernels.values import Chunk

_PREFIXES = 16  # weak references that a store keeps before it drops those that are dead


@functools.lru_cache(maxsize=1024)
def _placed(places: tuple[tuple[int, torch.Size, tuple[int, ...]], ...]) -> object:
    """One object for the same addresses, shapes and strides, which takes less to compare."""
    return object()


class SpectralStore:
    """One layer's keys and values, compressed: a log, to which keys and values are always appended together.

    ``pending`` holds a chunk that was appended eagerly to one role, "key" or "value", until the other role's comes.
    ``handle`` is the empty tensor that Dynamo sees in the place of the store (see ``tensor``).
    """

    def __init__(self, layout: Layout, timeline: Timeline, dtype: torch.dtype, buffers: Buffers | None = None) -> None:
        self.layout = layout
        self.timeline = timeline
        timeline.users.add(self)
        self.dtype = dtype
        self.kept: KeptPrompt | None = None  # what the buffers lack until they are read
        self.buffers = buffers or allocate(layout, timeline.batch, timeline.capacity, dtype, timeline.ledger.device)
        self._prefixes: list[weakref.ref[Prefix]] = []  # what live tensors read of this store, and some that are dead
        self.pending: dict[str, torch.Tensor] = {}
        self.derived = SharedResults()
        self.handle = torch.empty(0, device=self.device)
        remember(self.handle, self)

    @property
    def buffers(self) -> Buffers:
        if self.kept is not None:
            self.kept.store()
            self.kept = None
        return self._buffers

    @buffers.setter
    def buffers(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._placement: object = None

    @property
    def placement(self) -> object:
        """Stands for where and how the buffers lie: a recorded CUDA graph knows by one comparison whether it reads them.

        Those of a new cache often lie where those of an old one lay, as PyTorch hands out what it has been given back: a
        recording then serves both, and a text does not wait 50 ms for one of its own.
        """
        if self._placement is None:
            self._placement = _placed(tuple((x.data_ptr(), x.shape, x.stride()) for x in self.buffers))
        return self._placement

    @property
    def device(self) -> torch.device:
        return self.timeline.ledger.device

    def resize(self, ledger: torch.Tensor | None = None) -> None:
        """Take on the timeline's capacities, keeping every token.

        ``ledger`` [B, 6] says which tokens the buffers hold, where they are a step behind the timeline's own.
        """
        layout, capacity = self.layout, self.timeline.capacity
        ledger = self.timeline.ledger if ledger is None else ledger
        old = self.buffers
        recent = old.recent_slots(layout)
        if (old.k_codes.shape[2], recent, old.starts.shape[1]) == (
            capacity.coded,
            capacity.recent,
            0 if layout.lossless else capacity.segments,
        ):
            return
        new = allocate(layout, self.timeline.batch, capacity, self.dtype, self.device)
        for name in Buffers._fields:
            a, b = getattr(old, name), getattr(new, name)
            if name.partition("_")[2] not in ("exact", "recent", "sizes"):
                b[tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))] = a[
                    tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
                ]
        for side in ("k", "v"):
            a, b = getattr(old, f"{side}_exact"), getattr(new, f"{side}_exact")
            b[:, :, : layout.first_exact] = a[:, :, : layout.first_exact]
            rings = [(a[:, :, layout.first_exact :], b[:, :, layout.first_exact :])]
            if layout.recent_bits == 8:
                rings = [(getattr(old, f"{side}_{name}"), getattr(new, f"{side}_{name}")) for name in ("recent", "sizes")]
            for a, b in rings:
                if recent == capacity.recent:
                    b.copy_(a)
                    continue
                for row, held in enumerate(rows_of(ledger)):
                    end = max(held.coded_after, held.after - layout.first_exact)
                    slots = torch.arange(held.coded_after, end, device=self.device)
                    b[row, :, slots % capacity.recent] = a[row, :, slots % recent]
        self.buffers = new

    def add_prefix(self, prefix: Prefix) -> None:
        """Note that tensors read ``prefix`` of this store."""
        if len(self._prefixes) >= _PREFIXES:
            self._prefixes = [ref for ref in self._prefixes if ref() is not None]
        self._prefixes.append(weakref.ref(prefix))

    def longest_prefix(self) -> int:
        """The number of columns that some live tensor still reads; 0 where there is none."""
        alive = [prefix for ref in self._prefixes if (prefix := ref()) is not None]
        return max((self.timeline.length if prefix.length is None else prefix.length for prefix in alive), default=0)

    def map(self, timeline: Timeline, move: Callable[[torch.Tensor], torch.Tensor]) -> SpectralStore:
        """A new store on ``timeline``, with ``move`` applied to every buffer."""
        buffers = Buffers(*(move(b) for b in self.buffers))
        new = SpectralStore(self.layout, timeline, buffers.k_exact.dtype, buffers)
        new.pending = {role: move(x) for role, x in self.pending.items()}
        return new

    def cast(self, dtype: torch.dtype) -> None:
        """Convert what is in the model's dtype to ``dtype``, in place; codes, bases and scales stay."""
        self.buffers = self.buffers.cast(dtype, self.layout)
        self.pending = {role: x.to(dtype) for role, x in self.pending.items()}
        self.dtype = dtype

    @staticmethod
    def stack(stores: list[SpectralStore]) -> SpectralStore:
        """One store with the rows of all ``stores``, which have the same layout, dtype and number of columns."""
        first = stores[0]
        timelines = [store.timeline for store in stores]
        key = ("stack", *map(id, timelines))
        timeline = first.timeline.derived.get(key, first, lambda: Timeline.stack(timelines), timelines)
        widened = []
        for store in stores:
            own = store.timeline.map(torch.clone)
            own.widen(timeline.capacity)
            copied = store.map(own, torch.clone)
            copied.resize()
            widened.append(copied.buffers)
        return SpectralStore(first.layout, timeline, first.dtype, Buffers(*map(torch.cat, zip(*widened, strict=True))))

    def fork(self, length: int, timeline: Timeline | None = None) -> SpectralStore:
        """A copy of the first ``length`` columns, on ``timeline`` if that has been cropped already."""
        if timeline is None:
            timeline = self.timeline.derived.get(("crop", length), self, lambda: self.timeline.crop(length))
        new = self.map(timeline, torch.clone)
        new.pending = {}
        new.drop_segments()
        return new

    def join(self, timeline: Timeline) -> None:
        """Move to ``timeline``, which counts the same tokens."""
        self.timeline.users.discard(self)
        self.timeline = timeline
        timeline.users.add(self)

    def same_as(self, other: SpectralStore) -> bool:
        """Whether the two hold the same tokens in the same codes, so that one may replace the other."""
        alike = self.layout is other.layout and self.timeline.same_as(other.timeline)
        return alike and all(torch.equal(a, b) for a, b in zip(self.buffers, other.buffers, strict=True))

    def segments_used(self) -> int:
        """The number of segments in the row that has most."""
        return int((self.buffers.starts != UNUSED).sum(1).max()) if self.buffers.starts.numel() else 0

    def drop_segments(self) -> None:
        """Mark as unused the segments that begin after the timeline's last coded token."""
        starts = self.buffers.starts
        starts.masked_fill_(starts > columns_of(self.timeline.ledger).coded_after[:, None], UNUSED)

    def dense(self, role: str, length: int) -> torch.Tensor:
        """The keys as attention sees them (after RoPE), or the values: [B, H, length, D] in the model's dtype.

        Padding and columns after the last one are zeros. ``role`` is "key" or "value".
        """
        timeline = self.timeline
        b, (h, d) = timeline.batch, (self.layout.kv_heads, self.layout.head_dim)
        out = torch.zeros(b, h, length, d, dtype=self.dtype, device=self.device)
        known = min(length, timeline.length)
        for row, held in enumerate(rows_of(timeline.ledger)):
            positions = timeline.positions[row]
            both = dense.materialise(row, held.after, held.coded_after, positions, self.buffers, self.layout)
            places = timeline.columns[row, :known].nonzero().flatten()
            out[row, :, places] = both[role == "value"][:, : len(places)]
        if (new := self.pending.get(role)) is not None:
            new = new[:, :, : length - known]
            out[:, :, known : known + new.shape[2]] = new
        return out

    def append_eagerly(self, role: str, x: torch.Tensor) -> SpectralStore:
        """Append one role's chunk [B, H, n, D], keys after RoPE, outside of any graph; returns the store that holds it.

        Nothing is coded until the other role's chunk is there too. Positions are taken to run on from the last token's, and
        the keys are rotated back by them.
        """
        store = self.fork(self.timeline.length) if role in self.pending else self
        store.pending[role] = x
        if len(store.pending) < 2:
            return store
        key, value = store.pending["key"], store.pending["value"]
        store.pending = {}
        layout, count = store.layout, key.shape[2]
        old = store.timeline
        tokens = columns_of(old.ledger).after[:, None]
        last = old.positions.gather(1, (tokens - 1).clamp(min=0))
        ids = last.where(tokens > 0, -1) + torch.arange(1, count + 1, device=key.device)

        def advanced() -> Timeline:
            new = old.map(torch.clone)
            new.reserve(count)
            advance(new.ledger, new.positions, ids, None, key, layout)
            new.enter(count, None)
            new.source = old
            new.entered = new.ledger.clone()
            new.catch_up()
            return new

        store.join(old.derived.get(("append", count), store, advanced))
        store.resize(old.ledger)
        key = torch.stack([dense.unrotate(k, at, layout.rotary) for k, at in zip(key, ids, strict=True)])
        no_query, entered = key.new_zeros(key.shape), store.timeline.entered
        assert entered is not None, "``advanced`` sets it, and it is kept until the last layer has been appended to"
        append(Chunk(no_query, key, value), entered, store.buffers, layout)
        if not torch.equal(entered, store.timeline.ledger):
            store.catch_up()
        return store

    def catch_up(self) -> None:
        """Code the recent tokens that are due after ``Timeline.catch_up``: a step of no columns."""
        layout = self.layout
        nothing = torch.empty(self.timeline.batch, layout.kv_heads, 0, layout.head_dim, dtype=self.dtype, device=self.device)
        append(Chunk(nothing, nothing, nothing), self.timeline.ledger, self.buffers, layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralStore:
        key = id(self.timeline)
        if key not in memo:
            memo[key] = self.timeline.map(torch.clone)
        new = self.map(memo[key], torch.clone)
        memo[id(self)] = new
        return new
