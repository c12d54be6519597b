"""The compressed cache as a log: a timeline that all layers share, and one store of codes a layer.

Appending mutates buffers. A reader that remembers fewer columns than the log has (a crop, a shared prefix, an old reference)
forks it before it appends, so that two generations never see each other's tokens.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.foreign import remember
from spectral_compile.kernels import dense
from spectral_compile.kernels.advance.hide import REVEALS, hide
from spectral_compile.kernels.advance.op import advance
from spectral_compile.kernels.append.op import append
from spectral_compile.kernels.buffers import UNUSED, Buffers, Capacity, allocate
from spectral_compile.kernels.values import Chunk

# coded slots that a new log has to spare, which double whenever they are used up: a GPU must then record its graphs again
HEADROOM = {"cpu": 64, "cuda": 1024}
_VIEWS = 16  # of which a store keeps note until it looks which ones are gone


class View:
    """How many columns some tensors read; None for all that there are. It lives as long as one of these tensors."""

    __slots__ = ("__weakref__", "length")

    def __init__(self, length: int | None) -> None:
        self.length = length


class Shared:
    """Results that several users of one object ask for one by one, each of them once, and must share.

    transformers reorders or crops a cache layer by layer, keys and then values: what the first call builds, the others find
    here. A user that asks again begins a new cache, and gets a result of its own; each gets them in the order in which they
    were built.
    """

    def __init__(self) -> None:
        self._known: dict[Any, list[tuple[weakref.ref[Any], set[int], Any]]] = {}

    def get(self, key: Any, user: Any, build: Callable[[], Any], holder: Any = None) -> Any:
        """``build()``, or what another user's call with this ``key`` gave; ``holder`` is kept, and with it an id in ``key``."""
        known = self._known[key] = [entry for entry in self._known.get(key, []) if entry[0]() is not None]
        for held, users, _ in known:
            if id(user) not in users and (result := held()) is not None:
                users.add(id(user))
                return result
        result = build()
        known.append((weakref.ref(result), {id(user)}, holder))
        return result

    def clear(self) -> None:
        self._known.clear()


