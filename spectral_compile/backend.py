"""The backend, as the story of one compile: options, passes, inner compiler, runtime, report."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch.fx import Graph, GraphModule

from spectral_compile import limit, report
from spectral_compile.artefacts import Artefacts
from spectral_compile.config import SpectralConfig
from spectral_compile.kernels.sliced import PARTS, CompiledPart
from spectral_compile.passes.clean_up import is_asked_for_its_shape, stand_in
from spectral_compile.passes.pipeline import run_passes
from spectral_compile.passes.slices import Part
from spectral_compile.passes.trace import Trace, fake
from spectral_compile.plan import Plan
from spectral_compile.replay import Replay
from spectral_compile.report import GraphReport, Refusal, SiteReport, SpectralWarning
from spectral_compile.runtime import BoundGraph, DenseGraph
from spectral_compile.tensor import SpectralTensor

log = logging.getLogger(__name__)


def spectral(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | SpectralConfig | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that its KV cache is kept, and attended to, in compressed form.

    ``options`` are the fields of ``SpectralConfig``, and options of Inductor; ``mode`` is Inductor's. A graph with gradients,
    without a cache, or in which nothing matches goes to the inner compiler as it came. Bad options raise ValueError.
    """
    limit.watch(spectral)
    limit.restore()
    config = SpectralConfig.parse(options, mode)
    started = time.perf_counter()
    log.info("a graph of %d nodes has come", len(gm.graph.nodes))
    refusal = refuse_graph(gm)
    trace, artefacts = Trace(own_copy(gm), {}, config), Artefacts(config)
    artefacts.before(trace)
    if refusal is None:
        trace.examples = dict(zip(_placeholders(trace.gm), example_inputs, strict=True))
        run_passes(trace, artefacts.after_pass)
        artefacts.after(trace)
    passed = time.perf_counter()

    if trace.plan is None:
        steps = (Refusal(site.where, site.refusal) for site in trace.sites if site.refusal and fake(site.query).shape[-2] == 1)
        compiled = compile_densely(gm, example_inputs, config, next(steps, None))
    else:
        examples = [trace.examples[node] for node in trace.plan.inputs]
        parts = [part_of(name, part, config) for name, part in trace.parts.items()]
        # a store's buffers grow between calls; nothing but the operations that take them depends on their sizes
        patches: dict[str, Any] = {"size_asserts": False, "triton.cudagraphs": False}
        if trace.kind != "decode":
            # else hidden states are not added up for two layers, and all that they are the sum of stays alive
            patches["realize_reads_threshold"] = 2
            # else queries are rotated before there are keys and values, and what all three are computed from stays alive
            patches["reorder_for_locality"] = False
        inner = compile_inner(trace.gm, examples, config, patches)
        replay = None
        if records(trace.plan, config):
            if (why := varying(examples, trace.plan.batch)) is not None:
                trace.notes.append(Refusal("graph", why))
            else:
                replay = Replay(inner, *moving_and_staying(trace.plan), trace.plan.sites[0].device)
        compiled = BoundGraph(trace.plan, inner, config, [fake(node) for node in _placeholders(gm)], gm.forward, parts, replay)
    done = time.perf_counter()

    seconds = {"passes": passed - started, "inner": done - passed}
    made = make_report(trace, refusal, seconds)
    artefacts.report(made)
    warn_of_refusals(trace, made)
    report.record(made)
    return compiled


def refuse_graph(gm: GraphModule) -> Refusal | None:
    """Why a graph as a whole is left alone, if it is."""
    if torch.is_grad_enabled() and any(getattr(fake(node), "requires_grad", False) for node in gm.graph.nodes):
        return Refusal("graph", "it computes gradients: call the model under torch.no_grad() to compress its cache")
    return None


def own_copy(gm: GraphModule) -> GraphModule:
    """A copy to edit: Dynamo still reads the placeholders of its own graph after the backend has returned."""
    graph = Graph()
    copies: dict[Any, Any] = {}
    result = graph.graph_copy(gm.graph, copies)
    old = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    graph.output(result).meta.update(old.meta)
    for node, copied in copies.items():
        if node.op == "placeholder":
            copied._dynamo_source = getattr(node, "_dynamo_source", None)
    new = GraphModule(gm, graph)
    new.meta.update(gm.meta)
    new.compile_subgraph_reason = getattr(gm, "compile_subgraph_reason", None)
    new._param_name_to_source = getattr(gm, "_param_name_to_source", {})
    return new


