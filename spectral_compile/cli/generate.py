"""``spectral-compile generate``: one prompt through the compressed cache, then through a dense one beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer
from typer import Option

from spectral_compile import models
from spectral_compile.backend import reset, spectral
from spectral_compile.bench.measure import compile_seconds
from spectral_compile.cli.console import output, phases
from spectral_compile.cli.options import parse_options
from spectral_compile.errors import Mistake, Refused
from spectral_compile.files import read_text
from spectral_compile.report import GraphReport, first_refusal, reports
from spectral_compile.stats import MemoryStats, memory_stats

WARM_UP = 4  # tokens: prefill, a first decode step, and one more for compilers that then ask for a dynamic length


def generate(
    model: Annotated[str | None, Option(help="Id or folder of a transformers model", show_default=models.DEFAULT)] = None,
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
    output().print(table(runs, ids.shape[1]))


class Clock(BaseStreamer):
    """When the prompt was handed over and each token came, on a clock that stands still while compilers work."""

    def __init__(self, on_first_token: Callable[[], None]) -> None:
        self.moments: list[float] = []
        self.on_first_token = on_first_token

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter() - compile_seconds())
        if len(self.moments) == 2:
            self.on_first_token()

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.moments[1] - self.moments[0]

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        decoded = len(self.moments) - 2
        return decoded / (self.moments[-1] - self.moments[1]) if decoded else 0.0


class PrintingClock(Clock):
    """A ``Clock`` that prints the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_first_token: Callable[[], None]) -> None:
        super().__init__(on_first_token)
        self.printer = TextStreamer(tokenizer, skip_prompt=True)

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.printer.put(value)

    def end(self) -> None:
        self.printer.end()


@dataclass(frozen=True)
class Run:
    """What one cache did with the prompt."""

    tokens: list[int]
    reports: list[GraphReport]
    graphs: int
    compile_seconds: float
    memory: MemoryStats
    first: float
    rate: float


@dataclass(frozen=True)
class Session:
    """A model and a prompt that several backends are tried on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: torch.Tensor
    new_tokens: int
    screen: Console

    def run(self, title: str, backend: Any, options: Any) -> Run:
        """Compile the model with ``backend``, warm up, and generate."""
        reset()
        counters.clear()
        self.screen.rule(title)
        self.model.compile(backend=backend, options=options)
        before = compile_seconds()

        with phases(self.screen) as display:
            task = display.add_task("warming up: compiling and reading the prompt")
            warm = Clock(lambda: display.update(task, description="warming up: compiling the decode step"))
            self.generate(WARM_UP, warm)
        if backend is spectral and not any(report.matched for report in reports()):
            raise Refused(f"nothing was compressed: {first_refusal(reports())}")
        with phases(self.screen) as display:
            display.add_task(f"reading {self.ids.shape[1]} tokens, which took {warm.first:.0f} s before")
            clock = PrintingClock(self.tokenizer, display.stop)
            out = self.generate(self.new_tokens, clock)

        return Run(
            out.sequences[0, self.ids.shape[1] :].tolist(),
            reports(),
            counters["stats"]["unique_graphs"],
            compile_seconds() - before,
            memory_stats(out),
            clock.first,
            clock.rate,
        )

    def generate(self, new_tokens: int, clock: Clock) -> Any:
        return self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            return_dict_in_generate=True,
            streamer=clock,
        )


def table(runs: dict[str, Run], prompt_tokens: int) -> Table:
    """The runs side by side."""
    shown = Table(title=f"{prompt_tokens} tokens read, {len(runs['spectral'].tokens)} generated", title_justify="left")
    shown.add_column()
    for name in runs:
        shown.add_column(name, justify="right")

    def row(name: str, cell: Callable[[Run], str], end_section: bool = False) -> None:
        shown.add_row(name, *(cell(run) for run in runs.values()), end_section=end_section)

    def sites(kind: str) -> Callable[[Run], str]:
        def cell(run: Run) -> str:
            of_kind = [report for report in run.reports if report.kind == kind]
            return ", ".join(f"{report.matched} of {report.sites}" for report in of_kind) or "-"

        return cell

    row("sites matched, prefill", sites("prefill"))
    row("sites matched, decode", sites("decode"))
    row("graphs compiled", lambda run: str(run.graphs))
    row("seconds of compilation", lambda run: f"{run.compile_seconds:.1f}", end_section=True)
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
    shown.caption_justify = "left"
    return shown