class Timeline:
    """What is the same in every layer of a cache: columns, positions, and how many tokens are coded.

    ``length`` counts columns as transformers does, padding included; it lives on the host. ``ledger`` int64 [B, 6],
    ``positions`` int32 [B, slots + 1] and ``columns`` bool [B, columns] (which ones are tokens) live on the device, and
    ``visible`` uint8 [B, slots + 1] and ``flags`` int32 [B]: what the mask of a step says of the tokens before it (``hide``).
    """

    def __init__(
        self, layout: Layout, batch: int, count: int, tokens: int, device: torch.device, headroom: int | None = None
    ) -> None:
        """Books for ``batch`` rows; the first step brings ``count`` columns, in the shortest row ``tokens`` tokens.

        ``headroom`` coded slots are there to spare, None takes the device's ``HEADROOM``.
        """
        self.layout = layout
        self.length = 0
        self.spare = headroom or HEADROOM.get(device.type, HEADROOM["cpu"])
        self.waiting = tokens - layout.first_exact - layout.recent < layout.first  # some row has no basis yet
        self.next_due = 0  # the least length at which a row may have a segment to begin, as far as the host knows
        self.offered = False  # a chunk was long enough for a basis of its own
        self.padded = False  # columns of padding were left out
        self.capacity = Capacity(coded=0, recent=0 if self.waiting else layout.recent + layout.block, segments=0)
        self.ledger = torch.tensor([[0, 0, 0, 0, 1, 0]], device=device).repeat(batch, 1)
        self.positions = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        self.columns = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.visible = torch.zeros(batch, 0, dtype=torch.uint8, device=device)
        self.flags = torch.zeros(batch, dtype=torch.int32, device=device)
        self._told: torch.Tensor | None = None  # the flags of the step before, on their way from a GPU
        self.prefill: Any = None  # the bound graph that began it, where one did
        self.derived = Shared()
        self.source: Timeline | None = None  # kept while the layers of a cache are appended to one by one
        self.entered: torch.Tensor | None = None  # and the ledger of their step, before it was caught up with
        self.users: weakref.WeakSet[SpectralStore] = weakref.WeakSet()
        self.reserve(count)

    @property
    def batch(self) -> int:
        return self.ledger.shape[0]

    def reserve(self, count: int) -> bool:
        """Make room for ``count`` more columns; whether capacities changed, and stores must follow."""
        layout, old = self.layout, self.capacity
        end = self.length + count
        ready = end - layout.first_exact - layout.recent
        coded = -(-max(0, ready) // layout.block) * layout.block
        recent = old.recent
        if self.waiting:
            coded = coded if ready >= layout.first else 0
            recent = min(end - layout.first_exact, layout.recent + layout.first)
        self.offered = old.segments > 0 and not layout.segment and count >= layout.warmup + layout.block
        if coded <= old.coded and recent <= old.recent and end <= self.columns.shape[1] and not self.offered:
            return False
        if 0 < old.coded < coded and count <= self.spare:  # else a chunk came, which is no reason to expect more
            self.spare *= 2
        segments = old.segments + (old.segments == 0 and coded > 0) + self.offered
        coded = coded + self.spare if coded > old.coded else old.coded
        if self.waiting:
            recent = min(max(recent + self.spare, 2 * old.recent), layout.recent + layout.first)
        if layout.segment:
            segments = old.segments + -(-(coded - old.coded) // layout.segment) + 1
        self.widen(Capacity(coded, max(recent, old.recent), segments))
        return True

    def widen(self, capacity: Capacity) -> None:
        """Take on larger capacities."""
        self.capacity = capacity
        columns = self.layout.first_exact + capacity.coded + capacity.recent + self.layout.block
        self.positions = _widen(self.positions, columns + 1)
        self.columns, self.visible = _widen(self.columns, columns), _widen(self.visible, columns + 1)

    def settle(self) -> bool:
        """Drop the wide window of a young log once every row has a basis; whether capacities changed."""
        ready = self.length - self.layout.first_exact - self.layout.recent
        if not self.waiting or ready < self.layout.first or bool(self.ledger[:, 4].any()):
            return False
        self.waiting = False
        self.capacity = self.capacity._replace(recent=self.layout.recent + self.layout.block)
        return True

    def enter(self, count: int, valid: torch.Tensor | None) -> None:
        """Note ``count`` columns that the graph has appended; ``valid`` bool [B, count] are the tokens among them."""
        self.columns[:, self.length : self.length + count] = True if valid is None else valid
        self.length += count
        self.source = self.entered = None
        self.derived.clear()

    def hide(self, shown: torch.Tensor, wait: bool) -> None:
        """Note what the mask of a step says of the columns before it, [B, length], where 0 hides.

        RuntimeError where it shows one that no token was stored of; without ``wait`` that may come a step late on a GPU.
        """
        if self._told is not None:
            self._refuse_revealed(self._told)
        hide(self.visible, self.flags, self.columns, shown)
        if wait or not self.flags.is_cuda:
            self._refuse_revealed(self.flags)
            return
        if self._told is None:
            self._told = torch.zeros(self.batch, dtype=torch.int32, pin_memory=True)
        self._told.copy_(self.flags, non_blocking=True)

    @staticmethod
    def _refuse_revealed(flags: torch.Tensor) -> None:
        if max(flags.tolist()) >= REVEALS:
            raise RuntimeError(
                "attention_mask shows tokens that earlier calls on this cache masked, of which nothing was kept: start with a"
                " new cache"
            )

    def due(self) -> bool:
        """Whether steps of one column have left a row with enough tokens to begin a segment; reads the device only then."""
        layout = self.layout
        if not (self.waiting or layout.segment) or self.length < self.next_due:
            return False
        missing = [
            layout.first_exact + layout.recent + (layout.first if waits else coded + layout.block) - tokens
            for _, _, tokens, coded, waits, _ in self.ledger.tolist()
            if waits or layout.segment
        ]
        self.next_due = self.length + min(missing, default=0)  # a column brings a row one token at most
        return bool(missing) and self.next_due <= self.length

    def catch_up(self) -> bool:
        """If a segment is due, enter a step of no columns; whether stores must then do the same: ``SpectralStore.catch_up``."""
        if not self.due():
            return False
        nothing = torch.empty(self.batch, self.layout.kv_heads, 0, self.layout.head_dim, device=self.ledger.device)
        advance(self.ledger, self.positions, None, None, nothing, self.layout)
        return True

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Timeline:
        """A timeline of its own with ``move`` applied to every tensor."""
        new = copy.copy(self)
        new.ledger, new.positions, new.columns, new.visible, new.flags = map(move, self.tensors())
        new._told = None
        new.derived, new.source, new.entered, new.users = Shared(), None, None, weakref.WeakSet()
        return new

    def crop(self, length: int) -> Timeline:
        """A timeline of its own with the first ``length`` columns."""
        new = self.map(torch.clone)
        new.truncate(length)
        return new

    def truncate(self, length: int) -> None:
        """Forget all columns from ``length`` on, in place."""
        self.length = length
        tokens = self.columns[:, :length].sum(1)
        coded = self.ledger[:, 3].minimum((tokens - self.layout.first_exact).clamp(min=0))
        self.ledger[:, 2], self.ledger[:, 3] = tokens, coded
        self.next_due = 0  # padding may have gone, and no tokens
        self.derived.clear()

    def same_as(self, other: Timeline) -> bool:
        """Whether the two hold the same books, so that one may stand for both."""
        return self is other or (
            self.length == other.length
            and self.layout.recent == other.layout.recent
            and self.capacity == other.capacity
            and self.ledger.shape == other.ledger.shape
            and self.ledger.device == other.ledger.device
            and bool((self.ledger[:, 2:] == other.ledger[:, 2:]).all())
            and torch.equal(self.columns[:, : self.length], other.columns[:, : self.length])
        )

    def tensors(self) -> list[torch.Tensor]:
        return [self.ledger, self.positions, self.columns, self.visible, self.flags]


class SpectralStore:
    """One layer's keys and values, compressed. Both are one log: keys and values are always appended together."""

    def __init__(self, layout: Layout, timeline: Timeline, dtype: torch.dtype, buffers: Buffers | None = None) -> None:
        self.layout = layout
        self.timeline = timeline
        timeline.users.add(self)
        self.dtype = dtype
        self.buffers = buffers or allocate(layout, timeline.batch, timeline.capacity, dtype, timeline.ledger.device)
        self._views: list[weakref.ref[View]] = []  # of what is read of this store, and some that are gone
        self.pending: dict[str, torch.Tensor] = {}
        self.derived = Shared()
        self.handle = torch.empty(0, device=self.device)
        remember(self.handle, self)

    @property
    def buffers(self) -> Buffers:
        return self._buffers

    @buffers.setter
    def buffers(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self.edition = object()  # of these buffers and no others: equal to itself alone

    @property
    def device(self) -> torch.device:
        return self.buffers.k_exact.device

    def resize(self, ledger: torch.Tensor | None = None) -> None:
        """Follow the timeline's capacities, keeping every token; ``ledger`` is what the buffers are still at, if older."""
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
                for row, (_, _, tokens, coded, *_) in enumerate(ledger.tolist()):
                    slots = torch.arange(coded, max(coded, tokens - layout.first_exact), device=self.device)
                    b[row, :, slots % capacity.recent] = a[row, :, slots % recent]
        self.buffers = new

    def add_view(self, view: View) -> None:
        """Note that this store is read as far as ``view`` says."""
        if len(self._views) >= _VIEWS:
            self._views = [ref for ref in self._views if ref() is not None]
        self._views.append(weakref.ref(view))

    def longest_view(self) -> int:
        """The number of columns that some live tensor still reads."""
        lengths = [view.length for ref in self._views if (view := ref()) is not None]
        return self.timeline.length if None in lengths else max(lengths, default=0)

    def map(self, timeline: Timeline, move: Callable[[torch.Tensor], torch.Tensor]) -> SpectralStore:
        """A store of its own on ``timeline``, with ``move`` applied to every buffer."""
        buffers = Buffers(*(move(b) for b in self.buffers))
        new = SpectralStore(self.layout, timeline, buffers.k_exact.dtype, buffers)
        new.pending = {role: move(x) for role, x in self.pending.items()}
        return new

    def cast(self, dtype: torch.dtype) -> None:
        """Hold what is in the model's dtype in another one."""
        self.buffers = self.buffers.cast(dtype, self.layout)
        self.pending = {role: x.to(dtype) for role, x in self.pending.items()}
        self.dtype = dtype

    @staticmethod
    def stack(stores: list[SpectralStore]) -> SpectralStore:
        """One store with the rows of all; they have the same layout, dtype and number of columns."""
        first = stores[0]

        def joined() -> Timeline:
            parts = [store.timeline.map(torch.clone) for store in stores]
            most = Capacity(*map(max, zip(*(part.capacity for part in parts), strict=True)))
            for part in parts:
                part.widen(most)
            new = parts[0].map(torch.clone)
            for flag in ("padded", "waiting"):
                setattr(new, flag, any(getattr(part, flag) for part in parts))
            new.next_due = min(part.next_due for part in parts)
            books = zip(*(part.tensors() for part in parts), strict=True)
            new.ledger, new.positions, new.columns, new.visible, new.flags = map(torch.cat, books)
            return new

        key = ("stack", *(id(store.timeline) for store in stores))
        timeline = first.timeline.derived.get(key, first, joined, [store.timeline for store in stores])
        parts = []
        for store in stores:
            own = store.timeline.map(torch.clone)
            own.widen(timeline.capacity)
            part = store.map(own, torch.clone)
            part.resize()
            parts.append(part.buffers)
        return SpectralStore(first.layout, timeline, first.dtype, Buffers(*map(torch.cat, zip(*parts, strict=True))))

    def fork(self, length: int, timeline: Timeline | None = None) -> SpectralStore:
        """A store of its own with the first ``length`` columns, on ``timeline`` if that has been cropped already."""
        if timeline is None:
            timeline = self.timeline.derived.get(("crop", length), self, lambda: self.timeline.crop(length))
        new = self.map(timeline, torch.clone)
        new.pending = {}
        new.drop_segments()
        return new

    def join(self, timeline: Timeline) -> None:
        """Count with ``timeline`` from now on."""
        self.timeline.users.discard(self)
        self.timeline = timeline
        timeline.users.add(self)

    def same_as(self, other: SpectralStore) -> bool:
        """Whether the two hold the same tokens in the same codes, so that one may stand for both."""
        alike = self.layout is other.layout and self.timeline.same_as(other.timeline)
        return alike and all(torch.equal(a, b) for a, b in zip(self.buffers, other.buffers, strict=True))

    def segments_used(self) -> int:
        """The most segments that a row has."""
        return int((self.buffers.starts != UNUSED).sum(1).max()) if self.buffers.starts.numel() else 0

    def drop_segments(self) -> None:
        """Forget the segments that began after what the timeline still has."""
        starts = self.buffers.starts
        starts.masked_fill_(starts > self.timeline.ledger[:, 3:4], UNUSED)

    def dense(self, role: str, length: int) -> torch.Tensor:
        """Keys as attention would see them, or values: [B, H, length, D] in the model's dtype.

        Zeros where there is padding, and behind the last column.
        """
        timeline = self.timeline
        b, (h, d) = timeline.batch, (self.layout.kv_heads, self.layout.head_dim)
        out = torch.zeros(b, h, length, d, dtype=self.dtype, device=self.device)
        known = min(length, timeline.length)
        for row, (_, _, tokens, coded, *_) in enumerate(timeline.ledger.tolist()):
            both = dense.materialise(row, tokens, coded, timeline.positions[row], self.buffers, self.layout)
            places = timeline.columns[row, :known].nonzero().flatten()
            out[row, :, places] = both[role == "value"][:, : len(places)]
        if (new := self.pending.get(role)) is not None:
            new = new[:, :, : length - known]
            out[:, :, known : known + new.shape[2]] = new
        return out

    def append_eagerly(self, role: str, x: torch.Tensor) -> SpectralStore:
        """Append one role's chunk [B, H, n, D] (keys rotated), outside of any graph; codes once the other role's is there too.

        Positions run on from the last one, which is what the keys are turned back by.
        """
        store = self.fork(self.timeline.length) if role in self.pending else self
        store.pending[role] = x
        if len(store.pending) < 2:
            return store
        key, value = store.pending["key"], store.pending["value"]
        store.pending = {}
        layout, count = store.layout, key.shape[2]
        old = store.timeline
        last = old.positions.gather(1, (old.ledger[:, 2:3] - 1).clamp(min=0))
        ids = last.where(old.ledger[:, 2:3] > 0, -1) + torch.arange(1, count + 1, device=key.device)

        def advanced() -> Timeline:
            new = old.map(torch.clone)
            new.reserve(count)
            advance(new.ledger, new.positions, ids, None, key, layout)
            new.enter(count, None)
            new.source = old  # the next layer looks for what was made of it
            new.entered = new.ledger.clone()
            new.catch_up()
            return new

        store.join(old.derived.get(("append", count), store, advanced))
        store.resize(old.ledger)
        key = torch.stack([dense.unrotate(k, at, layout.rotary) for k, at in zip(key, ids, strict=True)])
        no_query, entered = key.new_zeros(key.shape), store.timeline.entered
        append(Chunk(no_query, key, value), entered, store.buffers, layout)
        if not torch.equal(entered, store.timeline.ledger):
            store.catch_up()
        return store

    def catch_up(self) -> None:
        """Code what the timeline's step of no columns has made due, out of the window."""
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


def _widen(x: torch.Tensor, columns: int) -> torch.Tensor:
    new = x.new_zeros(x.shape[0], columns)
    new[:, : min(columns, x.shape[1])] = x[:, :columns]
    return new
