"""Token weights as two kernels: no score leaves the chip."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.kernels.arguments import LEAST, Strides, as_bytes

_TILE: tl.constexpr = tl.constexpr(64)  # queries, and keys, that a program takes at a time
_SPLITS: tl.constexpr = tl.constexpr(16)  # programs that share the keys of a prompt at most
_RUN = 1024  # keys whose scores a program sums up at least


class Sampled(NamedTuple):
    """Queries [B, Hq, x, D], and of some of each row the place there, the column and the token that each is, int64 [B, m]."""

    query: torch.Tensor
    place: torch.Tensor
    column: torch.Tensor
    token: torch.Tensor
    strides: Strides


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
def _queries(sampled, i, b, h, S: tl.constexpr):
    """Sampled queries [M, DIM] of one KV head, and the column and the token of each, -1 past the last."""
    live, d = i < S.query_heads * S.sample, tl.arange(0, S.DIM)
    number = b * S.sample + i % S.sample
    column = tl.load(sampled.column + number, mask=live, other=-1)
    token = tl.load(sampled.token + number, mask=live, other=0)
    place = tl.load(sampled.place + number, mask=live, other=0)
    head = h * S.query_heads + i // S.sample
    at = b * sampled.strides.row + head * sampled.strides.head + place * sampled.strides.column
    q = tl.load(sampled.query + at[:, None] + d[None, :], mask=live[:, None] & (d < S.dim)[None, :], other=0.0)
    return q, column, token


@triton.jit(do_not_specialize=["n", "run"])
def _norms_kernel(sampled, keys, norms, n, run, scale, S: tl.constexpr, PRECISION: tl.constexpr):
    """Logarithms of sums of exponentials of scores, of some queries over ``run`` keys; -inf where nothing is seen."""
    row_head, d, split = tl.program_id(1).to(tl.int64), tl.arange(0, S.DIM), tl.program_id(2)
    b, h = row_head // S.kv_heads, row_head % S.kv_heads
    i = tl.program_id(0) * _TILE + tl.arange(0, _TILE)
    q, at, _ = _queries(sampled, i, b, h, S)
    highest, total = tl.full([_TILE], float("-inf"), tl.float32), tl.zeros([_TILE], tl.float32)
    for start in range(split * run, tl.minimum(tl.max(at, 0).to(tl.int32) + 1, (split + 1) * run), _TILE):
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
    found = tl.where(total > 0, highest + tl.log(tl.maximum(total, 1e-30)), float("-inf"))
    rows = S.query_heads * S.sample
    tl.store(norms + (row_head * tl.num_programs(2) + split) * rows + i, found, mask=i < rows)


@triton.jit
def _norm_of(norms, i, splits, rows):
    """What the scores of some queries are divided by, as a logarithm; infinite where nothing is seen."""
    split = tl.arange(0, _SPLITS)
    held = tl.load(
        norms + split[:, None] * rows + i[None, :], mask=(split < splits)[:, None] & (i < rows)[None, :], other=float("-inf")
    )
    highest = tl.max(held, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(held - safe[None, :]), 0)
    return tl.where(total > 0, safe + tl.log(tl.maximum(total, 1e-30)), float("inf"))


@triton.jit(do_not_specialize=["n"])
def _weights_kernel(sampled, keys, norms, out, n, splits, scale, S: tl.constexpr, PRECISION: tl.constexpr):
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
            q, at, token = _queries(sampled, i, b, h, S)
            norm = _norm_of(norms + (b * S.kv_heads + h) * splits * ROWS, i, splits, ROWS)
            seen = shown[:, None] & (c[:, None] <= at[None, :])
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            attention = tl.where(seen, tl.exp(scores - norm[None, :]) * (token + 1).to(tl.float32)[None, :], 0.0)
            got += tl.sum(attention, 1)
            queries += tl.sum(seen.to(tl.float32), 1)
    tl.store(out + row_group * n + c, got / tl.maximum(queries, 1.0), mask=c < n)


def token_weights(
    query: torch.Tensor,
    place: torch.Tensor,
    column: torch.Tensor,
    token: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
    head_group: int,
) -> torch.Tensor:
    """``reference.token_weights`` in two launches."""
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    batch, kv_heads, count, dim = key.shape
    query_heads, number, tile = query.shape[1] // kv_heads, column.shape[1], _TILE.value
    splits = min(_SPLITS.value, triton.cdiv(count, _RUN))
    run = triton.cdiv(triton.cdiv(count, splits), tile) * tile
    norms = torch.empty(batch, kv_heads, splits, query_heads * number, dtype=torch.float32, device=key.device)
    out = torch.empty(batch, kv_heads // head_group, count, dtype=torch.float32, device=key.device)
    valid = as_bytes(valid)
    sampled = Sampled(query, place, column, token, Strides.of(query))
    keys = Keys(key, valid, Strides.of(key), 0 if valid is None else valid.stride(0))
    sizes = Sizes(kv_heads, head_group, query_heads, number, dim, max(LEAST, triton.next_power_of_2(dim)))
    precision = "tf32x3" if key.dtype == torch.float32 else "tf32"
    _norms_kernel[(triton.cdiv(query_heads * number, tile), batch * kv_heads, splits)](
        sampled, keys, norms, count, run, scale, S=sizes, PRECISION=precision
    )
    _weights_kernel[(triton.cdiv(count, tile), batch * kv_heads // head_group)](
        sampled, keys, norms, out, count, splits, scale, S=sizes, PRECISION=precision
    )
    return out
