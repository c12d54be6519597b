"""Which layers of a model suffer from compression, for the option ``profile``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from spectral_compile.codec import GRADES, USUAL, Layout, Preset, Profile
from spectral_compile.errors import Mistake
from spectral_compile.evaluation.contenders import DENSE, Contender, contender, require_matched
from spectral_compile.evaluation.measure import Agreement
from spectral_compile.report import reports
from spectral_compile.tensor import SpectralTensor

PRESETS = [Preset(grade.key, grade.value) for grade in (USUAL, GRADES[0])]  # a profile interpolates between them
LEAST = 1e-9  # nats


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    passages: Sequence[torch.Tensor],
    prompt: int,
    step: Callable[[str], None] = lambda what: None,
) -> Profile:
    """The profile of ``model`` from texts int64 [1, n + 1]: the first ``prompt`` tokens are cached, the others predicted.

    Each layer's keys, and then its values, are taken from a compressed cache and all else from a dense one. What rounding alone
    changes is taken off, as far as the least that any layer changes shows it: best in float32. Layers that stay dense have no
    losses. ``Refused`` where all do, and ``Mistake`` where those that do not differ in shape.
    """
    dense = contender(model, DENSE)
    runs = [_lost(dense, ids, prompt, step) for ids in passages]
    found = torch.tensor([losses for _, losses in runs], dtype=torch.float64).mean(0)
    found = (found - found.amin((-2, -1), keepdim=True)).clamp(min=LEAST)
    layouts, _ = runs[0]
    if len(layouts) - layouts.count(None) != found.shape[-1]:
        raise Mistake("a profile is for models each of whose layers has a cache of its own, and some of this one share theirs")
    shapes = {(layout.kv_heads, layout.head_dim) for layout in layouts if layout}
    if len(shapes) > 1:
        raise Mistake(f"a profile is for layers of one shape, and these have KV heads and channels {sorted(shapes)}")
    columns = (iter(column) for column in found.flatten(0, 1).tolist())
    return Profile(*shapes.pop(), *(tuple(next(column) if layout else None for layout in layouts) for column in columns))


def _lost(
    dense: Contender, ids: torch.Tensor, prompt: int, step: Callable[[str], None]
) -> tuple[list[Layout | None], list[list[list[float]]]]:
    """Attention layers, None where they stay dense, and for each other one KL divergences under each of ``PRESETS``.

    First those with that layer's keys from a compressed cache, then with its values.
    """
    exact = dense.empty()
    dense.feed(exact, ids[:, :prompt], keep=1)
    targets = ids[0, prompt + 1 :].to(dense.model.device)
    expected = dense.feed(copy.deepcopy(exact), ids[:, prompt:-1])
    found = []
    for preset in PRESETS:
        ours = contender(dense.model, preset)
        held = ours.empty()
        ours.feed(held, ids[:, :prompt], keep=1)
        require_matched({"prefill"})
        layouts = [site.layout for site in reports()[-1].layers]
        losses: list[list[float]] = [[], []]
        for layer, part in enumerate(held.layers):
            if not isinstance(getattr(part, "keys", None), SpectralTensor):
                continue
            for side, name in enumerate(("keys", "values")):
                step(f"{name} of layer {layer}")
                trial = copy.deepcopy(exact)
                setattr(trial.layers[layer], name, getattr(part, name).dense())
                losses[side].append(Agreement.of(dense.feed(trial, ids[:, prompt:-1]), expected, targets).kl)
        found.append(losses)
    return layouts, found
