"""Shares of attention that sampled queries give each token, as two kernels: no score leaves the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_compile.kernels.encode import LEAST, flags


@triton.jit
def _asked(query, column, judge, row, b, h, q_b, q_h, q_n, PER: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr):  # fmt: skip
    """Sampled queries [M, DP] of one KV head, their columns [M], -1 past the last, and which tokens they are."""
    d, live, sampled = tl.arange(0, DP), row < PER * SAMPLE, b * SAMPLE + row % SAMPLE
    at = tl.load(column + sampled, mask=live, other=-1)
    token = tl.load(judge + sampled, mask=live, other=0)
    where = b * q_b + (h * PER + row // SAMPLE) * q_h + at * q_n
    return tl.load(query + where[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0), at, token


@triton.jit(do_not_specialize=["n"])
def _norms_kernel(
    query, key, valid, column, judge, norms, n, scale, q_b, q_h, q_n, k_b, k_h, k_n, valid_b,
    H: tl.constexpr, PER: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_VALID: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logarithms of the sums that the scores of some queries are divided by; infinite where nothing is seen."""
    pair, d = tl.program_id(1).to(tl.int64), tl.arange(0, DP)
    b, h = pair // H, pair % H
    row = tl.program_id(0) * M + tl.arange(0, M)
    q, at, _ = _asked(query, column, judge, row, b, h, q_b, q_h, q_n, PER, SAMPLE, D, DP)
    highest, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    for start in range(0, tl.max(at, 0).to(tl.int32) + 1, N):
        c = start + tl.arange(0, N)
        k = tl.load(
            key + b * k_b + h * k_h + c[None, :] * k_n + d[:, None], mask=(c < n)[None, :] & (d < D)[:, None], other=0.0
        )
        seen = c[None, :] <= at[:, None]
        if HAS_VALID:
            seen = seen & (tl.load(valid + b * valid_b + c, mask=c < n, other=0) != 0)[None, :]
        scores = tl.where(seen, tl.dot(q, k, input_precision=PRECISION) * scale, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
        highest = new
    found = tl.where(total > 0, highest + tl.log(tl.maximum(total, 1e-30)), float("inf"))
    tl.store(norms + pair * (PER * SAMPLE) + row, found, mask=row < PER * SAMPLE)


@triton.jit(do_not_specialize=["n"])
def _shares_kernel(
    query, key, valid, column, judge, norms, out, n, scale, q_b, q_h, q_n, k_b, k_h, k_n, valid_b,
    H: tl.constexpr, HEADS: tl.constexpr, PER: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HAS_VALID: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What some tokens of one group get, mean over the queries that see them."""
    GROUPS: tl.constexpr = H // HEADS
    pair, d = tl.program_id(1).to(tl.int64), tl.arange(0, DP)
    b, g = pair // GROUPS, pair % GROUPS
    c = tl.program_id(0) * N + tl.arange(0, N)
    shown = c < n
    if HAS_VALID:
        shown = shown & (tl.load(valid + b * valid_b + c, mask=c < n, other=0) != 0)
    got, queries = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for i in range(HEADS):
        h = g * HEADS + i
        k = tl.load(
            key + b * k_b + h * k_h + c[:, None] * k_n + d[None, :], mask=(c < n)[:, None] & (d < D)[None, :], other=0.0
        )
        for first in range(0, PER * SAMPLE, M):
            row = first + tl.arange(0, M)
            q, at, token = _asked(query, column, judge, row, b, h, q_b, q_h, q_n, PER, SAMPLE, D, DP)
            norm = tl.load(norms + (b * H + h) * (PER * SAMPLE) + row, mask=row < PER * SAMPLE, other=float("inf"))
            seen = shown[:, None] & (c[:, None] <= at[None, :])
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            share = tl.where(seen, tl.exp(scores - norm[None, :]) * (token + 1).to(tl.float32)[None, :], 0.0)
            got += tl.sum(share, 1)
            queries += tl.sum(seen.to(tl.float32), 1)
    tl.store(out + pair * n + c, got / tl.maximum(queries, 1.0), mask=c < n)


def shares(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    column: torch.Tensor,
    judge: torch.Tensor,
    scale: float,
    head_group: int,
) -> torch.Tensor:
    """``importance`` as judged by queries in columns int64 [B, m], which are tokens ``judge`` int64 [B, m] of their rows."""
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    valid = flags(valid)
    batch, kv_heads, count, dim = key.shape
    per_key, sample = query.shape[1] // kv_heads, column.shape[1]
    norms = torch.empty(batch, kv_heads, per_key * sample, dtype=torch.float32, device=key.device)
    out = torch.empty(batch, kv_heads // head_group, count, dtype=torch.float32, device=key.device)
    strides = (*query.stride()[:3], *key.stride()[:3], 0 if valid is None else valid.stride(0))
    sizes = {"PER": per_key, "SAMPLE": sample, "D": dim, "DP": max(LEAST, triton.next_power_of_2(dim)), "M": 64, "N": 64}
    kind = {"HAS_VALID": valid is not None, "PRECISION": "tf32x3" if key.dtype == torch.float32 else "tf32"}
    _norms_kernel[(triton.cdiv(per_key * sample, 64), batch * kv_heads)](
        query, key, valid, column, judge, norms, count, scale, *strides, H=kv_heads, **sizes, **kind
    )
    _shares_kernel[(triton.cdiv(count, 64), batch * kv_heads // head_group)](
        query, key, valid, column, judge, norms, out, count, scale, *strides, H=kv_heads, HEADS=head_group, **sizes, **kind
    )
    return out
