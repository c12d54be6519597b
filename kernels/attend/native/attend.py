"""Attention of few queries on a CPU: a chunk over a compressed past and over itself, by ``attend.c``."""

from __future__ import annotations

import ctypes
import functools

import torch

from spectral_compile.codec.layout import Layout, Rotary
from spectral_compile.kernels.attend.native.library import library
from spectral_compile.kernels.attend.reference import allowed_of
from spectral_compile.kernels.ledger import rows_of
from spectral_compile.kernels.values import NOTHING_HIDDEN, Chunk, Hidden, Past, Scoring

MOST = 16  # columns of a chunk: of more, products by a library cost less than scores one by one
TILE = 64  # tokens, as in ``attend.c``
BITS = {torch.float32: 32, torch.bfloat16: 16}  # of exact tokens, as ``attend.c`` reads them


def takes(chunk: Chunk, layout: Layout) -> bool:
    """Whether a chunk has few columns, its store is coded, and there is a C compiler."""
    here = chunk.key.device.type == "cpu" and 0 < chunk.columns <= MOST
    return here and not layout.lossless and library() is not None


def attend(chunk: Chunk, past: Past, scoring: Scoring, hidden: Hidden = NOTHING_HIDDEN) -> torch.Tensor:
    """See ``reference.attend``."""
    query, key, value, valid = chunk
    layout = past.layout
    batch, heads, columns, dim = query.shape
    rows = rows_of(past.ledger)
    kept = torch.ones(batch, columns, dtype=torch.bool) if valid is None else valid
    shown = None
    if columns > 1 or scoring.sliding_window or any(x is not None for x in hidden):
        shown = torch.zeros(batch, columns, max(row.after for row in rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            shown[i, :, : row.after] = allowed_of(i, row, kept[i], hidden, scoring.sliding_window)
    tokens = [_tokens(x, kept) for x in (key, value)]
    # queries of a KV head side by side
    asking = (query.float() * scoring.scale).reshape(batch, layout.kv_heads, -1, dim).contiguous()
    counts = torch.tensor([row[:3] for row in rows])
    out, log_sum = _run(asking, (tokens[0], tokens[1]), past, counts, shown, columns, scoring.softcap)
    if scoring.sink_score is not None:
        taken = scoring.sink_score.float().reshape(layout.kv_heads, -1, 1).expand(-1, -1, columns).flatten(1)
        out *= (log_sum - taken).sigmoid()[..., None]  # of the exponentials the sink has the rest
    return out.reshape(batch, heads, columns, dim).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _tokens(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Columns [B, H, n, D] in float32, those that are no padding first."""
    if not kept.all():
        first = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
        x = x.gather(2, first[:, None, :, None].expand_as(x))
    return x.float().contiguous()


class _Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("bits8", "bits4", "bits2", "row_bytes", "heads")),
        *((name, ctypes.c_void_p) for name in ("codes", "basis", "affine", "exact", "recent", "sizes", "chunk")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "groups", "heads", "dim", "queries", "columns", "segments", "pairs")),
        *((name, ctypes.c_int64) for name in ("splits", "slots", "first", "exact_places", "ring", "exact_bits")),
        *((name, ctypes.c_int64) for name in ("position_stride", "allowed_row", "allowed_column")),
        *((name, ctypes.c_double) for name in ("scaling", "softcap")),
        *((name, _Side) for name in ("key", "value")),
        *((name, ctypes.c_void_p) for name in ("norms", "starts", "counts", "positions", "frequencies", "table", "order")),
        *((name, ctypes.c_void_p) for name in ("allowed", "query", "out", "log_sum")),
    ]


def _run(
    asking: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    past: Past,
    counts: torch.Tensor,
    shown: torch.Tensor | None,
    columns: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values by their weights, float32 [B, H, m, D], and log-sum-exp of the scores, [B, H, m].

    Of scaled queries ``asking`` [B, H, m, D], of ``tokens`` of the chunk, int64 ``counts`` [B, 3] of tokens before it, of coded
    ones and of those with it, and bool ``shown`` [B, n, tokens], None where each column sees all.
    """
    layout, positions, buffers = past.layout, past.positions, past.buffers
    batch, heads, queries, dim = asking.shape
    out, log_sum = torch.empty_like(asking), asking.new_empty(batch, heads, queries)
    frequencies, table, order = _pairs(layout.rotary, dim)
    tiles = -(-int(counts[:, 1].max()) // TILE)
    if buffers.k_exact.dtype not in BITS:  # float16, which not every C compiler knows
        buffers = buffers.cast(torch.float32, layout)
    alive = [positions.contiguous(), *(x.contiguous() for x in buffers)]  # whose addresses are handed over
    positions, held = alive[0], type(buffers)(*alive[1:])

    def side(name: str, chunk: torch.Tensor) -> _Side:
        heads, _, _, tiers = layout.k if name == "k" else layout.v
        parts = {what: getattr(held, f"{name}_{what}").data_ptr() for what in ("codes", "basis", "affine", "exact", "sizes")}
        recent = getattr(held, f"{name}_recent").data_ptr() if layout.recent_bits == 8 else None
        sizes = {"bits8": tiers.bits8, "bits4": tiers.bits4, "bits2": tiers.bits2, "row_bytes": tiers.row_bytes}
        return _Side(**sizes, heads=heads, **parts, recent=recent, chunk=chunk.data_ptr())

    step = _Step(
        rows=batch,
        groups=layout.groups,
        heads=layout.heads,
        dim=dim,
        queries=queries,
        columns=columns,
        segments=held.starts.shape[1],
        pairs=len(frequencies),
        splits=max(1, min(-(-torch.get_num_threads() // (batch * layout.groups)), tiles)),
        slots=held.k_codes.shape[2],
        first=layout.first_exact,
        exact_places=held.k_exact.shape[2],
        ring=held.recent_slots(layout),
        exact_bits=BITS[held.k_exact.dtype],
        position_stride=positions.stride(0),
        allowed_row=0 if shown is None else shown.stride(0),
        allowed_column=0 if shown is None else shown.stride(1),
        scaling=layout.rotary.scaling if layout.rotary else 1.0,
        softcap=softcap,
        key=side("k", tokens[0]),
        value=side("v", tokens[1]),
        norms=held.v_norms.data_ptr() if layout.normalised else None,
        starts=held.starts.data_ptr(),
        counts=counts.data_ptr(),
        positions=positions.data_ptr(),
        frequencies=frequencies.data_ptr(),
        table=table.data_ptr(),
        order=order.data_ptr(),
        allowed=None if shown is None else shown.data_ptr(),
        query=asking.data_ptr(),
        out=out.data_ptr(),
        log_sum=log_sum.data_ptr(),
    )
    made = library()
    assert made is not None, "takes() asks for it"
    if made.attend(ctypes.byref(step)):
        raise MemoryError("not enough memory to attend to the compressed cache")
    return out, log_sum


@functools.cache
def _pairs(rotary: Rotary | None, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radians a position of each pair, float64; turns of a tile's positions; and channels in its order."""
    frequencies = torch.tensor(rotary.frequencies if rotary else (), dtype=torch.float64)
    angles = torch.arange(TILE, dtype=torch.float64)[:, None] * frequencies
    table = torch.stack((angles.cos(), angles.sin())) * (rotary.scaling if rotary else 1.0)
    order = torch.arange(dim, dtype=torch.int32)
    if rotary is not None and rotary.interleaved:
        turned = order[: rotary.dim]
        order = torch.cat((turned[0::2], turned[1::2], order[rotary.dim :]))
    return frequencies, table.float(), order
