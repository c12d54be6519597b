"""Which layers of a model suffer from compression, for the option ``profile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from spectral_compile.codec import GRADES, USUAL, Layout, Preset, Profile
from spectral_compile.errors import Mistake
from spectral_compile.evaluation.branches import Branch, branched
from spectral_compile.evaluation.contenders import DENSE, Contender, contender, require_matched
from spectral_compile.evaluation.measure import Agreement
from spectral_compile.report import reports
from spectral_compile.tensor import SpectralTensor

PRESETS = [Preset(grade.key, grade.value) for grade in (USUAL, GRADES[0])]  # a profile interpolates between them
LEAST = 1e-9  # nats
_LOGITS = 1 << 28  # numbers of logits that are there at a time


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
    found = torch.stack([losses for _, losses in runs]).mean(0)
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
) -> tuple[list[Layout | None], torch.Tensor]:
    """Attention layers, None where they stay dense, and KL divergences float64 [presets, sides, layers] of the others.

    First those with that layer's keys from a compressed cache, then with its values.
    """
    exact = dense.empty()
    dense.feed(exact, ids[:, :prompt], keep=1)
    layouts, branches = _branches(dense, ids[:, :prompt])
    scored, vocabulary = ids[:, prompt:-1], dense.model.config.get_text_config().vocab_size
    at_once = max(1, _LOGITS // (scored.shape[1] * vocabulary * len(branches[0])))  # layers
    targets, losses = ids[0, prompt + 1 :].to(dense.model.device), []
    for first in range(0, len(branches), at_once):
        some = branches[first : first + at_once]
        for _ in some:
            step(f"layers {first} to {first + len(some) - 1}")
        expected, *found = branched(dense, exact, scored, [branch for layer in some for branch in layer])
        losses += [Agreement.of(logits, expected, targets).kl for logits in found]
    by_layer = torch.tensor(losses, dtype=torch.float64).view(len(branches), len(PRESETS), 2)
    return layouts, by_layer.permute(1, 2, 0)


def _branches(dense: Contender, ids: torch.Tensor) -> tuple[list[Layout | None], list[list[Branch]]]:
    """Attention layers, None where they stay dense, and for each other one its keys, then its values, under each preset."""
    layouts: list[Layout | None] = []
    by_layer: dict[int, list[Branch]] = {}
    for preset in PRESETS:
        ours = contender(dense.model, preset)
        held = ours.empty()
        ours.feed(held, ids, keep=1)
        require_matched({"prefill"})
        layouts = [site.layout for site in reports()[-1].layers]
        for layer, part in enumerate(held.layers):
            if isinstance(getattr(part, "keys", None), SpectralTensor):
                new = [Branch(layer, name, getattr(part, name).dense()) for name in ("keys", "values")]
                by_layer.setdefault(layer, []).extend(new)
    return layouts, list(by_layer.values())
