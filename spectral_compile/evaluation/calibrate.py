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
from spectral_compile.codec import GRADES, USUAL, Preset, Profile
from spectral_compile.evaluation.contenders import DENSE, Contender, contender, require_matched
from spectral_compile.evaluation.measure import Agreement
from spectral_compile.evaluation.texts import calibration, take
from spectral_compile.generate import fail, phases

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
    changes is taken off, as far as the least that any layer changes shows it: best in float32.
    """
    dense = contender(model, DENSE)
    found = torch.tensor([_lost(dense, ids, prompt, step) for ids in passages], dtype=torch.float64).mean(0)
    found = (found - found.amin((-2, -1), keepdim=True)).clamp(min=_LEAST)
    cache = dense.empty()
    dense.feed(cache, passages[0][:, :1])
    _, kv_heads, _, head_dim = cache.layers[0].keys.shape
    return Profile(kv_heads, head_dim, *map(tuple, found.flatten(0, 1).tolist()))


def _lost(dense: Contender, ids: torch.Tensor, prompt: int, step: Callable[[str], None]) -> list[list[list[float]]]:
    """KL divergences under each of ``_PRESETS`` with one layer's keys, and with one layer's values, from a compressed cache."""
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
        losses: list[list[float]] = [[], []]
        for layer in range(len(exact.layers)):
            for side, name in enumerate(("keys", "values")):
                step(f"{name} of layer {layer}")
                trial = copy.copy(exact)
                trial.layers = [copy.copy(part) for part in exact.layers]
                setattr(trial.layers[layer], name, getattr(held.layers[layer], name).dense())
                losses[side].append(Agreement.of(dense.feed(trial, ids[:, prompt:-1]), expected, targets).kl)
        found.append(losses)
    return found


def verb(
    out: Annotated[Path, typer.Argument(help="File to write the profile to")],
    model: Annotated[str | None, Option(help="Id or folder of a transformers model", show_default=models.DEFAULT)] = None,
    text: Annotated[list[Path] | None, Option(exists=True, dir_okay=False, help="A text to use instead; repeatable")] = None,
    tokens: Annotated[int, Option(min=1, help="Tokens of a text that are cached")] = 4096,
    scored: Annotated[int, Option(min=1, help="Tokens that are then predicted")] = 512,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and cache")] = "float32",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
) -> None:
    """Measure which layers of a model need how many bytes, once a model."""
    screen = Console(stderr=True)
    transformers.logging.disable_progress_bar()
    with phases(screen, BarColumn(), MofNCompleteColumn()) as display:
        task = display.add_task(f"loading {model or models.DEFAULT}")
        try:
            loaded, tokenizer = models.load(model, getattr(torch, dtype))
            count = tokens + scored + 1
            if text:
                passages = [take(tokenizer, path.read_text(encoding="utf-8"), count, path.name) for path in text]
            else:
                passages = list(calibration(tokenizer, count).values())
        except (OSError, ValueError) as error:
            fail(screen, str(error))
        loaded.to(models.device_of(device))
        display.update(task, total=2 * len(_PRESETS) * loaded.config.get_text_config().num_hidden_layers * len(passages))
        profile = calibrate(loaded, passages, tokens, lambda what: display.update(task, description=what, advance=1))
    profile.save(out)
    print(f"{out}: give it as options={{'profile': {str(out)!r}}}")
