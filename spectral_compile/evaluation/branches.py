"""A model tried with one layer's cache exchanged at a time, in the rows of a batch that branch off at that layer.

Up to the layer whose cache is exchanged hidden states are those of the dense model, so they are computed once for all trials.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from spectral_compile.evaluation.contenders import Contender


class Branch(NamedTuple):
    """A trial: a layer of a dense cache has these ``keys`` and ``values`` [1, H, n, D]."""

    layer: int
    keys: torch.Tensor
    values: torch.Tensor


def branched(dense: Contender, exact: Cache, ids: torch.Tensor, branches: Sequence[Branch]) -> list[torch.Tensor]:
    """Logits [n, vocabulary] of ``ids`` [1, n] behind ``exact``, which stays as it is, and then of each branch."""
    if any(not isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in exact.layers):
        return [dense.feed(trial, ids) for trial in _one_by_one(exact, branches)]
    order = sorted(range(len(branches)), key=lambda i: branches[i].layer)  # in which rows come to be
    rows = [branches[i] for i in order]
    trial = copy.copy(exact)
    trial.layers = [
        _in_rows(layer, [(1 + row, branch) for row, branch in enumerate(rows) if branch.layer == i])
        for i, layer in enumerate(exact.layers)
    ]
    counts = [sum(branch.layer == i for branch in rows) for i in range(len(exact.layers))]
    with _growing(dense.model, counts) as grow:
        logits = dense.run(trial, ids if grow else ids.expand(1 + len(rows), -1)).logits
    return [logits[0], *(logits[1 + order.index(i)] for i in range(len(order)))]


def _one_by_one(exact: Cache, branches: Sequence[Branch]) -> Iterator[Cache]:
    """Copies of a cache some of whose layers hold states, which steps write to, and which have no rows to spare."""
    yield copy.deepcopy(exact)
    for branch in branches:
        trial = copy.deepcopy(exact)
        layer = trial.layers[branch.layer]
        layer.keys, layer.values = branch.keys, branch.values
        yield trial


def _in_rows(exact: Any, others: list[tuple[int, Branch]]) -> Any:
    """A dense layer of one row, as a batch sees it, of which some rows have other keys and values."""
    layer = copy.copy(exact)

    def update(key: torch.Tensor, *rest: Any, **more: Any) -> Any:
        own = copy.copy(exact)
        for name in ("keys", "values"):
            past = getattr(exact, name).expand(key.shape[0], -1, -1, -1)
            if others:
                past = past.clone()
            for row, branch in others:
                past[row] = getattr(branch, name)[0]
            setattr(own, name, past)
        return own.update(key, *rest, **more)

    layer.update = update
    return layer


@contextmanager
def _growing(model: PreTrainedModel, counts: list[int]) -> Iterator[bool]:
    """Within it so many rows branch off the first one at each decoder layer; False where the model has no list of these."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) != len(counts):
        yield False
        return
    with ExitStack() as stack:
        for layer, count in zip(layers, counts, strict=True):
            if count:
                handle = layer.register_forward_pre_hook(_branch_off(count), with_kwargs=True)
                stack.callback(handle.remove)
        yield True


def _branch_off(count: int) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        grown = torch.cat((hidden, hidden[:1].expand(count, -1, -1)))
        return ((grown, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": grown})

    return hook