def compile_inner(
    gm: GraphModule, examples: list[Any], config: SpectralConfig, patches: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Hand a graph to the inner compiler that the options name; Inductor takes ``patches`` over its own options.

    What Inductor has compiled once, another process finds in its FX graph cache and in AOTAutograd's: rewritten graphs, those
    that are left as they came, and parts. ``torch.compiler.save_cache_artifacts`` carries both to another machine. The rest is
    done again in each process: what Dynamo traces, which is cached nowhere; the passes, up to .03 s a layer, since they
    read constants off the process and have Dynamo guard them; CUDA graphs, which hold addresses; the operations' own kernels,
    which Triton caches in ``TRITON_CACHE_DIR``, as to Inductor an operation is opaque; and on a CPU the first time Inductor
    runs, 1.5 s in which it tries what vector instructions there are.
    """
    if config.inner == "eager":
        return gm.forward
    if config.inner == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, examples)
    from torch._inductor.compile_fx import compile_fx  # here, since to import it takes seconds

    compiled = compile_fx(gm, examples, config_patches=dict(config.inductor) | dict(patches or {}) or None)
    assert callable(compiled), "Inductor gives files only where it compiles ahead of time"
    return compiled


def part_of(name: str, part: Part, config: SpectralConfig) -> CompiledPart:
    """A part as it runs; one that another live graph has too is compiled once."""
    if (made := PARTS.get(name)) is None:
        log.debug("part %s is compiled by itself", name)
        made = PARTS[name] = CompiledPart(compile_part(part, config))
    return made


def compile_part(part: Part, config: SpectralConfig) -> Callable[..., Any]:
    """Compile a part of a graph for itself, whatever else is being compiled."""
    mode, examples = part.examples()
    with tracing(TracingContext(mode)):
        return compile_inner(part.gm, examples, config, {"triton.cudagraphs": False})


def records(plan: Plan, config: SpectralConfig) -> bool:
    """Whether a graph should become a CUDA graph; only decode never waits for the GPU."""
    wanted = config.inner == "inductor" and dict(config.inductor).get("triton.cudagraphs", config.cudagraphs)
    return wanted and plan.kind == "decode" and plan.sites[0].device.type == "cuda"


def varying(examples: list[Any], batch: int | torch.SymInt = 1) -> str | None:
    """Why a graph with these inputs cannot be a CUDA graph, if so: with each new size it would be recorded again.

    A ``batch`` may vary: it has few sizes, each of which is recorded.
    """
    few = batch.node.expr.free_symbols if isinstance(batch, torch.SymInt) else set()
    for example in examples:
        sizes = (*example.shape, *example.stride()) if isinstance(example, torch.Tensor) else (example,)
        if any(isinstance(size, torch.SymInt) and not size.node.expr.free_symbols <= few for size in sizes):
            return "it has inputs whose sizes vary, such as a mask, so it is not recorded as a CUDA graph"
    return None


def moving_and_staying(plan: Plan) -> tuple[list[int], list[int]]:
    """Which inputs lie elsewhere at every call, and which hardly ever do: weights, by Dynamo's word, and the timeline.

    Buffers of stores are neither: ``SpectralStore.placement`` tells by one comparison whether they are still the same.
    """
    move: list[int] = []
    stay: list[int] = []
    for i, (node, source) in enumerate(plan.inputs.items()):
        if source[0] != "buffer":
            (stay if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) else move).append(i)
    return move, stay


def compile_densely(
    gm: GraphModule, example_inputs: list[Any], config: SpectralConfig, step: Refusal | None
) -> Callable[..., Any]:
    """The graph as it came; compressed tensors among its arguments are decoded at each call, unless only shapes are read.

    ``step`` is why it is no compressed decode step, if it is a step at all: prompts then stay dense too.
    """
    if not any(isinstance(fake(node), SpectralTensor) for node in _placeholders(gm)):
        return compile_inner(gm, example_inputs, config)
    copy, examples, shapes = own_copy(gm), list(example_inputs), set()
    for i, node in enumerate(_placeholders(copy)):
        if isinstance(fake(node), SpectralTensor):
            if is_asked_for_its_shape(node):
                shapes.add(i)
            examples[i] = stand_in(node)
    return DenseGraph(compile_inner(copy, examples, config), shapes, step)


def make_report(trace: Trace, refusal: Refusal | None, seconds: dict[str, float]) -> GraphReport:
    """What happened to a graph."""
    refusals = ([refusal] if refusal else []) + trace.refusals
    refusals += [Refusal(site.where, site.refusal) for site in trace.sites if site.refusal]
    notes = (*trace.notes, *(Refusal(site.where, site.note) for site in trace.matched if site.note))
    layers = tuple(
        SiteReport(site.where, site.mask_kind, None if site.refusal else site.layout, site.refusal) for site in trace.sites
    )
    return GraphReport(
        kind=trace.kind,
        sites=len(trace.sites),
        matched=len(trace.matched),
        refusals=tuple(refusals),
        notes=notes,
        seconds=seconds,
        layers=layers,
        passes=tuple(trace.passes),
        fingerprint=trace.fingerprint if trace.matched else None,
        profiled=trace.profiled,
    )


def warn_of_refusals(trace: Trace, made: GraphReport) -> None:
    """Warn where nothing in a graph is compressed; where a compressed cache comes in, ``strict`` makes that a RuntimeError."""
    if made.refusals and not made.matched:
        message = f"nothing in this graph was compressed; {made.refusals[0]}"
        if trace.config.strict and any(isinstance(fake(n), SpectralTensor) for n in _placeholders(trace.gm)):
            raise RuntimeError(f"strict: {message}")
        warnings.warn(message, SpectralWarning, stacklevel=2)


def _placeholders(gm: GraphModule) -> list[Any]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def reset() -> None:
    """Forget all reports, counts and compiled graphs of this process."""
    report.clear()
    limit.clear()
    torch._dynamo.reset()
