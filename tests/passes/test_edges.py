"""How keys and values come from the cache and go back to it."""

from __future__ import annotations

import pytest
import torch

from spectral_compile.passes.edges import classify_edges
from spectral_compile.passes.trace import fake
from spectral_compile.tensor import SpectralTensor
from tests.passes.harness import HEAD_DIM, KV_HEADS, Attention, counts, hidden, run_passes


@pytest.mark.parametrize(("kind", "cached", "count"), [("prefill", 0, 40), ("decode", 40, 1), ("extend", 40, 5)])
def test_every_kind_of_edge(kind: str, cached: int, count: int) -> None:
    trace = run_passes(Attention(), classify_edges, cached=cached, **hidden(2, cached + count))
    (site,) = trace.matched
    assert site.edge.kind == trace.kind == kind
    assert [tuple(fake(node).shape) for node in site.edge.new] == [(2, KV_HEADS, count, HEAD_DIM)] * 2
    assert set(site.edge.grown) <= set(trace.output.all_input_nodes)
    past = [fake(node) for node in site.edge.past or ()]
    assert len(past) == (0 if kind == "prefill" else 2) and all(isinstance(x, SpectralTensor) for x in past)
    assert all(x.kind.layout is site.layout for x in past)
    assert site.layout is not None and (site.layout.rotary is None) == (kind == "prefill")
    assert counts(trace)["scaled_dot_product_attention"] == 1


def test_without_a_cache_there_is_no_edge() -> None:
    module = Attention()
    trace = run_passes(lambda hidden, positions: module(hidden, positions)[0], classify_edges, **hidden(2, 9))
    assert [(site.edge, site.layout) for site in trace.sites] == [(None, None)]
    assert trace.sites[0].refusal == "the cache does not leave this graph"


def test_a_dense_past_is_refused() -> None:
    module, past = Attention(), (torch.randn(2, KV_HEADS, 7, HEAD_DIM),) * 2
    trace = run_passes(lambda hidden, positions: module(hidden, positions, past), classify_edges, **hidden(2, 1))
    (site,) = trace.sites
    assert site.refusal == "the cache holds dense tensors: it was filled outside of a graph that this backend compiled"
