"""``spectral-compile eval --trace``: a compressed cache beside the dense one, token by token and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile.codec import Profile
from spectral_compile.evaluation.contenders import DENSE, contender, require_matched
from spectral_compile.evaluation.measure import Agreement


@dataclass(frozen=True)
class Step:
    """One decode step after the same tokens.

    ``dense`` and ``ours`` are the likeliest tokens, ``gap`` by how much the dense logits prefer theirs, ``kl`` is in nats, and
    ``layers`` holds the correlation of what each layer adds to the residual stream.
    """

    dense: int
    ours: int
    gap: float
    kl: float
    layers: tuple[float, ...]


@torch.no_grad()
def trace(
    model: PreTrainedModel, name: str, ids: torch.Tensor, count: int, inner: str = "eager", profile: Profile | None = None
) -> list[Step]:
    """``count`` greedy tokens of the dense model after ``ids`` [1, n], predicted from the cache called ``name`` too."""
    dense, ours = contender(model, DENSE), contender(model, name, inner, profile)
    caches = dense.empty(), ours.empty()
    token = dense.feed(caches[0], ids, keep=1).argmax(-1)
    ours.feed(caches[1], ids, keep=1)
    steps = []
    for _ in range(count):
        outs = [of.run(cache, token[None], output_hidden_states=True) for of, cache in zip((dense, ours), caches, strict=True)]
        theirs, mine = (out.logits[0] for out in outs)
        best, other = theirs.argmax(-1), mine.argmax(-1)
        added = zip(*(torch.stack(out.hidden_states).float().flatten(1).diff(dim=0) for out in outs), strict=True)
        steps.append(
            Step(
                dense=best.item(),
                ours=other.item(),
                gap=(theirs[0, best] - theirs[0, other]).item(),
                kl=Agreement.of(mine, theirs, best).kl,
                layers=tuple(torch.cosine_similarity(a, b, dim=0).item() for a, b in added),
            )
        )
        token = best
    if ours.compressed:
        require_matched({"prefill", "decode"})
    return steps


def first_drift(steps: list[Step]) -> int:
    """The first layer that has lost half as much correlation, in the mean, as the layer that has lost most."""
    lost = [1 - sum(column) / len(steps) for column in zip(*(step.layers for step in steps), strict=True)]
    return next(layer for layer, x in enumerate(lost) if x >= max(lost) / 2)


def show(steps: list[Step], name: str, tokenizer: PreTrainedTokenizerBase) -> Table:
    """A row for each step, with what diverged marked, and a sentence on where."""
    shown = Table(title=f"{name} beside {DENSE}, both after the dense model's tokens", title_justify="left")
    for column in ("step", DENSE, name, "logit gap", "KL, nats", "least correlation, in layer"):
        shown.add_column(column, justify="left" if column in (DENSE, name) else "right")
    for number, step in enumerate(steps, 1):
        worst = min(range(len(step.layers)), key=step.layers.__getitem__)
        tokens = [repr(tokenizer.decode([token])) for token in (step.dense, step.ours)]
        cells = [f"{step.gap:.3f}", f"{step.kl:.5f}", f"{step.layers[worst]:.4f}, {worst}"]
        shown.add_row(str(number), *tokens, *cells, style="bold red" if step.dense != step.ours else None)
    apart = [number for number, step in enumerate(steps, 1) if step.dense != step.ours]
    said = f"the first other token comes at step {apart[0]}, {len(apart)} in all" if apart else "no token is another one"
    shown.caption = f"{said}; layer {first_drift(steps)} is the first to drift"
    return shown
