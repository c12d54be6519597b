"""Attention is found however it is called or written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from spectral_compile.passes.attention import canonicalise_attention
from spectral_compile.passes.trace import fake
from tests.passes.harness import HEAD_DIM, HEADS, KV_HEADS, Attention, counts, hidden, run_passes


@pytest.mark.parametrize("cached", [0, 40])
@pytest.mark.parametrize("form", [{}, {"repeated": True}, {"written_out": True}])
def test_a_site_has_keys_and_values_per_kv_head_and_the_graph_stays_as_it_came(form: dict[str, bool], cached: int) -> None:
    trace = run_passes(Attention(**form), canonicalise_attention, cached=cached, **hidden(2, 41))
    (site,) = trace.matched
    assert [fake(node).shape[1] for node in (site.query, site.key, site.value)] == [HEADS, KV_HEADS, KV_HEADS]
    assert site.scale == pytest.approx(HEAD_DIM**-0.5)
    assert site.edge is None and site.layout is None
    assert counts(trace)["softmax" if "written_out" in form else "scaled_dot_product_attention"] == 1


def test_shapes_that_are_no_caches_are_refused() -> None:
    def flat(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return scaled_dot_product_attention(hidden, hidden, hidden), hidden, hidden

    trace = run_passes(flat, canonicalise_attention, hidden=hidden(2, 9)["hidden"])
    assert [site.refusal for site in trace.sites] == ["queries, keys and values are not [batch, heads, tokens, head_dim]"]
