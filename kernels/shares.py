"""Shares of attention that sampled queries give each token, as two kernels: no score leaves the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_compile.kernels.encode import LEAST, flags


@triton.jit
def _asked(asked, column, row, b, pair, PER: tl.constexpr, SAMPLE: tl.constexpr, DP: tl.constexpr):
    """Sampled queries [M, DP] of one KV head, and their columns [M], -1 past the last."""
    live, at = row < PER * SAMPLE, (pair * (PER * SAMPLE) + row)[:, None] * DP + tl.arange(0, DP)[None, :]
    q = tl.load(asked + at, mask=live[:, None], other=0.0)
    return q, tl.load(column + b * SAMPLE + row % SAMPLE, mask=live, other=-1)


@triton.jit(do_not_specialize=["n"])
def _norms_kernel(
    asked, key, valid, column, norms, n, scale, k_b, k_h, k_n, valid_b,
    H: tl.constexpr, PER: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_VALID: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logarithms of the sums that the scores of some queries are divided by; infinite where nothing is seen."""
    pair, d = tl.program_id(1).to(tl.int64), tl.arange(0, DP)
    b, h = pair // H, pair % H
    row = tl.program_id(0) * M + tl.arange(0, M)
    q, at = _asked(asked, column, row, b, pair, PER, SAMPLE, DP)
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
    asked, key, valid, column, judge, norms, out, n, scale, k_b, k_h, k_n, valid_b,
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
            q, at = _asked(asked, column, row, b, b * H + h, PER, SAMPLE, DP)
            token = tl.load(judge + b * SAMPLE + row % SAMPLE, mask=row < PER * SAMPLE, other=0)
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
    """``importance`` by queries in columns int64 [B, m], which are tokens ``judge`` int64 [B, m] of their rows."""
    key, valid = key if key.stride(3) == 1 else key.contiguous(), flags(valid)
    batch, kv_heads, count, dim = key.shape
    per_key, sample = query.shape[1] // kv_heads, column.shape[1]
    padded = max(LEAST, triton.next_power_of_2(dim))
    asked = query.gather(2, column[:, None, :, None].expand(-1, query.shape[1], -1, dim))
    asked = torch.nn.functional.pad(asked, (0, padded - dim)).contiguous()
    norms = torch.empty(batch, kv_heads, per_key * sample, dtype=torch.float32, device=key.device)
    out = torch.empty(batch, kv_heads // head_group, count, dtype=torch.float32, device=key.device)
    strides = (*key.stride()[:3], 0 if valid is None else valid.stride(0))
    sizes = {"PER": per_key, "SAMPLE": sample, "D": dim, "DP": padded, "M": 64, "N": 64}
    kind = {"HAS_VALID": valid is not None, "PRECISION": "tf32x3" if key.dtype == torch.float32 else "tf32"}
    _norms_kernel[(triton.cdiv(per_key * sample, 64), batch * kv_heads)](
        asked, key, valid, column, norms, count, scale, *strides, H=kv_heads, **sizes, **kind
    )
    _shares_kernel[(triton.cdiv(count, 64), batch * kv_heads // head_group)](
        asked, key, valid, column, judge, norms, out, count, scale, *strides, H=kv_heads, HEADS=head_group, **sizes, **kind
    )
    return out
