"""``spectral-compile generate``: one prompt through the compressed cache, then through a dense one beside it."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from typer import Option

from spectral_compile import models
from spectral_compile.backend import spectral
from spectral_compile.cache.timeline import HEADROOM
from spectral_compile.cli.console import output, phases
from spectral_compile.cli.options import parse_options
from spectral_compile.cli.session import Run, Session, add_compilation, comparison
from spectral_compile.cli.sizes import when_it_pays
from spectral_compile.errors import Mistake
from spectral_compile.files import read_text


def generate(
    model: Annotated[str | None, Option(help=models.WHICH, show_default=models.DEFAULT)] = None,
    preset: Annotated[str, Option(help="Codec: quality, balanced, compact, seed or exact")] = "balanced",
    prompt: Annotated[str | None, Option(help="Text to continue", show_default="English prose")] = None,
    prompt_file: Annotated[Path | None, Option(help="File with the text to continue")] = None,
    prompt_tokens: Annotated[int, Option(min=1, help="Length of the built-in prompt")] = 4200,
    new_tokens: Annotated[int, Option(min=1, help="Tokens to generate")] = 128,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and dense cache")] = "bfloat16",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
    dense: Annotated[bool, Option(help="Run the dense cache too, and compare")] = True,
    inner: Annotated[str, Option(help="Compiler of the rewritten graph: inductor, aot_eager or eager")] = "inductor",
    options: Annotated[list[str] | None, Option(help="key=value, of SpectralConfig or Inductor; repeatable")] = None,
) -> None:
    """Generate greedily from a compressed KV cache, and compare with the dense one.

    Each run is preceded by one of a few tokens on the same prompt, so that no graph is compiled while the clock runs.
    """
    if prompt is not None and prompt_file is not None:
        raise Mistake("give --prompt or --prompt-file, not both")
    config = parse_options({"preset": preset, "inner": inner}, options or [])
    where = models.device_of(device)
    text = read_text(prompt_file) if prompt_file else prompt
    transformers.logging.disable_progress_bar()
    screen = Console(stderr=True)

    with phases(screen) as display:
        display.add_task(f"loading {model or models.DEFAULT}")
        loaded, tokenizer = models.load(model, getattr(torch, dtype))
        loaded.to(where)
        ids = models.prompt(tokenizer, prompt_tokens) if text is None else tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise Mistake("the prompt is empty: give at least one token to continue")

    session = Session(loaded, tokenizer, ids.to(where), new_tokens, screen)
    runs = {"spectral": session.run(f"spectral ({config.preset})", spectral, config)}
    if dense:
        # the same inner compiler, so that the columns differ in the cache alone
        runs = {"dense": session.run("dense", config.inner, dict(config.inductor)), **runs}
    shown = table(runs, ids.shape[1])
    if runs["spectral"].memory.ratio < 1:
        layouts = [site.layout for site in runs["spectral"].reports[0].layers if site.layout]
        room = config.headroom or HEADROOM.get(where.type)
        shown.caption = f"{shown.caption}\n{when_it_pays(layouts, loaded.dtype, room)}"
    output().print(shown)


def table(runs: dict[str, Run], prompt_tokens: int) -> Table:
    """The runs side by side."""
    shown, row = comparison(f"{prompt_tokens} tokens read, {len(runs['spectral'].tokens)} generated", runs)
    add_compilation(row)
    row("logical bytes", lambda run: decimal(run.memory.logical_bytes))
    row("stored bytes", lambda run: decimal(run.memory.stored_bytes))
    for part in next(iter(runs.values())).memory.parts:
        if any(run.memory.parts[part] for run in runs.values()):
            row(f"  {part}", lambda run, part=part: decimal(run.memory.parts[part]) if run.memory.parts[part] else "-")
    row("ratio", lambda run: f"{run.memory.ratio:.2f}", end_section=True)
    row("seconds to first token", lambda run: f"{run.first:.2f}")
    row("tokens/s after it", lambda run: f"{run.rate:.1f}" if run.rate else "-")
    if "dense" in runs:
        tokens = runs["spectral"].tokens, runs["dense"].tokens
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*tokens, strict=False)))
        row("equal leading tokens", lambda run: f"{equal} of {len(run.tokens)}" if run is runs["spectral"] else "-")
    shown.caption = "A warm-up on the same prompt came first; compilation is in no other row."
    return shown
