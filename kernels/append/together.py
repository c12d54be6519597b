"""Prompts of several layers are stored together: a GPU finds the bases of many in the time of one, whose matrices are few."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append.basis import Fitted
from spectral_compile.kernels.append.fit import fits
from spectral_compile.kernels.append.gram import Parts
from spectral_compile.kernels.append.kernel import ChunkWriter, tiles_of
from spectral_compile.kernels.attend.plan import multiprocessors
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import LedgerRow, columns_of
from spectral_compile.kernels.values import Chunk

TOKENS = 8192  # of all rows of a prompt whose keys and values are kept until some layers have theirs: no peak is made of them


class _Waiting(threading.local):
    layers = 0  # that may wait for each other in the call that this thread is in
    stacks: dict[tuple[Layout, torch.dtype], _Stack]


_waiting = _Waiting()


@contextmanager
def layers(count: int) -> Iterator[None]:
    """Within it prompts of up to ``count`` layers may wait for each other; when it ends all are stored, but after an error."""
    _waiting.layers, _waiting.stacks = count, {}
    try:
        yield
        for stack in _waiting.stacks.values():
            stack.store()
    finally:
        _waiting.layers, _waiting.stacks = 0, {}


def waits(writer: ChunkWriter, valid: torch.Tensor | None, rows: list[LedgerRow], token_weight: torch.Tensor | None) -> bool:
    """Whether this prompt, whose queries have been summed up, is stored together with others', later than this returns.

    Its keys and values are copied: a compiled graph reuses their memory. Each row has tokens to code, and one basis for them.
    """
    layout, batch = writer.layout, len(rows)
    size = multiprocessors(writer.chunk.key.device) // (2 * batch * layout.groups)
    if min(size, _waiting.layers) < 2 or batch * writer.count > TOKENS:
        return False
    alike = layout, writer.chunk.key.dtype
    if alike not in _waiting.stacks:
        _waiting.stacks[alike] = _Stack(min(size, _waiting.layers), writer, valid, rows, token_weight)
    stack = _waiting.stacks[alike]
    stack.add(writer, token_weight)
    if stack.full:
        stack.store()
        del _waiting.stacks[alike]
    return True


class _Stack:
    """What some layers of one layout and dtype leave of a prompt."""

    def __init__(
        self,
        size: int,
        writer: ChunkWriter,
        valid: torch.Tensor | None,
        rows: list[LedgerRow],
        token_weight: torch.Tensor | None,
    ) -> None:
        """For ``size`` layers, the first of which is that of ``writer``."""
        self.size, self.valid, self.rows = size, valid, rows
        self.ledger, self.layout, self.query_heads = writer.ledger, writer.layout, writer.chunk.query.shape[1]
        key = writer.chunk.key.transpose(1, 2)
        self.keys, self.values = torch.empty((2, size, *key.shape), dtype=key.dtype, device=key.device)
        self.token_weights = None if token_weight is None else token_weight.new_empty(size, *token_weight.shape)
        self.stores: list[Buffers] = []

    @property
    def full(self) -> bool:
        return len(self.stores) == self.size

    def add(self, writer: ChunkWriter, token_weight: torch.Tensor | None) -> None:
        place = len(self.stores)
        self.keys[place].copy_(writer.chunk.key.transpose(1, 2))
        self.values[place].copy_(writer.chunk.value.transpose(1, 2))
        if token_weight is not None:
            assert self.token_weights is not None, "layers of one layout are weighted alike"
            self.token_weights[place].copy_(token_weight)
        self.stores.append(writer.buffers)

    def store(self) -> None:
        """Compute the bases of all layers at once, as of so many rows, and code each layer's tokens."""
        count, batch = len(self.stores), len(self.rows)
        fitted = self._fitted(count)
        targets = [x[:, :, 0] for buffers in self.stores for x in Fitted.of(buffers).tensors]
        found = [x[i * batch : (i + 1) * batch, :, 0] for i in range(count) for x in fitted.tensors]
        torch._foreach_copy_(targets, found)
        coded = columns_of(self.ledger).coded
        torch._foreach_copy_([buffers.starts[:, 0] for buffers in self.stores], [coded] * count)
        tiles = tiles_of(max(row.coded_after - row.coded for row in self.rows))
        for key, value, buffers in zip(self.keys, self.values, self.stores, strict=False):
            ChunkWriter(self._chunk(key, value, self.valid), self.ledger, buffers, self.layout).write(tiles, keep=True)

    def _fitted(self, count: int) -> Fitted:
        """Bases and steps of ``count`` layers, as of one that has all their rows."""
        valid = None if self.valid is None else self.valid.repeat(count, 1)
        weights = None if self.token_weights is None else self.token_weights[:count].flatten(0, 1)
        chunk = self._chunk(self.keys[:count].flatten(0, 1), self.values[:count].flatten(0, 1), valid)
        buffers = self.stores[0]._replace(moment=torch.cat([buffers.moment for buffers in self.stores]))
        writer = ChunkWriter(chunk, self.ledger.repeat(count, 1), buffers, self.layout)
        counts = [row.coded_after - row.coded for row in self.rows]
        fitted = Fitted.blank(buffers, len(writer.ledger), 1)
        fits(writer, Parts(0, 1, max(counts)), counts, weights, fitted)
        return fitted

    def _chunk(self, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None) -> Chunk:
        """Of [B, n, H, D], without queries: of these only the shape is asked for."""
        batch, count, _, dim = key.shape
        query = key.new_empty(1, 1, 1, dim).expand(batch, self.query_heads, count, dim)
        return Chunk(query, key.transpose(1, 2), value.transpose(1, 2), valid)
