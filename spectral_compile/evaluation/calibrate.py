"""``spectral-compile calibrate``: which layers of a model suffer from compression, for the option ``profile``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
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
from spectral_compile.codec import GRADES, PRESETS, Preset, Profile
from spectral_compile.evaluation.contenders import DENSE, contender, require_matched
from spectral_compile.evaluation.measure import Agreement
from spectral_compile.evaluation.texts import calibration, take
from spectral_compile.generate import fail, phases

_LEAST = 1e-9  # nats


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    passages: Iterable[torch.Tensor],
    prompt: int,
    step: Callable[[str], None] = lambda what: None,
) -> Profile:
    """The profile of ``model`` from texts int64 [1, n + 1]: the first ``prompt`` tokens are cached, the others predicted.

    Each layer's keys, and then its values, are taken from a compressed cache and all else from a dense one. What rounding alone
    changes is taken off, as far as the least that any layer changes shows it: best in float32.
    """
    coarse = Preset(key=GRADES[0].key, value=GRADES[0].value)
    lost = [_lost(model, ids, prompt, preset, step) for ids in passages for preset in (PRESETS["balanced"], coarse)]
    found = torch.tensor(lost, dtype=torch.float64).unflatten(0, (-1, 2)).mean(0)
    found = (found - found.amin((-2, -1), keepdim=True)).clamp(min=_LEAST)
    (key, value), (coarse_key, coarse_value) = found.tolist()
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Profile(text.num_key_value_heads, head_dim, *map(tuple, (key, value, coarse_key, coarse_value)))


def _lost(
    model: PreTrainedModel, ids: torch.Tensor, prompt: int, preset: Preset, step: Callable[[str], None]
) -> list[list[float]]:
    """KL divergences with one layer's keys, and with one layer's values, from a cache of ``preset``."""
    dense_of, ours = contender(model, DENSE), contender(model, preset)
    dense, held = dense_of.empty(), ours.empty()
    dense_of.feed(dense, ids[:, :prompt], keep=1)
    ours.feed(held, ids[:, :prompt], keep=1)
    require_matched({"prefill"})
    targets = ids[0, prompt + 1 :].to(model.device)
    expected = dense_of.feed(copy.deepcopy(dense), ids[:, prompt:-1])
    losses: list[list[float]] = [[], []]
    for layer in range(len(dense.layers)):
        for side, name in enumerate(("keys", "values")):
            step(f"{name} of layer {layer}")
            trial = copy.copy(dense)
            trial.layers = [copy.copy(part) for part in dense.layers]
            setattr(trial.layers[layer], name, getattr(held.layers[layer], name).dense())
            losses[side].append(Agreement.of(dense_of.feed(trial, ids[:, prompt:-1]), expected, targets).kl)
    return losses


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
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        display.update(task, total=4 * loaded.config.get_text_config().num_hidden_layers * len(passages))
        profile = calibrate(loaded, passages, tokens, lambda what: display.update(task, description=what, advance=1))
    profile.save(out)
    print(f"{out}: give it as options={{'profile': {str(out)!r}}}")
