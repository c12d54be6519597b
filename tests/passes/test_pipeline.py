"""All passes in their order, and what is reported of each."""

from __future__ import annotations

import pytest

from spectral_compile.passes.clean_up import clean_up
from spectral_compile.passes.edges import classify_edges
from spectral_compile.passes.pipeline import PASSES
from tests.passes.harness import Attention, counts, hidden, run_passes
from tests.tiny import build, tokens

NAMES = [run.__name__ for run in PASSES]


@pytest.mark.parametrize("upto", PASSES)
def test_a_graph_goes_through_the_passes_up_to_any_of_them(upto) -> None:
    trace = run_passes(Attention(), upto, **hidden(1, 20))
    assert [done.name for done in trace.passes] == NAMES[: PASSES.index(upto) + 1]
    assert all((done.matched, done.refused) == (1, 0) and done.seconds >= 0 for done in trace.passes)


@pytest.mark.parametrize(("kind", "cached"), [("prefill", 0), ("decode", 20), ("extend", 17)])
def test_a_model_of_transformers_goes_through_all_passes(kind: str, cached: int) -> None:
    trace = run_passes(build("llama"), cached=cached, input_ids=tokens(1, 21))
    assert (trace.plan.kind, len(trace.matched)) == (kind, 2)
    assert counts(trace)["append_.default" if kind == "prefill" else "attend_.default"] == 2


def test_a_site_is_counted_where_it_is_refused() -> None:
    module = Attention()
    trace = run_passes(lambda hidden, positions: module(hidden, positions)[0], **hidden(1, 20))
    assert {done.name: done.refused for done in trace.passes if done.refused} == {"classify_edges": 1}
    matched = [done.matched for done in trace.passes]
    assert matched == [int(i < PASSES.index(classify_edges)) for i in range(len(PASSES))]


def test_every_pass_says_what_it_requires_and_what_it_gives() -> None:
    for run in PASSES:
        assert "Requires: " in run.__doc__ and "Gives: " in run.__doc__
    assert PASSES[-1] is clean_up
