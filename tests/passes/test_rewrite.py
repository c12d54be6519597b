"""Operations take the place of attention and cache."""

from __future__ import annotations

import pytest
import torch

from spectral_compile.kernels.buffers import Buffers
from spectral_compile.passes.rewrite import rewrite
from spectral_compile.passes.trace import Trace, is_call
from tests.passes.harness import Attention, counts, hidden, run_passes


def placeholders(trace: Trace) -> list[torch.fx.Node]:
    return [node for node in trace.gm.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize(
    ("kind", "cached", "count", "operations"),
    [
        ("prefill", 0, 40, {"advance_.default": 1, "append_.default": 1, "scaled_dot_product_attention": 1}),
        ("decode", 40, 1, {"advance_.default": 1, "attend_.default": 1}),
        ("extend", 40, 5, {"advance_.default": 1, "attend_.default": 1}),
    ],
)
def test_the_operations_of_every_kind(kind: str, cached: int, count: int, operations: dict[str, int]) -> None:
    trace = run_passes(Attention(), rewrite, cached=cached, **hidden(2, cached + count))
    known = ("advance_.default", "append_.default", "attend_.default", "scaled_dot_product_attention")
    found = counts(trace)
    assert {name: found[name] for name in known if found[name]} == operations
    first = next(node for node in trace.gm.graph.nodes if is_call(node, *known))
    assert is_call(first, "advance_.default")
    assert trace.plan.kind == kind and len(trace.plan.sites) == 1
    assert trace.plan.outputs == (("result", 0), *((("key", 0), ("value", 0)) if kind == "prefill" else trace.plan.outputs[1:]))
    assert len(trace.output.args[0]) == 1  # of three: the cache is no output any more


def test_new_inputs_stand_behind_the_old_ones_and_are_named_in_the_plan() -> None:
    trace = run_passes(Attention(), rewrite, cached=40, **hidden(2, 41))
    sources = [trace.plan.inputs[node] for node in placeholders(trace)]
    old = [source for source in sources if source[0] == "argument"]
    assert sources[: len(old)] == old == [("argument", i) for i in range(len(old))]
    assert sources[len(old) :] == [("ledger",), ("positions",), *[("buffer", 0, name) for name in Buffers._fields]]
    assert all(node in trace.examples for node in placeholders(trace))


def test_without_a_matched_site_nothing_is_rewritten() -> None:
    module = Attention()
    trace = run_passes(lambda hidden, positions: module(hidden, positions)[0], rewrite, **hidden(2, 9))
    assert trace.plan is None and counts(trace)["scaled_dot_product_attention"] == 1 and counts(trace)["advance_.default"] == 0
