"""One prompt through one model with several caches: what ``generate`` and ``demo`` run and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from spectral_compile.backend import reset, spectral
from spectral_compile.bench.measure import compile_seconds
from spectral_compile.cli.console import phases
from spectral_compile.errors import Refused
from spectral_compile.report import GraphReport, first_refusal, reports
from spectral_compile.stats import MemoryStats, memory_stats

WARM_UP = 4  # tokens: prefill, a first decode step, and one more for compilers that then ask for a dynamic length
# to compile prefill and decode, for each layer: of SmolLM2 (30 layers) on two cores of a Xeon, torch 2.13. ``inductor`` and
# ``eager`` were measured; ``aot_eager`` took 1.9 on a busy machine, and what it takes on an idle one is a guess
SECONDS_A_LAYER = {"inductor": 2.0, "aot_eager": 1.5, "eager": 0.6}


class Clock(BaseStreamer):
    """When the prompt was handed over and each token came, in seconds on a clock that stands still while compilers work."""

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
    """A ``Clock`` that prints the tokens, after the text ``begun``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_first_token: Callable[[], None], begun: str = "") -> None:
        super().__init__(on_first_token)
        self.printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=bool(begun))
        self.begun = begun

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.moments) == 2:
            print(self.begun, end="", flush=True)
        self.printer.put(value)

    def end(self) -> None:
        self.printer.end()


@dataclass(frozen=True)
class Run:
    """What one cache did with the prompt: new tokens, graphs, bytes; ``first`` seconds to a token, then ``rate`` a second."""

    tokens: list[int]
    reports: list[GraphReport]
    graphs: int
    compile_seconds: float
    memory: MemoryStats
    first: float
    rate: float

    def sites(self, kind: str) -> str:
        """Attention sites compressed in each graph of this ``kind``."""
        return ", ".join(f"{report.matched} of {report.sites}" for report in self.reports if report.kind == kind) or "-"


@dataclass(frozen=True)
class Session:
    """A model and a prompt int64 [1, n] that several backends are tried on; ``begun`` is how the answer begins in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: torch.Tensor
    new_tokens: int
    screen: Console
    begun: str = ""

    def run(self, title: str, backend: Any, options: Any, warm_up: bool = True) -> Run:
        """Compile the model with ``backend`` (None: leave it as it is) and generate, after a few tokens to ``warm_up`` if so.

        ``Refused`` where the backend is this package's and compresses nothing.
        """
        reset()
        counters.clear()
        self.screen.rule(title)
        if backend is not None:
            self.model.compile(backend=backend, options=options)
        before = compile_seconds()
        compiling = f", compiling for {about(self.expected_seconds(backend, options))}" if backend is not None else ""
        reading = f"reading {self.ids.shape[1]} tokens"
        if warm_up:
            with phases(self.screen) as display:
                task = display.add_task(f"warming up: {reading}{compiling}")
                warm = Clock(lambda: display.update(task, description="warming up: the first decode steps"))
                self.generate(WARM_UP, warm)
            require_compressed(backend)
            compiling = f", which took {warm.first:.0f} s in the warm-up"
        with phases(self.screen) as display:
            display.add_task(f"{reading}{compiling}")
            clock = PrintingClock(self.tokenizer, display.stop, self.begun)
            out = self.generate(self.new_tokens, clock)
        require_compressed(backend)
        return Run(
            out.sequences[0, self.ids.shape[1] :].tolist(),
            reports(),
            counters["stats"]["unique_graphs"],
            compile_seconds() - before,
            memory_stats(out),
            clock.first,
            clock.rate,
        )

    def expected_seconds(self, backend: Any, options: Any) -> float:
        """What compiling will take, roughly: layers times a measured figure of the inner compiler."""
        inner = options.inner if backend is spectral else backend
        return SECONDS_A_LAYER[inner] * self.model.config.get_text_config().num_hidden_layers

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


def require_compressed(backend: Any) -> None:
    """``Refused`` where this package's backend compressed nothing."""
    if backend is spectral and not any(report.matched for report in reports()):
        raise Refused(f"nothing was compressed: {first_refusal(reports())}")


def about(seconds: float) -> str:
    """A rough time in words."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    return f"about {round(seconds / 60)} minutes"


def comparison(title: str, runs: Mapping[str, Run]) -> tuple[Table, Callable[..., None]]:
    """An empty table with a column for each run, and what adds a row to it: a name, and the cell of a run."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.add_column()
    for name in runs:
        shown.add_column(name, justify="right")

    def row(name: str, cell: Callable[[Run], str], end_section: bool = False) -> None:
        shown.add_row(name, *(cell(run) for run in runs.values()), end_section=end_section)

    return shown, row


def add_compilation(row: Callable[..., None]) -> None:
    """What was compiled: the rows at the head of every comparison."""
    row("sites matched, prefill", lambda run: run.sites("prefill"))
    row("sites matched, decode", lambda run: run.sites("decode"))
    row("graphs compiled", lambda run: str(run.graphs))
    row("seconds of compilation", lambda run: f"{run.compile_seconds:.1f}", end_section=True)
