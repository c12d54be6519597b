"""``append`` on a GPU, out of kernels."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append.fit import fit
from spectral_compile.kernels.append.kernel import ChunkWriter, tiles_of
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import LedgerRow, first, on_host
from spectral_compile.kernels.values import Chunk


def append(
    chunk: Chunk, ledger: torch.Tensor, buffers: Buffers, layout: Layout, token_weight: torch.Tensor | None = None
) -> None:
    """``reference.append`` in Triton. One column is one launch that waits for nothing; more columns, or none, may wait."""
    writer = ChunkWriter(chunk, ledger, buffers, layout)
    if chunk.columns == 1:
        writer.write(tiles_of(layout.block), keep=True)
        return
    rows = on_host(ledger)
    if chunk.columns:
        writer.add_moment(first(rows))
    enter(writer, rows, token_weight)


def enter(writer: ChunkWriter, rows: list[LedgerRow], token_weight: torch.Tensor | None) -> None:
    """``append`` of a chunk of more columns than one, or none, but for its queries, which have been summed up.

    ``rows`` is the ledger on the host.
    """
    if not writer.layout.lossless:
        fit(writer, rows, token_weight)
    at_once = writer.count > 0 and first(rows)
    writer.write(tiles_of(max(row.coded_after - row.coded for row in rows)), keep=at_once)
    if writer.count and not at_once:  # coding reads the places of recent tokens that new ones are then written to
        writer.write(0, keep=True)
