"""A random sequence of what can be done to one cache, on the compressed one and on a dense one: they never differ."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.bench.generation import recordings
from spectral_compile.cache.store import SpectralStore
from spectral_compile.tensor import SpectralTensor
from tests.budget import examples
from tests.tiny import EXACT, GREEDY, build, tokens

MOST_ROWS, MOST_TOKENS = 4, 160


class Caches(RuleBasedStateMachine):
    """``ours`` and ``theirs`` have seen the same tokens; ``kept`` are pairs that were copied and may come back."""

    def __init__(self) -> None:
        super().__init__()
        sc.reset()  # of an earlier model nothing is left that counts as a recompilation
        self.dense = build("llama")
        self.model = build("llama")
        self.model.compile(backend=sc.spectral, options=EXACT)
        self.kept: list[tuple[object, object]] = []
        self.seed = 0

    @torch.no_grad()
    def feed(self, count: int) -> None:
        self.seed += 1
        ids = tokens(self.rows, count, seed=self.seed)
        ours = self.model(ids, past_key_values=self.ours, use_cache=True)
        theirs = self.dense(ids, past_key_values=self.theirs, use_cache=True)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
        self.ours, self.theirs = ours.past_key_values, theirs.past_key_values

    @property
    def rows(self) -> int:
        return 1 if self.theirs is None else self.theirs.layers[0].keys.shape[0]

    @property
    def length(self) -> int:
        return self.theirs.get_seq_length()

    @initialize(count=st.integers(1, 60))
    def prefill(self, count: int) -> None:
        self.ours = self.theirs = None
        self.feed(count)

    @precondition(lambda self: self.length < MOST_TOKENS)
    @rule()
    def decode(self) -> None:
        self.feed(1)

    @precondition(lambda self: self.length < MOST_TOKENS)
    @rule(count=st.integers(2, 30))
    def extend(self, count: int) -> None:
        self.feed(count)

    @precondition(lambda self: self.length > 1)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, min(self.length - 1, 40)))
        for cache in (self.ours, self.theirs):
            cache.crop(-count)

    @precondition(lambda self: self.rows <= MOST_ROWS // 2)
    @rule()
    def repeat(self) -> None:
        for cache in (self.ours, self.theirs):
            cache.batch_repeat_interleave(2)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=MOST_ROWS)))
        for cache in (self.ours, self.theirs):
            cache.batch_select_indices(chosen)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        chosen = torch.tensor(data.draw(st.permutations(range(self.rows))))
        for cache in (self.ours, self.theirs):
            cache.reorder_cache(chosen)

    @precondition(lambda self: len(self.kept) < 3)
    @rule()
    def fork(self) -> None:
        self.kept.append((copy.deepcopy(self.ours), copy.deepcopy(self.theirs)))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def go_on_with_another(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.kept) - 1))
        other, self.kept[at] = self.kept[at], (self.ours, self.theirs)
        self.ours, self.theirs = other

    @invariant()
    def it_is_compressed(self) -> None:
        if hasattr(self, "ours"):
            assert all(isinstance(layer.keys, SpectralTensor) for layer in self.ours.layers)
            assert self.ours.get_seq_length() == self.length
            assert report.decodes() == 0


@pytest.mark.slow
def test_no_sequence_of_operations_tells_the_caches_apart() -> None:
    amount = {"max_examples": examples(3, full=8), "stateful_step_count": examples(20, full=40)}
    run_state_machine_as_test(Caches, settings=settings(deadline=None, **amount))


@pytest.mark.slow
def test_many_generations_leave_nothing_behind() -> None:
    """Of other lengths and rows: no more graphs after the first few, and no store that is not the last one's."""
    sc.reset()
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "preset": "balanced"})
    graphs = 0
    for turn in range(examples(40, full=200)):
        out = model.generate(tokens(1 + turn % 2, 20 + turn % 37, seed=turn), max_new_tokens=6, **GREEDY)
        if turn == 20:
            graphs = len(sc.reports())
    assert len(sc.reports()) == graphs
    assert recordings(out.device) == 0
    gc.collect()
    assert sum(isinstance(x, SpectralStore) for x in gc.get_objects()) == 0
