"""``spectral-compile doctor``: what the backend would do with each layer of a model, before anyone waits for its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from typer import Argument, Option

from spectral_compile import models
from spectral_compile.cache.timeline import HEADROOM
from spectral_compile.cli.console import output, phases
from spectral_compile.cli.memory import Fit, Shape, parse_bytes
from spectral_compile.cli.options import compile_line, parse_options, parse_pairs
from spectral_compile.cli.sizes import pays_from, stored, summed, when_it_pays
from spectral_compile.codec.layout import Layout
from spectral_compile.errors import Refused
from spectral_compile.explain import examine
from spectral_compile.outputs import cache_of
from spectral_compile.report import GraphReport, SiteReport, first_refusal
from spectral_compile.stats import storage_bytes

PROMPT = 24  # tokens that are traced
LENGTHS = (1024, 4096, 32768, 131072)  # tokens for which the whole cache is weighed
_SMALL = {"vocab_size": 256, "intermediate_size": 64, "moe_intermediate_size": 64}  # attention depends on none of these
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def doctor(
    model: Annotated[str | None, Argument(help=models.WHICH, show_default=models.DEFAULT)] = None,
    tokens: Annotated[int, Option(min=1, max=10**12, help="Cached tokens that bytes are given for")] = 32768,
    preset: Annotated[str, Option(help="Codec: quality, balanced, compact, seed or exact")] = "balanced",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of the dense cache")] = "bfloat16",
    memory: Annotated[str | None, Option(help="Say whether all fits into it, such as 8GiB", show_default="not asked")] = None,
    weights: Annotated[
        Literal["16", "8", "4"] | None, Option(help="Bits of linear weights, for --memory", show_default="as configured")
    ] = None,
    options: Annotated[list[str] | None, Option(help="key=value, of SpectralConfig or Inductor; repeatable")] = None,
    json_: Annotated[bool, Option("--json", help="Print JSON instead of tables, in bytes and with names of modules")] = False,
) -> None:
    """Show layer by layer what would be compressed, and why not. Exit code 1 if nothing would be, or all does not fit.

    The model is built from its configuration alone, with random weights and a small vocabulary.
    """
    room = parse_bytes(memory) if memory else None
    given = {"preset": preset, **parse_pairs(options or [])}
    config = parse_options({"preset": preset}, options or [])
    screen, kind = Console(stderr=True), getattr(torch, dtype)
    transformers.logging.set_verbosity_error()
    with phases(screen) as display:
        task = display.add_task("building the model with random weights")
        built = sketch(model, kind)
        display.update(task, description="tracing")
        found = examine(built, options=vars(config) | {"inner": "eager"}, input_ids=torch.ones(1, PROMPT, dtype=torch.int64))
        weighed = Weighed.of(built, found, kind, config.headroom)
        fit = room and fit_of(model, weighed, room, tokens, int(weights) if weights else None)
    out, title = output(), model or models.DEFAULT
    if json_:
        facts = {"model": title, "dtype": dtype, "options": given, "compile": compile_line(given)}
        graphs = [{"kind": graph.kind, "sites": graph.sites, "matched": graph.matched} for graph in found]
        facts |= {"fit": {**asdict(fit), "fits": fit.fits}} if fit else {}
        print(json.dumps({**facts, "graphs": graphs, **weighed.summary(tokens)}, indent=1, default=str))
    if weighed.decode is None:
        raise Refused(f"nothing would be compressed: {first_refusal(found)}")
    if fit and not fit.fits:
        raise Refused(f"{fit}: {advice(fit)}")
    if json_:
        return
    out.print(weighed.table(tokens, title))
    out.print(weighed.totals(tokens))
    for graph in found:
        out.print(str(graph).splitlines()[0].partition(" (")[0], markup=False)
    out.print(when_it_pays(weighed.layouts, kind, config.headroom), soft_wrap=True)
    out.print(f"compile with: {compile_line(given)}", markup=False, soft_wrap=True)
    if fit:
        out.print(str(fit), markup=False, soft_wrap=True)


def fit_of(model: str | None, weighed: Weighed, memory: int, tokens: int, bits: int | None = None) -> Fit:
    """Whether the model, its cache of ``tokens`` tokens and what it works with fit into ``memory`` bytes, of a GPU."""
    dense, compressed = replace(weighed, headroom=weighed.headroom or HEADROOM["cuda"]).total(tokens)
    return Fit.of(Shape.of(model, weighed.dtype, bits), memory, tokens, compressed, dense)


def advice(fit: Fit) -> str:
    """What makes less of what is most."""
    if fit.weights > fit.cache:
        return "load the weights in fewer bits (--weights 4), or take a smaller model"
    return "ask for fewer tokens (--tokens), or for a preset with fewer bytes (--preset compact)"


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


@dataclass(frozen=True)
class Held:
    """What a layer of the dense cache holds: ``per_token`` bytes a token, of the last ``window`` tokens or all, and more."""

    per_token: int
    window: int | None
    constant: int

    @classmethod
    def of(cls, layer: Any) -> Held:
        """From a layer of a transformers cache, into which tokens were written."""
        pair = [x for name in ("keys", "values") if isinstance(x := getattr(layer, name, None), torch.Tensor)]
        per_token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in pair)
        window = getattr(layer, "sliding_window", None)
        rest = {name: x for name, x in vars(layer).items() if name not in ("keys", "values")}
        return cls(per_token, window and window - 1, storage_bytes(rest))

    def bytes(self, tokens: int) -> int:
        return self.per_token * min(tokens, self.window or tokens) + self.constant


@dataclass(frozen=True)
class Weighed:
    """The layers of a model, as the ``decode`` graph has them (None: it has no compressed one), and what their cache takes."""

    config: PreTrainedConfig
    decode: GraphReport | None
    held: tuple[Held, ...]
    dtype: torch.dtype
    headroom: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, found: Sequence[GraphReport], dtype: torch.dtype, headroom: int | None) -> Weighed:
        """From a model and the reports of its graphs."""
        with torch.no_grad():
            cache = cache_of(model(torch.ones(1, PROMPT, dtype=torch.int64), use_cache=True))
        held = tuple(Held.of(layer) for layer in getattr(cache, "self_attention_cache", cache).layers)
        decode = next((graph for graph in found if graph.kind == "decode"), None)
        return cls(model.config.get_text_config(), decode, held, dtype, headroom)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        return self.decode.layers if self.decode else ()

    @property
    def layouts(self) -> list[Layout]:
        """Of the layers that are compressed and have a cache of their own."""
        return [site.layout for site in self.sites if site.layout and not self.shares(site)]

    def shares(self, site: SiteReport) -> bool:
        """Whether a layer reads the cache of another one: then transformers' cache has none for it."""
        number = number_of(site.where)
        return number is not None and number >= len(self.held)

    def sizes(self, layout: Layout, tokens: int) -> tuple[int, int]:
        return stored(layout, tokens, self.dtype, self.headroom)

    def total(self, tokens: int) -> tuple[int, int]:
        """Bytes of the whole cache, dense layers and states included: if all of it is dense, and as it would be."""
        replaced, compressed = summed(self.layouts, tokens, self.dtype, self.headroom) if self.layouts else (0, 0)
        dense = sum(layer.bytes(tokens) for layer in self.held)
        return dense, dense - replaced + compressed

    def table(self, tokens: int, title: str) -> Table:
        """A row for each layer, and their sum."""
        shown = Table(title=f"{title}, {tokens} tokens cached", title_justify="left")
        for column in ("layer", "mask", "RoPE", "joint heads"):
            shown.add_column(column)
        for column in ("dense", "compressed", "ratio"):
            shown.add_column(column, justify="right")
        shown.add_column("why not")
        for site in self.sites:
            name = plain_name(site.where, self.config)
            if site.layout is None:
                shown.add_row(name, *"------", escape(site.refusal or ""))
            elif self.shares(site):
                shown.add_row(
                    name, site.mask, rope(site.layout), joint(site.layout), *"---", "it reads the cache of another layer"
                )
            else:
                shown.add_row(name, site.mask, rope(site.layout), joint(site.layout), *cells(*self.sizes(site.layout, tokens)))
        shown.add_section()
        sizes = summed(self.layouts, tokens, self.dtype, self.headroom)
        matched, sites = (self.decode.matched, self.decode.sites) if self.decode else (0, 0)
        shown.add_row(f"{matched} of {sites} layers", "", "", "", *cells(*sizes))
        return shown

    def totals(self, tokens: int) -> Table:
        """The whole cache at several lengths."""
        title = "The whole cache, layers that stay dense included"
        shown = Table(title=title, title_justify="left", caption_justify="left")
        for column in ("tokens", "dense", "compressed", "ratio"):
            shown.add_column(column, justify="right")
        for length in sorted({*LENGTHS, tokens}):
            shown.add_row(f"{length}", *cells(*self.total(length)))
        shown.caption = "One text, with the room for new tokens that it has on a CPU; --options headroom=1024 is a GPU's."
        return shown

    def summary(self, tokens: int) -> dict[str, Any]:
        """The figures of both tables, for JSON; bytes, and None where a layer has no figure of its own."""
        layers = []
        for site in self.sites:
            row: dict[str, Any] = {"layer": plain_name(site.where, self.config), "module": site.where, "mask": site.mask}
            row |= {"compressed": site.layout is not None, "why_not": site.refusal}
            sizes = (None, None) if site.layout is None or self.shares(site) else self.sizes(site.layout, tokens)
            row |= {name: getattr(site.layout, name, None) for name in ("key_group", "value_group")}
            row |= {"rope": rope(site.layout) if site.layout else None, "dense_bytes": sizes[0], "compressed_bytes": sizes[1]}
            layers.append(row)
        totals = []
        for length in sorted({*LENGTHS, tokens}):
            dense, compressed = self.total(length)
            ratio = dense / compressed if compressed else None
            totals.append({"tokens": length, "dense_bytes": dense, "compressed_bytes": compressed, "ratio": ratio})
        pays = pays_from(self.layouts, self.dtype, self.headroom) if self.layouts else None
        return {"tokens": tokens, "layers": layers, "totals": totals, "pays_from_tokens": pays}


