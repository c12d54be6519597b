"""Clean up: drop what nothing uses any more, inputs included, and give what is left of the old cache a dense value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._guards import detect_fake_mode

from spectral_compile.passes.trace import Trace, begins_or_ends_vmap, fake, is_call
from spectral_compile.tensor import SpectralTensor


def clean_up(trace: Trace) -> None:
    """Leave a graph that lints, without lengths, handles or cache outputs."""
    if trace.plan is None:
        return
    graph = trace.gm.graph
    graph.eliminate_dead_code(lambda node: node.is_impure() or begins_or_ends_vmap(node))
    inputs = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if not node.users:
            graph.erase_node(node)
            continue
        inputs[node] = trace.plan.inputs[node]
        if isinstance(fake(node), SpectralTensor):
            only_shape = all(is_call(user, "size", "numel", "dim", "getattr") for user in node.users)
            inputs[node] = ("shape" if only_shape else "dense", inputs[node][1])
            example = shape_of(fake(node)) if only_shape else dense_example(fake(node))
            trace.examples[node] = node.meta["example_value"] = example
    trace.plan = replace(trace.plan, inputs=inputs)
    graph.lint()
    trace.gm.recompile()


def shape_of(x: SpectralTensor) -> torch.Tensor:
    """A tensor of the shape of ``x`` that holds one element, for graphs that only read sizes off it."""
    return x.handle.new_zeros((), dtype=x.dtype).expand(x.shape)


def dense_example(x: SpectralTensor) -> torch.Tensor:
    """A fake dense tensor in the place of a fake compressed one."""
    with detect_fake_mode([x.handle]):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
