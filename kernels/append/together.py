"""Layers of a prompt are stored together: a GPU finds the bases of many in the time of one, whose matrices are few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from spectral_compile.kernels.append.basis import Fitted
from spectral_compile.kernels.append.device import enter as enter_alone
from spectral_compile.kernels.append.fit import fits, one_basis
from spectral_compile.kernels.append.gram import Parts
from spectral_compile.kernels.append.kept import Judged, KeptLayer
from spectral_compile.kernels.append.kernel import ChunkWriter, tiles_of
from spectral_compile.kernels.attend.plan import multiprocessors
from spectral_compile.kernels.importance.weights import Sample
from spectral_compile.kernels.ledger import LedgerRow, columns_of


def enter(layers: Sequence[KeptLayer], ledger: torch.Tensor, rows: list[LedgerRow], valid: torch.Tensor | None) -> None:
    """Store a prompt's layers; ``ledger`` is as it was after the prompt, and ``rows`` is that on the host."""
    for some in _alike(layers):
        if some[0].layout.lossless or not one_basis(some[0].layout, rows):
            for layer in some:
                writer = ChunkWriter(layer.chunk(valid), ledger, layer.buffers, layer.layout)
                enter_alone(writer, rows, layer.token_weight(valid))
        else:
            _enter_together(some, ledger, rows, valid)


def _alike(layers: Sequence[KeptLayer]) -> Iterator[list[KeptLayer]]:
    """Layers of one layout and dtype, as many as have a matrix for each multiprocessor."""
    apart: dict[tuple[object, ...], list[KeptLayer]] = {}
    for layer in layers:
        apart.setdefault((layer.layout, layer.key.dtype, layer.judged is None), []).append(layer)
    for some in apart.values():
        matrices = 2 * some[0].key.shape[0] * some[0].layout.groups
        size = max(1, multiprocessors(some[0].key.device) // matrices)
        yield from (some[i : i + size] for i in range(0, len(some), size))


def _enter_together(layers: list[KeptLayer], ledger: torch.Tensor, rows: list[LedgerRow], valid: torch.Tensor | None) -> None:
    """Compute the bases of all layers at once, as of so many rows, and code each layer's tokens."""
    fitted, batch = _fitted(layers, ledger, rows, valid), len(rows)
    targets = [x[:, :, 0] for layer in layers for x in Fitted.of(layer.buffers).tensors]
    found = [x[i * batch : (i + 1) * batch, :, 0] for i in range(len(layers)) for x in fitted.tensors]
    torch._foreach_copy_(targets, found)
    torch._foreach_copy_([layer.buffers.starts[:, 0] for layer in layers], [columns_of(ledger).coded] * len(layers))
    tiles = tiles_of(max(row.coded_after - row.coded for row in rows))
    for layer in layers:
        ChunkWriter(layer.chunk(valid), ledger, layer.buffers, layer.layout).write(tiles, keep=True)


def _fitted(layers: list[KeptLayer], ledger: torch.Tensor, rows: list[LedgerRow], valid: torch.Tensor | None) -> Fitted:
    """Bases and steps of the layers, as of one that has all their rows."""
    count, first = len(layers), layers[0]
    valid = None if valid is None else valid.repeat(count, 1)
    judged = [layer.judged for layer in layers if layer.judged is not None]
    whole = first._replace(
        key=torch.cat([layer.key for layer in layers]),
        value=torch.cat([layer.value for layer in layers]),
        judged=_joined(judged) if judged else None,
        buffers=first.buffers._replace(moment=torch.cat([layer.buffers.moment for layer in layers])),
    )
    writer = ChunkWriter(whole.chunk(valid), ledger.repeat(count, 1), whole.buffers, whole.layout)
    counts = [row.coded_after - row.coded for row in rows]
    fitted = Fitted.blank(whole.buffers, len(writer.ledger), 1)
    fits(writer, Parts(0, 1, max(counts)), counts, whole.token_weight(valid), fitted)
    return fitted


def _joined(judged: list[Judged]) -> Judged:
    """As of one layer that has all rows of these."""
    sampled = Sample(*map(torch.cat, zip(*(one.sampled for one in judged), strict=True)))
    return Judged(sampled, torch.cat([one.seen for one in judged]), judged[0].scale)
