"""``spectral-compile doctor``: what the backend would do with each layer of a model, before anyone waits for its weights."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer import Argument, Option

from spectral_compile import models
from spectral_compile.backend import examine
from spectral_compile.cli.console import output, phases
from spectral_compile.cli.options import parse_options
from spectral_compile.codec.layout import Layout
from spectral_compile.errors import Refused
from spectral_compile.kernels.buffers import allocate
from spectral_compile.report import GraphReport, first_refusal
from spectral_compile.store import Timeline

PROMPT = 24  # tokens that are traced
_SMALL = {"vocab_size": 256, "intermediate_size": 64, "moe_intermediate_size": 64}  # attention depends on none of these
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def doctor(
    model: Annotated[str | None, Argument(help="Id or folder of a transformers model", show_default=models.DEFAULT)] = None,
    tokens: Annotated[int, Option(min=1, max=10**12, help="Cached tokens that bytes are given for")] = 32768,
    preset: Annotated[str, Option(help="Codec: quality, balanced, compact, seed or exact")] = "balanced",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of the dense cache")] = "bfloat16",
    options: Annotated[list[str] | None, Option(help="key=value, of SpectralConfig or Inductor; repeatable")] = None,
) -> None:
    """Show layer by layer what would be compressed, and why not. Exit code 1 if nothing would be.

    The model is built from its configuration alone, with random weights and a small vocabulary.
    """
    config = parse_options({"preset": preset}, options or [])
    screen, kind = Console(stderr=True), getattr(torch, dtype)
    transformers.logging.set_verbosity_error()
    with phases(screen) as display:
        task = display.add_task("building the model with random weights")
        built = sketch(model, kind)
        display.update(task, description="tracing")
        found = examine(built, options=vars(config) | {"inner": "eager"}, input_ids=torch.ones(1, PROMPT, dtype=torch.int64))
    out = output()
    decode = next((graph for graph in found if graph.kind == "decode"), None)
    if decode is None:
        raise Refused(f"nothing would be compressed: {first_refusal(found)}")
    out.print(table(decode, tokens, kind, model or models.DEFAULT))
    for graph in found:
        out.print(str(graph).splitlines()[0].partition(" (")[0], markup=False)
    given = "" if preset == "balanced" else f', options={{"preset": "{preset}"}}'
    out.print(f'compile with: model.compile(backend="spectral"{given})', markup=False, soft_wrap=True)


def sketch(model: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose attention is that of ``model``, with random weights and small matrices elsewhere."""
    with models.cannot_load(model):
        config = AutoConfig.from_pretrained(**models.locate(model))
        for name, size in _SMALL.items():
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, size)
        for name in _SPECIAL:
            setattr(config, name, None)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def table(graph: GraphReport, tokens: int, dtype: torch.dtype, title: str) -> Table:
    """A row for each layer of a decode graph, and their sum."""
    shown = Table(title=f"{title}, {tokens} tokens cached", title_justify="left")
    for column in ("layer", "mask", "RoPE"):
        shown.add_column(column)
    for column in ("dense", "compressed", "ratio"):
        shown.add_column(column, justify="right")
    shown.add_column("why not")
    whole, held = 0, 0
    for site in graph.layers:
        if site.layout is None:
            shown.add_row(site.where, *"-----", escape(site.refusal or ""))
            continue
        dense, compressed = stored(site.layout, tokens, dtype)
        whole, held = whole + dense, held + compressed
        shown.add_row(site.where, site.mask, rope(site.layout), *cells(dense, compressed))
    shown.add_section()
    shown.add_row(f"{graph.matched} of {graph.sites} layers", "", "", *cells(whole, held))
    return shown


def cells(dense: int, compressed: int) -> tuple[str, str, str]:
    """Bytes as text, and their ratio."""
    return decimal(dense), decimal(compressed), f"{dense / compressed:.2f}"


def rope(layout: Layout) -> str:
    """How keys are rotated where they are read."""
    if layout.rotary is None:
        return "none, or not one that is known"
    kind = "interleaved" if layout.rotary.interleaved else "halves"
    part = "" if layout.rotary.dim == layout.head_dim else f", {layout.rotary.dim} of {layout.head_dim} channels"
    return kind + part


def stored(layout: Layout, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one layer for one text: of a dense cache, and of a store that a prompt of ``tokens`` has filled on a CPU."""
    capacity = Timeline(layout, 1, tokens, tokens, torch.device("meta")).capacity  # which takes no memory
    buffers = allocate(layout, 1, capacity, dtype, "meta")
    return 2 * layout.kv_heads * layout.head_dim * tokens * dtype.itemsize, sum(buffer.nbytes for buffer in buffers)
