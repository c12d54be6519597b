"""``spectral-compile calibrate``: the profile of a model, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from typer import Argument, Option

from spectral_compile import models
from spectral_compile.cli.console import phases
from spectral_compile.evaluation.calibrate import calibrate, steps
from spectral_compile.evaluation.texts import calibration
from spectral_compile.files import check_writable, read_texts
from spectral_compile.fingerprint import keep


def calibrate_model(
    out: Annotated[
        Path | None,
        Argument(callback=check_writable, help="File to write the profile to", show_default="where the backend finds it"),
    ] = None,
    model: Annotated[str | None, Option(help=models.WHICH, show_default=models.DEFAULT)] = None,
    text: Annotated[list[Path] | None, Option(help="A text to use instead; repeatable")] = None,
    tokens: Annotated[int, Option(min=1, help="Tokens of a text that are cached")] = 4096,
    scored: Annotated[int, Option(min=1, help="Tokens that are then predicted")] = 128,
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
        display.update(task, total=steps(loaded.config.get_text_config().num_hidden_layers, len(passages)))
        profile = calibrate(
            loaded, list(passages.values()), tokens, lambda what: display.update(task, description=what, advance=1)
        )
    if out is not None:
        profile.save(out)
        print(f"{out}: give it as options={{'profile': {str(out)!r}}}")
    else:
        print(f"{keep(profile)}: from now on this model is compiled with it")
