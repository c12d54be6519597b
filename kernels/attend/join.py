"""Attention to some tokens joins attention to others, by log-sum-exp (Dao et al., arXiv 2205.14135)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_QUERIES = 4  # of a program


@triton.jit
def join_kernel(
    out, total, more, more_total, queries, out_head, out_query, more_head, more_query, rows,
    DIM: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``out`` and ``more`` [H, n, D] by their strides, ``total`` and ``more_total`` [rows = H n]."""
    row, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, DIM)
    ok = row < rows
    before = tl.load(total + row, mask=ok, other=0.0)
    now = tl.load(more_total + row, mask=ok, other=0.0)
    highest = tl.maximum(before, now)
    a, b = tl.exp(before - highest), tl.exp(now - highest)
    head, query = (row // queries).to(tl.int64), row % queries
    held = ok[:, None] & (d < D)[None, :]
    to = out + (head * out_head + query * out_query)[:, None] + d[None, :]
    x = tl.load(to, mask=held, other=0.0)
    y = tl.load(more + (head * more_head + query * more_query)[:, None] + d[None, :], mask=held, other=0.0).to(tl.float32)
    tl.store(to, (x * a[:, None] + y * b[:, None]) / (a + b)[:, None], mask=held)
    tl.store(total + row, highest + tl.log(a + b), mask=ok)


def join(out: torch.Tensor, total: torch.Tensor, more: torch.Tensor, more_total: torch.Tensor) -> None:
    """Update float32 ``out`` [H, n, D] and ``total`` [H, n] by ``more`` attention, to tokens of which each query sees some."""
    heads, queries, dim = out.shape
    join_kernel[(triton.cdiv(heads * queries, _QUERIES),)](
        out, total, more, more_total.contiguous(), queries, *out.stride()[:2], *more.stride()[:2], heads * queries,
        DIM=triton.next_power_of_2(dim), D=dim, N=_QUERIES,
    )  # fmt: skip
