"""``spectral-compile calibrate``: which layers of a model suffer from compression, for the option ``profile``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from transformers import PreTrainedModel
from typer import Option

from spectral_compile import models
from spectral_compile.codec import GRADES, USUAL, Layout, Preset, Profile
from spectral_compile.command import phases
from spectral_compile.errors import Mistake
from spectral_compile.evaluation.contenders import DENSE, Contender, contender, require_matched
from spectral_compile.evaluation.measure import Agreement
from spectral_compile.evaluation.texts import calibration
from spectral_compile.files import check_writable, read_texts
from spectral_compile.report import reports
from spectral_compile.tensor import SpectralTensor

_PRESETS = [Preset(grade.key, grade.value) for grade in (USUAL, GRADES[0])]  # a profile interpolates between them
_LEAST = 1e-9  # nats


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
    found = (found - found.amin((-2, -1), keepdim=True)).clamp(min=_LEAST)
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
    """Attention layers, None where they stay dense, and for each other one KL divergences under each of ``_PRESETS``.

    First those with that layer's keys from a compressed cache, then with its values.
    """
    exact = dense.empty()
    dense.feed(exact, ids[:, :prompt], keep=1)
    targets = ids[0, prompt + 1 :].to(dense.model.device)
    expected = dense.feed(copy.deepcopy(exact), ids[:, prompt:-1])
    found = []
    for preset in _PRESETS:
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


def verb(
    out: Annotated[Path, typer.Argument(callback=check_writable, help="File to write the profile to")],
    model: Annotated[str | None, Option(help="Id or folder of a transformers model", show_default=models.DEFAULT)] = None,
    text: Annotated[list[Path] | None, Option(help="A text to use instead; repeatable")] = None,
    tokens: Annotated[int, Option(min=1, help="Tokens of a text that are cached")] = 4096,
    scored: Annotated[int, Option(min=1, help="Tokens that are then predicted")] = 512,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and cache")] = "float32",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
) -> None:
    """Measure which layers of a model need how many bytes, once a model."""
    where = models.device_of(device)
    given = read_texts(text or ())
    screen = Console(stderr=True)
    transformers.logging.disable_progress_bar()
    with phases(screen, BarColumn(), MofNCompleteColumn()) as display:
        task = display.add_task(f"loading {model or models.DEFAULT}")
        loaded, tokenizer = models.load(model, getattr(torch, dtype))
        passages = calibration(tokenizer, tokens + scored + 1, given)
        loaded.to(where)
        display.update(task, total=2 * len(_PRESETS) * loaded.config.get_text_config().num_hidden_layers * len(passages))
        profile = calibrate(
            loaded, list(passages.values()), tokens, lambda what: display.update(task, description=what, advance=1)
        )
    profile.save(out)
    print(f"{out}: give it as options={{'profile': {str(out)!r}}}")
