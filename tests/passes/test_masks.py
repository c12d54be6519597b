"""Masks are told by what they hide."""

from __future__ import annotations

import pytest
import torch

from spectral_compile.passes.masks import classify_masks
from tests.passes.harness import Attention, counts, hidden, run_passes


class Causal(Attention):
    masked = True


class Window(Causal):
    def mask(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return ((columns <= rows) & (columns > rows - 7))[None, None]


class Sparse(Causal):
    def mask(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return ((columns <= rows) & ((columns % 3 == 0) | (columns == rows)))[None, None]


class PerHead(Causal):
    def mask(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return Sparse.mask(self, rows, columns).expand(1, 4, -1, -1)


@pytest.mark.parametrize(("cached", "count"), [(0, 40), (40, 1), (40, 5)])
@pytest.mark.parametrize(
    ("kind", "found"), [(Causal, ("causal", 0)), (Window, ("causal", 7)), (Sparse, ("tensor", 0)), (Attention, ("causal", 0))]
)
def test_a_mask_is_what_it_hides(kind: type[Attention], found: tuple[str, int], cached: int, count: int) -> None:
    trace = run_passes(kind(), classify_masks, cached=cached, **hidden(2, cached + count))
    (site,) = trace.matched
    assert (site.mask_kind, site.sliding_window) == found
    assert site.padding is None
    assert counts(trace)["scaled_dot_product_attention"] == 1


def test_a_mask_that_differs_from_head_to_head_is_refused_where_it_would_be_read() -> None:
    trace = run_passes(PerHead(), classify_masks, cached=40, **hidden(2, 45))
    assert [site.refusal for site in trace.sites] == ["its mask is not [batch, 1, queries, keys]"]
