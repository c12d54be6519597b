"""What all parts share: geometries with random weights, clocks, and measurements that may fail without ending the run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import calculate_time_spent
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from spectral_compile.backend import reset
from spectral_compile.codec import Rotary

FLUSHED = 256 * 2**20  # bytes that are zeroed before each timed call, more than any L2 cache holds
SPENT = 0.3  # seconds of timed calls to a measurement
CALLS = (3, 200)  # and how many of them there are at least and at most
SHOWN = 100  # characters of an error in a table; JSON has more

Row = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model without its weights."""

    config_type: type[PreTrainedConfig]
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    theta: float
    tied: bool = False

    @property
    def rotary(self) -> Rotary:
        return Rotary(tuple(self.theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)))

    def config(self, layers: int | None = None) -> PreTrainedConfig:
        """A configuration that never ends a text, of ``layers`` layers or all."""
        return self.config_type(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=2**18,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )


GEOMETRIES = {
    "llama-3-8b": Geometry(LlamaConfig, 32, 4096, 14336, 32, 8, 128, 128256, 5e5),
    "qwen3-0.6b": Geometry(Qwen3Config, 28, 1024, 3072, 16, 8, 128, 151936, 1e6, tied=True),
    "llama-3-70b": Geometry(LlamaConfig, 80, 8192, 28672, 64, 8, 128, 128256, 5e5),
    "256-channels": Geometry(LlamaConfig, 34, 2560, 10240, 8, 4, 256, 128256, 1e6),  # heads as in Gemma 3 4B
    "smollm2": Geometry(LlamaConfig, 30, 576, 1536, 9, 3, 64, 49152, 1e5, tied=True),
    "tiny": Geometry(LlamaConfig, 2, 64, 64, 4, 2, 16, 256, 1e4),
}


@dataclass(frozen=True)
class Settings:
    """What the command line asked for.

    ``pairs`` are (batch, cached tokens), ``geometries`` None is each part's own choice, ``chunk`` None a prompt in one piece.
    """

    geometries: tuple[str, ...] | None
    pairs: tuple[tuple[int, int], ...]
    presets: tuple[str, ...]
    cached: tuple[int, ...]
    variants: tuple[str, ...]
    chunk: int | None
    new_tokens: int
    steady_tokens: int
    dtype: torch.dtype
    device: torch.device
    inner: str
    seed: int
    columns: int = 1  # of a step of attention
    layers: int | None = None  # of whole models; None: all

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass(frozen=True)
class Measurement:
    """A row to come: what it is of, and what measures its figures; the next one may use what it leaves compiled, or not."""

    labels: Row
    run: Callable[[], Row]
    leaves: bool = False

    def row(self) -> Row:
        """Labels, figures, the ``seconds`` that it took, and the ``error`` that there is instead of figures, or None."""
        started = time.perf_counter()
        try:
            figures = {**self.run(), "error": None}
        except Exception as error:
            figures = {"error": one_line(error)}
        finally:
            if not self.leaves:
                with suppress(RuntimeError):  # a GPU that an earlier error has broken
                    tidy()
        return {**self.labels, **figures, "seconds": time.perf_counter() - started}


def tidy() -> None:
    """Free what a measurement has left behind: compiled graphs, their recordings, and cached memory of the GPU."""
    reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """An error as one line: of a failed compilation what the backend itself raised, and no stack of torch's own C++."""
    if isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    said = " ".join(line for line in str(error).splitlines() if not line.startswith(("Exception raised from", "frame #")))
    return f"{type(error).__name__}: {' '.join(said.split())}"[:400]


@torch.no_grad()
def build(geometry: Geometry, settings: Settings, layers: int | None = None) -> PreTrainedModel:
    """A model with random weights (standard deviation 0.02, norms 1) made where it runs; the same ones for the same seed.

    It has ``layers`` layers, or as many as were asked for.
    """
    config = geometry.config(layers or settings.layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=settings.dtype)
    model.to_empty(device=settings.device)
    decoder = model.model
    with settings.device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config)  # its buffers are no weights
    generator = settings.generator()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.02, generator=generator)
        else:
            weight.fill_(1)
    model.tie_weights()
    return model.eval()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compile_seconds() -> float:
    """Seconds that Dynamo and what it called have spent compiling in this process."""
    return calculate_time_spent()["total_wall_time"]


class Timing(NamedTuple):
    """Median seconds of a call, and whether it was a replayed CUDA graph."""

    seconds: float
    how: str


def clock(
    call: Callable[[], Any], device: torch.device, prepare: Callable[[], None] = lambda: None, graph: bool = False
) -> Timing:
    """Time ``call`` on its device; ``prepare`` runs before each call, and with ``graph`` a GPU replays a CUDA graph of it.

    On a GPU the L2 cache is flushed before each call, and what is timed is what lies between two events. Where a call cannot
    be captured it is made as it is, and ``how`` says why.
    """
    on_gpu, how = device.type == "cuda", "call"
    for _ in range(2):  # the first call compiles kernels
        prepare()
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        estimate = time.perf_counter() - started
    if on_gpu and graph:
        try:
            call, how = capture(call), "CUDA graph"
        except RuntimeError as error:
            how = f"call, for it cannot be captured: {one_line(error)}"
    count = min(max(int(SPENT / estimate), CALLS[0]), CALLS[1])
    if not on_gpu:
        return Timing(median(_on_cpu(call, prepare) for _ in range(count)), how)
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    events = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        prepare()
        flushed.zero_()
        start.record()
        call()
        end.record()
        events.append((start, end))
    wait(device)
    return Timing(median(start.elapsed_time(end) / 1e3 for start, end in events), how)


def _on_cpu(call: Callable[[], Any], prepare: Callable[[], None]) -> float:
    prepare()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def capture(call: Callable[[], Any]) -> Callable[[], None]:
    """What replays ``call`` as a CUDA graph. RuntimeError where it waits for the GPU or cannot be captured otherwise."""
    torch.cuda.set_sync_debug_mode("error")  # found here, a wait is harmless; found in a capture, it leaves that broken
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass(frozen=True)
class Column:
    """A column of a table: the field of a row that it shows, and how."""

    field: str
    header: str
    show: Callable[[Any], str] = str


def table(title: str, rows: Iterable[Row], labels: list[Column], figures: list[Column], caption: str | None = None) -> Table:
    """Rows under ``labels`` and ``figures``; the first figure of a measurement that failed is its error."""
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in labels:
        shown.add_column(column.header, no_wrap=True)
    for column in figures:
        shown.add_column(column.header, justify="right", overflow="fold")
    for row in rows:
        cells = [_cell(row, column) for column in labels]
        if row.get("error"):
            cells.append(escape(f"error: {row['error'][:SHOWN]}"))
        else:
            cells += [_cell(row, column) for column in figures]
        shown.add_row(*cells)
    return shown


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.field)
    return "-" if value is None else column.show(value)


def fixed(digits: int, unit: float = 1.0) -> Callable[[float], str]:
    """Shows a number as a multiple of ``unit``."""
    return lambda x: f"{x / unit:.{digits}f}"


def times(x: float) -> str:
    return f"{x:.2f}x"


GIB = fixed(3, 2**30)


def quotient(a: float | None, b: float | None) -> float | None:
    """``a / b`` where both were measured."""
    return a / b if a is not None and b else None
