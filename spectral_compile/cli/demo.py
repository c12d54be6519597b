"""``spectral-compile demo``: a question about a long document, answered from the dense cache and from the compressed one."""

from __future__ import annotations

from typing import Annotated

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from typer import Option

from spectral_compile import models
from spectral_compile.backend import spectral
from spectral_compile.cli.console import output, phases
from spectral_compile.cli.options import parse_options
from spectral_compile.cli.session import Run, Session, about, add_compilation, comparison
from spectral_compile.errors import Mistake
from spectral_compile.evaluation.tasks import Question, questions

ANSWER_TOKENS = 16
SHOWN = 160  # characters of the document on either side of the number
RUN_BY = {
    "inductor": "compiled by Inductor",
    "aot_eager": "traced by AOTAutograd, and run by PyTorch without a compiler",
    "eager": "run by PyTorch without a compiler, which on a CPU would take longer than it saves",
}


class Failed(Mistake):
    """The demo did not show what it is there to show."""

    status = 1


def demo(
    model: Annotated[str | None, Option(help=models.WHICH, show_default=models.DEFAULT)] = None,
    preset: Annotated[str, Option(help="Codec: quality, balanced, compact, seed or exact")] = "balanced",
    tokens: Annotated[int, Option(min=64, help="Length of the document")] = 4000,
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
    inner: Annotated[
        str | None,
        Option(help="Compiler of both models: inductor, aot_eager or eager", show_default="eager on a CPU, else inductor"),
    ] = None,
    options: Annotated[list[str] | None, Option(help="key=value, of SpectralConfig or Inductor; repeatable")] = None,
) -> None:
    """Ask a chat model for a number that stands deep in a long document, with a dense KV cache and with the compressed one.

    Exit code 1 if one of the answers is not that number, or not all attention sites are compressed.
    """
    where = models.device_of(device)
    # on a CPU compiling takes longer than reading the document and answering without a compiler
    inner = inner or ("eager" if where.type == "cpu" else "inductor")
    config = parse_options({"preset": preset, "inner": inner}, options or [])
    transformers.logging.disable_progress_bar()
    screen = Console(stderr=True)
    with phases(screen) as display:
        display.add_task(f"loading {model or models.DEFAULT}")
        loaded, tokenizer = models.load(model, torch.bfloat16)
        loaded.to(where)
        (question,) = questions(tokenizer, "key", tokens, cases=1)

    session = Session(loaded, tokenizer, question.ids.to(where), ANSWER_TOKENS, screen, question.begun)
    out = output()
    out.print(introduction(question, tokenizer), markup=False)
    out.print(
        "For the compressed cache two graphs, one that reads the document and one that adds a token, are rewritten by this"
        f" backend and {RUN_BY[config.inner]}: {about(session.expected_seconds(spectral, config))}, once.",
        markup=False,
        soft_wrap=True,
    )
    compiled = config.inner != "eager"  # else the first call is as fast as the second one, and a dense model needs no graph
    dense = session.run("dense", config.inner if compiled else None, dict(config.inductor), warm_up=compiled)
    ours = session.run(f"spectral ({config.preset})", spectral, config, warm_up=compiled)
    runs = {"dense cache": dense, "compressed cache": ours}
    answers = {name: f"{question.begun}{tokenizer.decode(run.tokens, skip_special_tokens=True)}" for name, run in runs.items()}
    out.print(table(runs, question, answers))
    check(ours, question, answers)
    out.print(f"Both answers are right, and the compressed cache is {ours.memory.ratio:.1f} times smaller.", soft_wrap=True)


def introduction(question: Question, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as a chat, in few lines."""
    text = " ".join(tokenizer.decode(question.ids[0], skip_special_tokens=True).split())
    at = max(SHOWN, text.find(question.answer))
    around = text[at - SHOWN : at + SHOWN]
    return (
        f"A chat about a document of {question.ids.shape[1]} tokens, the documentation of Python, with a number in it at"
        f" {question.depth:.0%} of its length:\n\n  ... {around} ...\n\n  {question.asked}\n"
    )


def table(runs: dict[str, Run], question: Question, answers: dict[str, str]) -> Table:
    """Bytes and seconds of both caches side by side."""
    shown, row = comparison(f"{question.ids.shape[1]} tokens read", runs)
    found = {id(run): question.answer in answers[name] for name, run in runs.items()}
    add_compilation(row)
    row("bytes of the cache", lambda run: decimal(run.memory.stored_bytes))
    row("times smaller", lambda run: f"{run.memory.ratio:.2f}", end_section=True)
    row("seconds to first token", lambda run: f"{run.first:.1f}")
    row("seconds a token after it", lambda run: f"{1 / run.rate:.2f}" if run.rate else "-")
    row("right answer", lambda run: "yes" if found[id(run)] else "no")
    shown.caption = "Compilation is in no other row."
    return shown


def check(ours: Run, question: Question, answers: dict[str, str]) -> None:
    """``Failed`` unless all sites are compressed in both graphs and both answers have the number in them."""
    for kind in ("prefill", "decode"):
        graphs = [report for report in ours.reports if report.kind == kind]
        if not graphs or any(report.matched != report.sites for report in graphs):
            raise Failed(f"not every attention is compressed: {ours.sites(kind)} in {kind}; `spectral-compile doctor` says why")
    for name, answer in answers.items():
        if question.answer not in answer:
            raise Failed(
                f"the {name} answers {answer!r} instead of {question.answer}: try fewer --tokens, another --preset or --model"
            )
