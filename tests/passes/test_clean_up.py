"""What is left of a graph is what results and effects depend on."""

from __future__ import annotations

import pytest
import torch

from spectral_compile.passes.clean_up import clean_up
from spectral_compile.passes.rewrite import rewrite
from spectral_compile.passes.trace import Trace, fake
from spectral_compile.tensor import SpectralTensor
from tests.passes.harness import Attention, counts, hidden, run_passes


def placeholders(trace: Trace) -> list[torch.fx.Node]:
    return [node for node in trace.gm.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize(("cached", "count"), [(0, 40), (40, 1), (40, 5)])
def test_handles_lengths_and_dead_code_are_gone(cached: int, count: int) -> None:
    given = hidden(2, cached + count)
    before, trace = (run_passes(Attention(), upto, cached=cached, **given) for upto in (rewrite, clean_up))
    assert placeholders(trace) == list(trace.plan.inputs)
    inputs = [x for node in placeholders(trace) for x in (fake(node), trace.examples[node])]
    gone = (SpectralTensor, torch.SymInt) if count == 1 else SpectralTensor  # a chunk may have any number of tokens
    assert not any(isinstance(x, gone) for x in inputs)
    assert counts(trace).total() < counts(before).total()
    trace.gm.graph.lint()


def test_a_decode_step_that_reads_its_past_elsewhere_too_is_refused() -> None:
    class Nosy(Attention):
        def forward(self, hidden, positions, past=None):
            out, keys, values = super().forward(hidden, positions, past)
            return (out if past is None else out + past[0].mean()), keys, values

    trace = run_passes(Nosy(), clean_up, cached=40, **hidden(2, 41))
    assert trace.plan is None
    assert [site.refusal for site in trace.sites] == ["what is cached is read by something else than its attention, too"]
