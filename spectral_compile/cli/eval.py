"""``spectral-compile eval``: the table, the plot and the figures of caches on one model and the same texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table
from typer import Option

from spectral_compile import models
from spectral_compile.cli.console import need_matplotlib, output, phases
from spectral_compile.cli.options import count
from spectral_compile.codec import PRESETS, Profile
from spectral_compile.errors import Mistake, mistakes
from spectral_compile.evaluation import contenders
from spectral_compile.evaluation.measure import Result, Trial, compare
from spectral_compile.evaluation.plot import Point, draw
from spectral_compile.evaluation.tasks import TASKS, questions
from spectral_compile.evaluation.texts import texts
from spectral_compile.evaluation.trace import show, trace
from spectral_compile.files import check_writable, read_texts, write_whole

_WIDEST = 24  # characters of a cache's name in one line; no name is cut off


def table(results: Sequence[Result], title: str) -> Table:
    """A row for each cache."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("cache", min_width=min(_WIDEST, max(len(result.name) for result in results)), overflow="fold")
    decoded = results[0].first("decoded")
    columns = ["ratio, all bytes", "ratio, coded part", "perplexity", "change", "KL, nats", "top-1"]
    if decoded:
        columns += [f"KL, first {decoded.tokens}", "KL, same decoded"]
    for column in (*columns, *results[0].answered):
        shown.add_column(column, justify="right")
    for result in results:
        span, coded = result.mean(), result.size.coded_ratio
        cells = [f"{result.ratio:.2f}", f"{coded:.2f}" if coded else "-", f"{span.perplexity:.2f}", f"{span.change:+.2f} %"]
        cells += [f"{span.kl:.4f}", f"{span.top1:.3f}"]
        if decoded:
            cells += [f"{result.mean(which).kl:.4f}" for which in ("extended", "decoded")]
        shown.add_row(result.name, *cells, *(f"{found}/{cases}" for found, cases in result.answered.values()))
    return shown


def evaluate(
    model: Annotated[str | None, Option(help=models.WHICH, show_default=models.DEFAULT)] = None,
    presets: Annotated[
        str, Option(help="Caches of this backend, by comma: presets, without an ingredient (balanced-margin), JSON options")
    ] = ",".join(PRESETS),
    rivals: Annotated[str | None, Option(help="Other caches, by comma", show_default="those of transformers here")] = None,
    profile: Annotated[str | None, Option(help="Profile for caches such as balanced+profile: a file or a name")] = None,
    tokens: Annotated[int, Option(min=1, help="Tokens that are cached before scoring")] = 4096,
    scored: Annotated[int, Option(min=1, help="Tokens that are then scored")] = 512,
    chunk: Annotated[int, Option(min=1, help="How many of those are fed at a time, so that they see each other exactly")] = 8,
    decode: Annotated[int, Option(min=0, help="How many of those to score token by token too")] = 0,
    texts_: Annotated[int, Option("--texts", min=1, help="Number of built-in texts: prose, source and dialogue")] = 8,
    batch: Annotated[int | None, Option(min=1, help="Texts at a time", show_default="all on a GPU, else 1")] = None,
    text: Annotated[list[Path] | None, Option(help="A text to use instead; repeatable")] = None,
    tasks: Annotated[str, Option(help=f"Questions to ask too, by comma: {', '.join(TASKS)}")] = "",
    task_tokens: Annotated[str, Option(help="Lengths of their prompts, by comma")] = "3000",
    cases: Annotated[int, Option(min=1, help="Questions a task and length")] = 16,
    seed: Annotated[int, Option(help="Of the questions")] = 0,
    steps: Annotated[
        int,
        Option("--trace", min=0, help="Compare nothing, but show that many tokens beside the dense model's, after one text"),
    ] = 0,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and dense cache")] = "bfloat16",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
    inner: Annotated[str, Option(help="Compiler of the rewritten graph: inductor, aot_eager or eager")] = "eager",
    json_: Annotated[
        Path | None, Option("--json", callback=check_writable, help="File to write every figure to, after each cache")
    ] = None,
    plot: Annotated[Path | None, Option(callback=check_writable, help="PNG file to draw loss against bytes in")] = None,
) -> None:
    """Compare caches by quality and bytes on one model and the same texts."""
    screen = Console(stderr=True)
    transformers.logging.disable_progress_bar()
    names = [*contenders.split(presets), *contenders.split(rivals or "")]
    wanted = [(task, count(length)) for length in contenders.split(task_tokens) for task in contenders.split(tasks)]
    with mistakes(ValueError):
        known = Profile.load(profile) if profile else None
        contenders.check(names, known, inner)
    if unknown := [task for task, _ in wanted if task not in TASKS]:
        raise Mistake(f"unknown task {unknown[0]!r}: choose from {', '.join(TASKS)}")
    if decode > scored:
        raise Mistake("--decode counts scored tokens: it cannot exceed --scored")
    if plot:
        need_matplotlib()
    where = models.device_of(device)
    given = read_texts(text or ())
    batch = batch or (1 if where.type == "cpu" else len(given) or texts_)
    settings = {
        "model": model or models.DEFAULT, "tokens": tokens, "scored": scored, "chunk": chunk, "decode": decode,
        "batch": batch, "dtype": dtype, "inner": inner, "seed": seed,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    results: list[Result] = []
    with phases(screen, BarColumn(), MofNCompleteColumn()) as display:
        task = display.add_task(f"loading {model or models.DEFAULT}")
        loaded, tokenizer = models.load(model, getattr(torch, dtype))
        passages = texts(tokenizer, texts_, tokens + scored + 1, given)
        asked = [question for what, length in wanted for question in questions(tokenizer, what, length, cases, seed)]
        loaded.to(where)
        obstacles = {name: contenders.obstacle(name, loaded.config) for name in contenders.RIVALS}
        if barred := [name for name in names if obstacles.get(name)]:
            raise Mistake(f"{barred[0]} cannot be used here, so leave it out: {obstacles[barred[0]]}")
        names += [name for name, reason in obstacles.items() if rivals is None and reason is None]
        display.update(task, total=len(names) if steps else (1 + len(names)) * (len(passages) + len(asked)))

        def step(what: str) -> None:
            display.update(task, description=what, advance=1)

        if steps:
            for name in names:
                step(f"{name}: {steps} tokens")
                traced = trace(loaded, name, next(iter(passages.values()))[:, :tokens], steps, inner, known)
                output().print(show(traced, name, tokenizer))
            return
        trial = Trial(passages, tokens, decode, chunk, asked, batch)
        for result in compare(loaded, tokenizer, names, trial, inner, known, step):
            results.append(result)
            if json_:
                written = {"settings": settings, "caches": [r.summary() for r in results]}
                write_whole(json_, json.dumps(written, indent=1).encode())
    title = f"{model or models.DEFAULT} in {dtype}: {tokens} tokens cached, {scored} scored, {len(passages)} texts"
    output().print(table(results, title))
    if plot:
        draw([Point(result.name, result.ratio, result.mean().kl) for result in results], title, plot)
