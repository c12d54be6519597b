"""Passes one by one: what a graph has become behind any of them, and a module that is one attention over a cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn.functional import linear, scaled_dot_product_attention, silu

import spectral_compile as sc
from spectral_compile.backend import own_copy
from spectral_compile.config import SpectralConfig
from spectral_compile.outputs import cache_argument, cache_of
from spectral_compile.passes import pipeline
from spectral_compile.passes.clean_up import clean_up
from spectral_compile.passes.trace import Trace, call_name

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 32


class _Captured(Exception):
    """The graph has come, and is not to run."""


def run_passes(
    model: Callable[..., Any],
    upto: Callable[[Trace], None] = clean_up,
    *,
    cached: int = 0,
    options: dict[str, Any] | None = None,
    **inputs: torch.Tensor,
) -> Trace:
    """The trace of ``model(**inputs)`` behind the passes up to and including ``upto``; the graph is not run.

    ``inputs`` have tokens along dimension 1. Of these the first ``cached`` are given to the compiled model beforehand, so that
    the graph is a prefill with 0, else a decode step if one token is left, and an extend if there are more. ``model`` is one of
    transformers, or returns ``(output, keys, values)`` and takes ``past=(keys, values)``, as ``Attention`` does.
    """
    given = {**(options or {}), "inner": "eager"}
    passes = pipeline.PASSES[: pipeline.PASSES.index(upto) + 1]
    traces: list[Trace] = []

    def capture(gm: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        trace = Trace(own_copy(gm), {}, SpectralConfig.parse(given))
        placeholders = [node for node in trace.gm.graph.nodes if node.op == "placeholder"]
        trace.examples = dict(zip(placeholders, examples, strict=True))
        pipeline.run_passes(trace, passes=passes)
        traces.append(trace)
        return stop

    def stop(*_: Any) -> Any:
        raise _Captured

    sc.reset()
    rest, past = {name: x[:, cached:] for name, x in inputs.items()}, {}
    with torch.no_grad():
        if cached:
            first = {name: x[:, :cached] for name, x in inputs.items()}
            out = torch.compile(model, backend=sc.spectral, options=given)(**first)
            past = {"past": out[1:]} if isinstance(out, tuple) else cache_argument(cache_of(out))
        try:
            torch.compile(model, backend=capture)(**rest, **past)
        except _Captured:
            return traces[-1]
        finally:
            sc.reset()
    raise AssertionError("the model ran without a graph")


def counts(trace: Trace) -> Counter[str]:
    """How often each function or method is called in a graph, by name; operations of this project as ``append_.default``."""
    return Counter(call_name(node) for node in trace.gm.graph.nodes if node.op in ("call_function", "call_method"))


class Attention(torch.nn.Module):
    """Attention of 4 query heads to 2 KV heads of 16 channels, over a cache that grows by concatenation.

    ``rope`` rotates queries and keys; ``repeated`` repeats KV heads in the graph instead of by ``enable_gqa``; ``written_out``
    has matmul and softmax instead of one call; an ``mlp`` of that width follows. Chunks behind a past have a causal mask.
    """

    masked = False  # whether every call has a mask

    def __init__(self, rope: bool = True, repeated: bool = False, written_out: bool = False, mlp: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(out: int, given: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(out, given, generator=generator) / math.sqrt(given))

        self.query, self.key, self.value = (weight(h * HEAD_DIM, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS))
        self.out = weight(WIDTH, HEADS * HEAD_DIM)
        self.up, self.down = (weight(mlp, WIDTH), weight(WIDTH, mlp)) if mlp else (None, None)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.rope, self.repeated, self.written_out = rope, repeated, written_out

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of hidden states [B, n, 32] at positions [B, n] and a past [B, 2, T, 16]: output [B, n, 32], and the grown past."""
        batch, count, _ = hidden.shape
        query, key, value = (
            linear(hidden, w).view(batch, count, -1, HEAD_DIM).transpose(1, 2) for w in (self.query, self.key, self.value)
        )
        if self.rope:
            query, key = self._rotated(query, positions), self._rotated(key, positions)
        old = (key.new_empty(batch, KV_HEADS, 0, HEAD_DIM),) * 2 if past is None else past
        keys, values = torch.cat((old[0], key), 2), torch.cat((old[1], value), 2)
        rows, columns = torch.arange(count)[:, None] + old[0].shape[2], torch.arange(keys.shape[2])
        mask = self.mask(rows, columns) if self.masked or (past is not None and count > 1) else None
        out = linear(self._attend(query, keys, values, mask).transpose(1, 2).reshape(batch, count, -1), self.out)
        if self.up is not None:
            out = out + linear(silu(linear(out, self.up)), self.down)
        return out, keys, values

    def mask(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Whether the token in each of ``rows`` [n, 1] sees each of ``columns`` [T]."""
        return (columns <= rows)[None, None]

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = (positions[:, None, :, None] * self.inv_freq).repeat(1, 1, 1, 2)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        first = mask is None and query.shape[2] > 1
        if not (self.repeated or self.written_out):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=first, enable_gqa=True)
        key, value = (
            x[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(x.shape[0], HEADS, x.shape[2], HEAD_DIM)
            for x in (key, value)
        )
        if not self.written_out:
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=first)
        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(HEAD_DIM)
        if first:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores + torch.where(mask, 0.0, -torch.inf)
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32), value)


def hidden(rows: int, count: int) -> dict[str, torch.Tensor]:
    """Inputs of ``Attention``: random hidden states at positions from 0 on."""
    states = torch.randn(rows, count, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"hidden": states, "positions": torch.arange(count).expand(rows, count)}
