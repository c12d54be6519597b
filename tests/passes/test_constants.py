"""What passes have read while tracing is noted by them, and guarded."""

from __future__ import annotations

import torch

import spectral_compile as sc
from spectral_compile.passes.constants import CONSTANT, name_of
from spectral_compile.passes.masks import classify_masks
from tests.passes.harness import Attention, hidden, run_passes
from tests.tiny import EXACT


def test_frequencies_of_rope_are_noted_before_constants_are_guarded() -> None:
    module = Attention()
    trace = run_passes(module, classify_masks, **hidden(2, 40))
    noted = {name_of(node): node.meta[CONSTANT] for node in trace.gm.graph.nodes if CONSTANT in node.meta}
    assert list(noted) == ["inv_freq"] and torch.equal(noted["inv_freq"], module.inv_freq)


def test_a_graph_is_asked_for_again_only_where_a_constant_has_changed() -> None:
    sc.reset()
    module, given = Attention(), hidden(1, 40)
    compiled = torch.compile(module, backend=sc.spectral, options=EXACT)
    with torch.no_grad():
        for change, graphs in ((1.0, 1), (1.0, 1), (0.5, 2)):
            module.inv_freq.mul_(change)
            torch.testing.assert_close(compiled(**given)[0], module(**given)[0])
            assert [graph.matched for graph in sc.reports()] == [1] * graphs
    sc.reset()
