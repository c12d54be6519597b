"""Which layers of a model suffer from compression, for the option ``profile``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from spectral_compile.codec import GRADES, USUAL, Preset, Profile
from spectral_compile.errors import Mistake
from spectral_compile.evaluation.branches import Branch, branched
from spectral_compile.evaluation.contenders import DENSE, Contender, contender, require_matched
from spectral_compile.evaluation.measure import Agreement
from spectral_compile.evaluation.size import compressed_keys
from spectral_compile.report import GraphReport, reports
from spectral_compile.tensor import SpectralTensor

PRESETS = [Preset(grade.key, grade.value) for grade in (USUAL, GRADES[0])]  # a profile interpolates between them
LEAST = 1e-9  # nats
_LOGITS = 1 << 28  # numbers of logits that are there at a time


def steps(layers: int, texts: int) -> int:
    """How many steps ``calibrate`` takes, if all of so many layers are compressed."""
    return texts * (len(PRESETS) + layers)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    passages: Sequence[torch.Tensor],
    prompt: int,
    step: Callable[[str], None] = lambda what: None,
) -> Profile:
    """The profile of ``model`` from texts int64 [1, n + 1]: the first ``prompt`` tokens are cached, the others predicted.

    Each layer's cache, and no other's, is exchanged for what a compressed one holds. What rounding alone changes is taken off,
    as far as the least that any layer changes shows it: best in float32. Layers that stay dense have no losses. ``Refused``
    where all do, and ``Mistake`` where those that do not differ in shape. ``step`` is told each of ``steps`` that is done.
    """
    dense = contender(model, DENSE)
    made, filled = _filled(dense, [ids[:, :prompt] for ids in passages], step)
    scored = [ids[:, prompt:] for ids in passages]
    found = torch.stack([_lost(dense, *given, step) for given in zip(filled, scored, strict=True)]).mean(0)
    found = (found - found.amin(-1, keepdim=True)).clamp(min=LEAST)
    layouts = [site.layout for site in made.layers]
    if len(layouts) - layouts.count(None) != found.shape[-1]:
        raise Mistake("a profile is for models each of whose layers has a cache of its own, and some of this one share theirs")
    shapes = {(layout.kv_heads, layout.head_dim) for layout in layouts if layout}
    if len(shapes) > 1:
        raise Mistake(f"a profile is for layers of one shape, and these have KV heads and channels {sorted(shapes)}")
    columns = (iter(losses) for losses in found.tolist())
    fine, coarse = (tuple(next(column) if layout else None for layout in layouts) for column in columns)
    return Profile(*shapes.pop(), fine, coarse, made.fingerprint)


class _Filled(NamedTuple):
    """A dense cache of a prompt, and of each layer that is compressed its cache under each preset."""

    exact: Cache
    branches: list[list[Branch]]


def _lost(dense: Contender, filled: _Filled, ids: torch.Tensor, step: Callable[[str], None]) -> torch.Tensor:
    """KL divergences float64 [presets, layers] of one text, whose ``ids`` [1, n + 1] come after the prompt."""
    vocabulary, branches = dense.model.config.get_text_config().vocab_size, filled.branches
    at_once = max(1, _LOGITS // ((ids.shape[1] - 1) * vocabulary * len(PRESETS)))  # layers
    targets, losses = ids[0, 1:].to(dense.model.device), []
    for first in range(0, len(branches), at_once):
        some = branches[first : first + at_once]
        expected, *found = branched(dense, filled.exact, ids[:, :-1], [branch for layer in some for branch in layer])
        losses += [Agreement.of(logits, expected, targets).kl for logits in found]
        for _ in some:
            step("trying layers")
    return torch.tensor(losses, dtype=torch.float64).view(len(branches), len(PRESETS)).T


def _filled(dense: Contender, prompts: list[torch.Tensor], step: Callable[[str], None]) -> tuple[GraphReport, list[_Filled]]:
    """What became of the attention layers, and the caches of each prompt."""
    exact: list[Cache] = []
    by_layer: list[dict[int, list[Branch]]] = [{} for _ in prompts]
    for preset in PRESETS:
        ours = contender(dense.model, preset)  # compiled once for all prompts
        for ids, branches in zip(prompts, by_layer, strict=True):
            held = ours.empty()
            for layer in held.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = _Noting
            ours.feed(held, ids, keep=1)
            if preset is PRESETS[0]:
                exact.append(_exact(dense, held, ids))
            for i, layer in enumerate(held.layers):
                if isinstance(getattr(layer, "keys", None), SpectralTensor):
                    branches.setdefault(i, []).append(Branch(i, layer.keys.dense(), layer.values.dense()))
            step("filling caches")
        require_matched({"prefill"})
    return reports()[-1], [_Filled(*given) for given in zip(exact, (list(x.values()) for x in by_layer), strict=True)]


class _Noting(DynamicLayer):
    """A layer that keeps what a prompt attends to beside what becomes of it."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        self.came = key, value
        return super().update(key, value, *rest, **more)


def _exact(dense: Contender, held: Cache, ids: torch.Tensor) -> Cache:
    """The dense cache of ``ids``. A prompt's attention is dense, so its layers need not be computed again."""
    exact = copy.copy(held)
    exact.layers = [copy.copy(layer) for layer in held.layers]
    for layer in exact.layers:
        if isinstance(layer, _Noting):
            layer.__class__ = DynamicLayer
            layer.keys, layer.values = layer.__dict__.pop("came")
    if compressed_keys(exact):
        exact = dense.empty()
        dense.feed(exact, ids, keep=1)
    return exact
