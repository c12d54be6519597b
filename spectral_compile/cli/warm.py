"""``spectral-compile warm``: everything that a later process needs is compiled, and lies in the caches on disk."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from typer import Argument, Option

from spectral_compile import models
from spectral_compile.backend import reset, spectral
from spectral_compile.cli.console import output, phases
from spectral_compile.cli.options import count, parse_options
from spectral_compile.cli.session import require_compressed
from spectral_compile.config import SpectralConfig
from spectral_compile.files import cache_folder
from spectral_compile.kernels.attend.extend import LEAST
from spectral_compile.outputs import cache_argument, cache_of

SHORT = 16  # tokens of a second turn that kernels attend for by themselves
STEPS = 2  # after which CUDA graphs are recorded, and compilers that ask for a dynamic length have done so


@dataclass(frozen=True)
class Stage:
    """What has to be compiled for a prompt of ``tokens``, steps after it, and second turns of few tokens and of many."""

    batch: int
    tokens: int

    @property
    def title(self) -> str:
        rows = f"{self.batch} texts of " if self.batch > 1 else ""
        return f"{rows}{self.tokens} tokens, steps, second turns"

    def run(self, model: PreTrainedModel, block: int) -> None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size

        def some(tokens: int) -> torch.Tensor:
            return torch.randint(1, vocabulary, (self.batch, tokens), generator=generator).to(model.device)

        def go_on(ids: torch.Tensor, steps: int, cache: Any = None) -> Any:
            mask = torch.ones_like(ids)
            if self.batch > 1:  # texts of several lengths
                mask[0, : self.tokens // 8] = 0
            return model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=steps,
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                **({} if cache is None else cache_argument(cache)),
            )

        out = go_on(some(self.tokens), STEPS + block)  # one of these steps codes a block
        for tokens in (SHORT, LEAST):
            out = go_on(torch.cat((out.sequences, some(tokens)), 1), STEPS, cache_of(out))


def warm(
    model: Annotated[str | None, Argument(help=models.WHICH, show_default=models.DEFAULT)] = None,
    preset: Annotated[str, Option(help="Codec: quality, balanced, compact, seed or exact")] = "balanced",
    tokens: Annotated[str, Option(help="Lengths of prompts, by comma")] = "4096,16384",
    batch: Annotated[str, Option(help="Texts at a time, by comma")] = "1",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and dense cache")] = "bfloat16",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
    inner: Annotated[str, Option(help="Compiler of the rewritten graph: inductor or aot_eager")] = "inductor",
    options: Annotated[list[str] | None, Option(help="key=value, of SpectralConfig or Inductor; repeatable")] = None,
) -> None:
    """Compile all that a later process needs to generate: its first token then comes several times as soon.

    What is compiled lies in the caches of Inductor, of Triton and of this package, which the table names. Give the options that
    the later process compiles the model with, and lengths like those of its prompts.
    """
    config = parse_options({"preset": preset, "inner": inner, "strict": True}, options or [])
    stages = [Stage(count(rows), count(length)) for rows in batch.split(",") for length in tokens.split(",")]
    where = models.device_of(device)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    screen, rows = Console(stderr=True), []
    with phases(screen, BarColumn(), MofNCompleteColumn()) as display:
        task = display.add_task(f"loading {model or models.DEFAULT}", total=len(stages))
        loaded, _ = models.load(model, getattr(torch, dtype))
        loaded.to(where)
        reset()
        loaded.compile(backend=spectral, options=config)
        for stage in stages:
            display.update(task, description=stage.title)
            rows.append((stage.title, *compiled(loaded, config, stage)))
            display.advance(task)
    shown = Table(title=f"{model or models.DEFAULT}, {preset}", title_justify="left", caption_justify="left")
    for name in ("", "seconds", "compiled", "found on disk"):
        shown.add_column(name, justify="right" if name else "left")
    for title, seconds, made, found in rows:
        shown.add_row(title, f"{seconds:.1f}", str(made), str(found))
    shown.caption = "graphs and parts, of Inductor; kernels are cached by Triton"
    out = output()
    out.print(shown)
    for name, folder in caches().items():
        out.print(f"{name}: {folder}", markup=False, soft_wrap=True)


def compiled(model: PreTrainedModel, config: SpectralConfig, stage: Stage) -> tuple[float, int, int]:
    """Run a stage: the seconds, and how many graphs Inductor compiled, and found on disk.

    ``Refused`` where nothing is compressed.
    """
    counters.clear()
    started = time.perf_counter()
    stage.run(model, config.block or config.codec.block)
    require_compressed(spectral)
    inductor = counters["inductor"]
    return time.perf_counter() - started, inductor["fxgraph_cache_miss"], inductor["fxgraph_cache_hit"]


def caches() -> dict[str, str]:
    """Where the caches on disk lie, by whose they are."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = {"Inductor, TORCHINDUCTOR_CACHE_DIR": cache_dir(), "this package, SPECTRAL_CACHE": str(cache_folder())}
    if torch.cuda.is_available():  # Inductor sets it where nobody has
        found["Triton, TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", "")
    return found
