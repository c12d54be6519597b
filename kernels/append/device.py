"""``append`` on a GPU, out of kernels."""

from __future__ import annotations

import torch

from spectral_compile.codec.layout import Layout
from spectral_compile.kernels.append.fit import fit, one_basis
from spectral_compile.kernels.append.kernel import ChunkWriter, tiles_of
from spectral_compile.kernels.append.together import waits
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import on_host
from spectral_compile.kernels.values import Chunk


def append(
    chunk: Chunk, ledger: torch.Tensor, buffers: Buffers, layout: Layout, token_weight: torch.Tensor | None = None
) -> None:
    """``reference.append`` in Triton. One column is one launch that waits for nothing; more columns, or none, may wait.

    Within ``together.layers`` a short prompt may be stored later, when that ends at the latest.
    """
    writer = ChunkWriter(chunk, ledger, buffers, layout)
    if chunk.columns == 1:
        writer.write(tiles_of(layout.block), keep=True)
        return
    rows = on_host(ledger)
    first = chunk.columns > 0 and all(row.before == 0 for row in rows)
    if chunk.columns:
        writer.add_moment(first)
    if not layout.lossless:
        if first and one_basis(layout, rows) and waits(writer, chunk.valid, rows, token_weight):
            return
        fit(writer, rows, token_weight)
    tiles = tiles_of(max(row.coded_after - row.coded for row in rows))
    writer.write(tiles, keep=first)
    if chunk.columns and not first:  # coding reads the places of recent tokens that new ones are then written to
        writer.write(0, keep=True)
