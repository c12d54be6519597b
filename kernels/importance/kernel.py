"""Token weights as two kernels: no score leaves the chip."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.kernels.arguments import LEAST, Strides, as_bytes

_TILE: tl.constexpr = tl.constexpr(64)  # queries, and keys, that a program takes at a time


class Sampled(NamedTuple):
    """Some queries of each row: ``query`` [B, Hq, m, padded D], the column and the token that each is, int64 [B, m]."""

    query: torch.Tensor
    column: torch.Tensor
    token: torch.Tensor


class Keys(NamedTuple):
    """``key`` [B, H, n, D] that they ask, and which columns are tokens, uint8 [B, n] or None."""

    key: torch.Tensor
    valid: torch.Tensor | None
    strides: Strides
    valid_row: int


class Sizes(NamedTuple):
    """What the kernels are compiled for. Names in capitals are padded."""

    kv_heads: int
    heads: int  # KV heads of a group
    query_heads: int  # of a KV head
    sample: int
    dim: int
    DIM: int


@triton.jit
def _queries(sampled, i, b, row_head, S: tl.constexpr):
    """Sampled queries [M, DIM] of one KV head, and their columns [M], -1 past the last."""
    ROWS: tl.constexpr = S.query_heads * S.sample
    live, at = i < ROWS, (row_head * ROWS + i)[:, None] * S.DIM + tl.arange(0, S.DIM)[None, :]
    q = tl.load(sampled.query + at, mask=live[:, None], other=0.0)
    return q, tl.load(sampled.column + b * S.sample + i % S.sample, mask=live, other=-1)


@triton.jit(do_not_specialize=["n"])
def _norms_kernel(sampled, keys, norms, n, scale, S: tl.constexpr, PRECISION: tl.constexpr):
    """Logarithms of the sums that the scores of some queries are divided by; infinite where nothing is seen."""
    row_head, d = tl.program_id(1).to(tl.int64), tl.arange(0, S.DIM)
    b, h = row_head // S.kv_heads, row_head % S.kv_heads
    i = tl.program_id(0) * _TILE + tl.arange(0, _TILE)
    q, at = _queries(sampled, i, b, row_head, S)
    highest, total = tl.full([_TILE], float("-inf"), tl.float32), tl.zeros([_TILE], tl.float32)
    for start in range(0, tl.max(at, 0).to(tl.int32) + 1, _TILE):
        c = start + tl.arange(0, _TILE)
        place = b * keys.strides.row + h * keys.strides.head + c[None, :] * keys.strides.column + d[:, None]
        k = tl.load(keys.key + place, mask=(c < n)[None, :] & (d < S.dim)[:, None], other=0.0)
        seen = c[None, :] <= at[:, None]
        if keys.valid is not None:
            seen = seen & (tl.load(keys.valid + b * keys.valid_row + c, mask=c < n, other=0) != 0)[None, :]
        scores = tl.where(seen, tl.dot(q, k, input_precision=PRECISION) * scale, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
        highest = new
    found = tl.where(total > 0, highest + tl.log(tl.maximum(total, 1e-30)), float("inf"))
    tl.store(norms + row_head * (S.query_heads * S.sample) + i, found, mask=i < S.query_heads * S.sample)


@triton.jit(do_not_specialize=["n"])
def _weights_kernel(sampled, keys, norms, out, n, scale, S: tl.constexpr, PRECISION: tl.constexpr):
    """What some tokens of one group get, mean over the queries that see them."""
    GROUPS: tl.constexpr = S.kv_heads // S.heads
    ROWS: tl.constexpr = S.query_heads * S.sample
    row_group, d = tl.program_id(1).to(tl.int64), tl.arange(0, S.DIM)
    b, g = row_group // GROUPS, row_group % GROUPS
    c = tl.program_id(0) * _TILE + tl.arange(0, _TILE)
    shown = c < n
    if keys.valid is not None:
        shown = shown & (tl.load(keys.valid + b * keys.valid_row + c, mask=c < n, other=0) != 0)
    got, queries = tl.zeros([_TILE], tl.float32), tl.zeros([_TILE], tl.float32)
    for head in range(S.heads):
        h = g * S.heads + head
        place = b * keys.strides.row + h * keys.strides.head + c[:, None] * keys.strides.column + d[None, :]
        k = tl.load(keys.key + place, mask=(c < n)[:, None] & (d < S.dim)[None, :], other=0.0)
        for first in range(0, ROWS, _TILE):
            i = first + tl.arange(0, _TILE)
            q, at = _queries(sampled, i, b, b * S.kv_heads + h, S)
            token = tl.load(sampled.token + b * S.sample + i % S.sample, mask=i < ROWS, other=0)
            norm = tl.load(norms + (b * S.kv_heads + h) * ROWS + i, mask=i < ROWS, other=float("inf"))
            seen = shown[:, None] & (c[:, None] <= at[None, :])
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            attention = tl.where(seen, tl.exp(scores - norm[None, :]) * (token + 1).to(tl.float32)[None, :], 0.0)
            got += tl.sum(attention, 1)
            queries += tl.sum(seen.to(tl.float32), 1)
    tl.store(out + row_group * n + c, got / tl.maximum(queries, 1.0), mask=c < n)


def token_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    column: torch.Tensor,
    token: torch.Tensor,
    scale: float,
    head_group: int,
) -> torch.Tensor:
    """``reference.token_weights`` in two launches."""
    key, valid = key if key.stride(3) == 1 else key.contiguous(), as_bytes(valid)
    batch, kv_heads, count, dim = key.shape
    query_heads, sample = query.shape[1] // kv_heads, column.shape[1]
    padded = max(LEAST, triton.next_power_of_2(dim))
    asked = query.gather(2, column[:, None, :, None].expand(-1, query.shape[1], -1, dim))
    asked = torch.nn.functional.pad(asked, (0, padded - dim)).contiguous()
    norms = torch.empty(batch, kv_heads, query_heads * sample, dtype=torch.float32, device=key.device)
    out = torch.empty(batch, kv_heads // head_group, count, dtype=torch.float32, device=key.device)
    sampled = Sampled(asked, column, token)
    keys = Keys(key, valid, Strides.of(key), 0 if valid is None else valid.stride(0))
    sizes = Sizes(kv_heads, head_group, query_heads, sample, dim, padded)
    precision = "tf32x3" if key.dtype == torch.float32 else "tf32"
    tile = _TILE.value
    _norms_kernel[(triton.cdiv(query_heads * sample, tile), batch * kv_heads)](
        sampled, keys, norms, count, scale, S=sizes, PRECISION=precision
    )
    _weights_kernel[(triton.cdiv(count, tile), batch * kv_heads // head_group)](
        sampled, keys, norms, out, count, scale, S=sizes, PRECISION=precision
    )
    return out
