"""A prompt as it came, until its cache is asked for: the first token waits for no code.

A layer of a short prompt leaves copies, since a compiled graph uses the memory of what it has handed to an operation for
something else. All layers are stored at once when one of them is read, which is what the next step does first, or when another
prompt begins.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append import reference
from spectral_compile.kernels.append.kept import Judged, KeptLayer
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.importance.weights import sample
from spectral_compile.kernels.ledger import LedgerRow, first, on_host
from spectral_compile.kernels.values import Chunk

TOKENS = 8192  # of all rows of a prompt that is kept: a longer one is stored layer by layer, so that no peak is made of it


class KeptPrompt:
    """The layers of a prompt that one graph has read, as many as there is room for, until ``store``."""

    def __init__(self, stores: Sequence[Buffers]) -> None:
        """``stores`` are those of the graph's layers, in their order."""
        self.stores = stores
        self.device = stores[0].moment.device
        self.room = _room(self.device)
        self.layers: list[KeptLayer] = []
        self._ledger: torch.Tensor  # as it was after the prompt
        self._rows: list[LedgerRow]
        self._valid: torch.Tensor | None
        self._stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def keep(
        self, chunk: Chunk, ledger: torch.Tensor, moment: torch.Tensor, number: int, layout: Layout, judged: Judged | None
    ) -> bool:
        """Copy keys and values of layer ``number`` and sum up its queries in ``moment``, if there is room."""
        if not self.layers:
            self._ledger, self._rows = ledger.clone(), list(on_host(ledger))
            self._valid = None if chunk.valid is None else chunk.valid.clone()
        given = [chunk.key, chunk.value, *(() if judged is None else (judged.seen,))]
        self.room -= sum(x.nbytes for x in given)
        if self.room < 0:
            return False
        copies = [torch.empty_like(x) for x in given]
        torch._foreach_copy_(copies, given)
        query = chunk.query if chunk.valid is None else chunk.query.masked_fill(~chunk.valid[:, None, :, None], 0)
        by_key = query.unflatten(1, (layout.kv_heads, -1))
        torch.linalg.vector_norm(by_key, dim=(2, 3), dtype=torch.float32, out=moment)
        moment.square_()
        if judged is not None:
            judged = judged._replace(sampled=judged.sampled.copied(), seen=copies[2])
        heads = chunk.query.shape[1]
        self.layers.append(KeptLayer(copies[0], copies[1], judged, heads, layout, self.stores[number]))
        return True

    def store(self) -> None:
        """Write all that is kept to the buffers."""
        if not self.layers:
            return
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())  # buffers that a prompt made in it may be written to nowhere else
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self.device))
                if (reading := torch.cuda.current_stream()) != self._stream:
                    for x in (x for layer in self.layers for x in layer.copies):
                        x.record_stream(reading)  # else the stream that made it may write to its memory at once
            _way(self.device)(self.layers, self._ledger, self._rows, self._valid)
        self.layers = []


def _way(device: torch.device) -> Callable[[list[KeptLayer], torch.Tensor, list[LedgerRow], torch.Tensor | None], None]:
    if device.type == "cuda":
        from spectral_compile.kernels.append import together  # Triton is there only where a GPU is

        return together.enter
    return _one_by_one


def _one_by_one(layers: list[KeptLayer], ledger: torch.Tensor, rows: list[LedgerRow], valid: torch.Tensor | None) -> None:
    for layer in layers:
        reference.enter(layer.chunk(valid), ledger, layer.buffers, layer.layout, layer.token_weight(valid))


class _Now(threading.local):
    prompt: KeptPrompt | None = None  # that this thread's call reads
    last: weakref.ref[KeptPrompt] | None = None  # the one before


_now = _Now()


@contextmanager
def keeping(stores: Sequence[Buffers]) -> Iterator[KeptPrompt]:
    """Within it layers of a short prompt are kept, for the caller to store; of a thread one prompt at most is, so that caches
    which nobody asks for do not stay as large as they came."""
    before = None if _now.last is None else _now.last()
    if before is not None:
        before.store()
    _now.prompt = KeptPrompt(stores)
    _now.last = weakref.ref(_now.prompt)
    try:
        yield _now.prompt
    finally:
        _now.prompt.stores = ()  # else it would keep buffers that are outgrown until every store has been read
        _now.prompt = None


def kept(chunk: Chunk, ledger: torch.Tensor, moment: torch.Tensor, number: int, layout: Layout, judged: Judged | None) -> bool:
    """Whether layer ``number`` of a prompt is stored later than this returns."""
    batch, _, count, _ = chunk.key.shape
    if _now.prompt is None or count < 2 or batch * count > TOKENS or not first(on_host(ledger)):
        return False
    return _now.prompt.keep(chunk, ledger, moment, number, layout, judged)


def judged(chunk: Chunk, ledger: torch.Tensor, layout: Layout, seen: torch.Tensor | None, scale: float) -> Judged | None:
    """What the tokens of a chunk are weighed by: None without ``seen``, and where none of them is coded."""
    if seen is None or not any(row.coded_after > row.coded for row in on_host(ledger)):
        return None
    per_group = chunk.query.shape[1] // layout.groups
    return Judged(sample(chunk.query, per_group, chunk.valid), seen, scale)


def _room(device: torch.device) -> float:
    """Bytes of copies of keys and values at most; the sample of queries, which is small, is not counted."""
    if device.type != "cuda":
        return 1 << 30
    whole = torch.cuda.get_device_properties(device).total_memory
    return whole * torch.cuda.get_per_process_memory_fraction(device) / 32