def number_of(where: str) -> int | None:
    """The number of the layer that a path of modules lies in, counted from 0; None where there is none in it."""
    found = re.search(r"\.(\d+)(\.|$)", where)
    return int(found[1]) if found else None


def plain_name(where: str, config: PreTrainedConfig) -> str:
    """A layer in words, counted from 1, with the kind of its attention where the configuration has several of them."""
    number = number_of(where)
    if number is None:
        return where
    kinds = getattr(config, "layer_types", None) or ()
    kind = f", {kinds[number].replace('_', ' ')}" if number < len(kinds) and len(set(kinds)) > 1 else ""
    return f"layer {number + 1} of {config.num_hidden_layers}{kind}"


def cells(dense: int, compressed: int) -> tuple[str, str, str]:
    """Bytes as text, and their ratio."""
    return decimal(dense), decimal(compressed), f"{dense / compressed:.2f}"


def joint(layout: Layout) -> str:
    """How many KV heads' keys, and values, are coded together."""
    if layout.key_group == layout.value_group:
        return f"{layout.key_group}"
    return f"keys of {layout.key_group}, values of {layout.value_group}"


def rope(layout: Layout) -> str:
    """How keys are rotated where they are read."""
    if layout.rotary is None:
        return "none, or not one that is known"
    kind = "interleaved" if layout.rotary.interleaved else "halves"
    part = "" if layout.rotary.dim == layout.head_dim else f", {layout.rotary.dim} of {layout.head_dim} channels"
    return kind + part
