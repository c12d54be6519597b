"""A timeline: what is the same in every layer of a cache, whose lengths live on the device."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

from spectral_compile.cache.sharing import SharedResults
from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.advance.hide import REVEALS, hide
from spectral_compile.kernels.advance.op import advance
from spectral_compile.kernels.buffers import SLOTS, Capacity
from spectral_compile.kernels.ledger import LedgerRow, columns_of, rows_of

# Coded slots to spare in a new cache, doubled whenever they are used up: buffers are then copied to larger ones, and a GPU must
# record its CUDA graphs again.
HEADROOM = {"cpu": 64, "cuda": 1024}


_NUMBERS = ("length", "spare", "waiting", "next_due", "offered", "padded", "model")


class Timeline:
    """What is the same in every layer of a cache: columns, positions, and how many tokens are coded.

    ``length`` is the number of columns as transformers counts them, padding included, and lives on the host. On the device:

    - ``ledger`` int64 [B, 6]: the counters of each row of the batch, such as its tokens and its coded tokens (``LedgerRow``);
    - ``positions`` int32 [B, slots + 1]: the position of each token of a row; the last slot is scratch;
    - ``columns`` bool [B, columns]: which columns are tokens, the others being padding;
    - ``visible`` uint8 [B, slots + 1] and ``flags`` int32 [B]: which stored tokens the mask of a step shows (``advance.hide``).
    """

    def __init__(
        self, layout: Layout, batch: int, count: int, tokens: int, device: torch.device, headroom: int | None = None
    ) -> None:
        """An empty timeline of ``batch`` rows whose first step will bring ``count`` columns, ``tokens`` of them tokens in the
        row with fewest.

        ``headroom`` coded slots are reserved beyond what is needed, on a GPU up to a multiple of ``SLOTS``; None takes the
        device's ``HEADROOM``.
        """
        self.layout = layout
        self.length = 0
        self.spare = headroom or HEADROOM.get(device.type, HEADROOM["cpu"])
        self.waiting = tokens - layout.first_exact - layout.recent < layout.first  # some row has no basis yet
        self.next_due = 0  # the host asks no earlier than at this length whether a row has a segment to begin
        self.offered = False  # the last chunk was long enough for a basis of its own, for which there is room
        self.padded = False  # some columns were padding, of which nothing is stored
        self.capacity = Capacity(coded=0, recent=0 if self.waiting else layout.recent + layout.block, segments=0)
        empty = LedgerRow(before=0, coded=0, after=0, coded_after=0, waiting=1, gaps=0)
        self.ledger = torch.tensor([empty], device=device).repeat(batch, 1)
        self.positions = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        self.columns = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.visible = torch.zeros(batch, 0, dtype=torch.uint8, device=device)
        self.flags = torch.zeros(batch, dtype=torch.int32, device=device)
        self._host_flags: torch.Tensor | None = None  # pinned; the flags of the last decode step, copied without waiting
        self.model: str | None = None  # the fingerprint of the model whose cache this is
        self.prefill: Any = None  # the ``runtime.BoundGraph`` of the prompt; None where the cache was not begun by one
        self.derived = SharedResults()
        # Both are kept from an eager append to one layer until all layers have been appended to, one after the other:
        self.source: Timeline | None = None  # the timeline before, in whose ``derived`` the other layers find this one
        self.entered: torch.Tensor | None = None  # the ledger after the new columns and before ``catch_up``
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # the stores on this timeline
        self.reserve(count)

    @property
    def batch(self) -> int:
        return self.ledger.shape[0]

    def reserve(self, count: int) -> bool:
        """Make room for ``count`` more columns. True if a capacity changed: then every store must ``resize``."""
        layout, old = self.layout, self.capacity
        end = self.length + count
        coded, recent = self._coded(end), old.recent
        if self.waiting:
            recent = min(end - layout.first_exact, layout.recent + layout.first)
        self.offered = old.segments > 0 and not layout.segment and count >= layout.warmup + layout.block
        if coded <= old.coded and recent <= old.recent and end <= self.columns.shape[1] and not self.offered:
            return False
        if 0 < old.coded < coded and count <= self.spare:  # not after a long chunk, which is no sign that more will come
            self.spare *= 2
        segments = old.segments + (old.segments == 0 and coded > 0) + self.offered
        slots = SLOTS if self.ledger.is_cuda and not layout.lossless else 1
        coded = -(-(coded + self.spare) // slots) * slots if coded > old.coded else old.coded
        if self.waiting:
            recent = min(max(recent + self.spare, 2 * old.recent), layout.recent + layout.first)
        if layout.segment:
            segments = old.segments + -(-(coded - old.coded) // layout.segment) + 1
        self.widen(Capacity(coded, max(recent, old.recent), segments))
        return True

    def _coded(self, columns: int) -> int:
        """Slots that so many columns need."""
        ready = columns - self.layout.first_exact - self.layout.recent
        if self.waiting and ready < self.layout.first:
            return 0
        return -(-max(0, ready) // self.layout.block) * self.layout.block

    def trimmed(self) -> Timeline:
        """A copy without coded slots to spare."""
        held = max(self._coded(self.length), int(columns_of(self.ledger).coded_after.max()))
        new = self.map(torch.clone)
        new.widen(self.capacity._replace(coded=min(self.capacity.coded, -(-held // SLOTS) * SLOTS)))
        return new

    def numbers(self) -> dict[str, Any]:
        """All that ``restored`` takes beside tensors, as JSON has it."""
        return {**{name: getattr(self, name) for name in _NUMBERS}, "layout": self.layout.spec(), "capacity": self.capacity}

    @classmethod
    def restored(cls, numbers: dict[str, Any], tensors: list[torch.Tensor]) -> Timeline:
        """What ``numbers`` and ``tensors`` were of."""
        ledger = tensors[0]
        new = cls(Layout.parse(numbers["layout"]), ledger.shape[0], 0, 0, ledger.device)
        for name in _NUMBERS:
            setattr(new, name, numbers[name])
        new.capacity = Capacity(*numbers["capacity"])
        new.ledger, new.positions, new.columns, new.visible, new.flags = tensors
        return new

    def widen(self, capacity: Capacity) -> None:
        """Take on a larger ``capacity``, and room for as many columns."""
        self.capacity = capacity
        columns = self.layout.first_exact + capacity.coded + capacity.recent + self.layout.block
        self.positions = _widen(self.positions, columns + 1)
        self.columns, self.visible = _widen(self.columns, columns), _widen(self.visible, columns + 1)

    def settle(self) -> bool:
        """Give back the places of recent tokens that were needed only until every row had its first basis.

        True if that changed a capacity: then every store must ``resize``.
        """
        ready = self.length - self.layout.first_exact - self.layout.recent
        if not self.waiting or ready < self.layout.first or bool(columns_of(self.ledger).waiting.any()):
            return False
        self.waiting = False
        self.capacity = self.capacity._replace(recent=self.layout.recent + self.layout.block)
        return True

    def enter(self, count: int, valid: torch.Tensor | None) -> None:
        """Note that a graph has appended ``count`` columns; ``valid`` bool [B, count] says which are tokens (None: all)."""
        self.columns[:, self.length : self.length + count] = True if valid is None else valid
        self.length += count
        self.source = self.entered = None
        self.derived.clear()

    def hide(self, shown: torch.Tensor, wait: bool) -> None:
        """Note which of the columns before a step its mask shows: ``shown`` [B, length], where 0 hides.

        RuntimeError where it shows a column of which no token was stored. On a GPU without ``wait`` nothing waits for the
        device, and the error is raised at the next step.
        """
        if self._host_flags is not None:
            self._refuse_revealed(self._host_flags)
        hide(self.visible, self.flags, self.columns, shown)
        if wait or not self.flags.is_cuda:
            self._refuse_revealed(self.flags)
            return
        if self._host_flags is None:
            self._host_flags = torch.zeros(self.batch, dtype=torch.int32, pin_memory=True)
        self._host_flags.copy_(self.flags, non_blocking=True)

    @staticmethod
    def _refuse_revealed(flags: torch.Tensor) -> None:
        if max(flags.tolist()) >= REVEALS:
            raise RuntimeError(
                "attention_mask shows tokens that earlier calls on this cache masked, of which nothing was kept: start with a"
                " new cache"
            )

    def due(self) -> bool:
        """Whether a row has enough tokens to begin a segment after steps of one column.

        The ledger is read off the device only once ``length`` has reached ``next_due``.
        """
        layout = self.layout
        if not (self.waiting or layout.segment) or self.length < self.next_due:
            return False
        missing = [
            layout.first_exact + layout.recent + (layout.first if row.waiting else row.coded_after + layout.block) - row.after
            for row in rows_of(self.ledger)
            if row.waiting or layout.segment
        ]
        self.next_due = self.length + min(missing, default=0)  # a column brings a row one token at most
        return bool(missing) and self.next_due <= self.length

    def catch_up(self) -> bool:
        """If a segment is due, advance the ledger by a step of no columns.

        True if it did: then every store must code what is due now (``SpectralStore.catch_up``).
        """
        if not self.due():
            return False
        nothing = torch.empty(self.batch, self.layout.kv_heads, 0, self.layout.head_dim, device=self.ledger.device)
        advance(self.ledger, self.positions, None, None, nothing, self.layout)
        return True

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Timeline:
        """A new timeline, shared with no store yet, with ``move`` applied to every tensor."""
        new = copy.copy(self)
        new.ledger, new.positions, new.columns, new.visible, new.flags = map(move, self.tensors())
        new._host_flags = None
        new.derived, new.source, new.entered, new.users = SharedResults(), None, None, weakref.WeakSet()
        return new

    def crop(self, length: int) -> Timeline:
        """A copy of the first ``length`` columns."""
        new = self.map(torch.clone)
        new.truncate(length)
        return new

    @staticmethod
    def stack(timelines: list[Timeline]) -> Timeline:
        """A new timeline with the rows of all ``timelines``, which have the same layout and number of columns."""
        copies = [timeline.map(torch.clone) for timeline in timelines]
        most = Capacity(*map(max, zip(*(timeline.capacity for timeline in copies), strict=True)))
        for timeline in copies:
            timeline.widen(most)
        new = copies[0].map(torch.clone)
        new.padded = any(timeline.padded for timeline in copies)
        new.waiting = any(timeline.waiting for timeline in copies)
        new.next_due = min(timeline.next_due for timeline in copies)
        joined = zip(*(timeline.tensors() for timeline in copies), strict=True)
        new.ledger, new.positions, new.columns, new.visible, new.flags = map(torch.cat, joined)
        return new

    def truncate(self, length: int) -> None:
        """Drop all columns from ``length`` on, in place."""
        self.length = length
        tokens = self.columns[:, :length].sum(1)
        ledger = columns_of(self.ledger)
        ledger.after.copy_(tokens)
        ledger.coded_after.clamp_(max=(tokens - self.layout.first_exact).clamp(min=0))
        self.next_due = 0  # if only padding was dropped, a row may be due earlier than the host had computed
        self.derived.clear()

    def same_as(self, other: Timeline) -> bool:
        """Whether the two count the same tokens in the same places, so that one may replace the other."""
        return (
            self is other
            or (
                self.length == other.length
                and self.layout.recent == other.layout.recent
                and self.capacity == other.capacity
                and self.ledger.shape == other.ledger.shape
                and self.ledger.device == other.ledger.device
                and all(map(torch.equal, columns_of(self.ledger)[2:], columns_of(other.ledger)[2:]))  # all from ``after`` on
                and torch.equal(self.columns[:, : self.length], other.columns[:, : self.length])
            )
        )

    def tensors(self) -> list[torch.Tensor]:
        """Everything that lives on the device, in a fixed order."""
        return [self.ledger, self.positions, self.columns, self.visible, self.flags]


def _widen(x: torch.Tensor, columns: int) -> torch.Tensor:
    """``x`` [B, n] cut or filled with zeros to [B, columns]."""
    new = x.new_zeros(x.shape[0], columns)
    new[:, : min(columns, x.shape[1])] = x[:, :columns]
    return new
