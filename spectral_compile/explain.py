"""What the backend would do with a model, before anyone waits for a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from spectral_compile import report
from spectral_compile.backend import spectral
from spectral_compile.outputs import cache_argument, cache_of
from spectral_compile.report import GraphReport, SpectralWarning

_ASKED = 16  # tokens, which a fingerprint does not depend on
_ONCE = ("input_ids", "position_ids", "inputs_embeds", "cache", "past_key_values")  # inputs that no second call repeats


def explain(model: torch.nn.Module, *, options: Mapping[str, Any] | None = None, **inputs: Any) -> str:
    """What the backend would do with ``model(**inputs)`` and one decode step after it, as text.

    ``options`` are those of the backend. The rewritten graphs are run without gradients by plain PyTorch, so nothing waits
    for a compiler. Dynamo is reset, so that the next call of a compiled model compiles again.
    """
    made = examine(model, options=options, **inputs)
    if not made:
        nothing = "Dynamo handed over no graph: the model's forward is disabled or breaks before its first operation"
        return report.why_no_graph() or nothing
    return "\n".join(str(graph) for graph in made)


def fingerprint_of(model: torch.nn.Module) -> str | None:
    """What the backend knows a language model by, from the weights in its graphs; None where it would compress nothing."""
    ids = torch.ones(1, _ASKED, dtype=torch.int64, device=next(model.parameters()).device)
    return next((graph.fingerprint for graph in examine(model, input_ids=ids) if graph.fingerprint), None)


def examine(model: torch.nn.Module, *, options: Mapping[str, Any] | None = None, **inputs: Any) -> list[GraphReport]:
    """What ``explain`` tells, as the reports of the graphs that came."""
    torch._dynamo.reset()
    before = len(report.reports())
    compiled = torch.compile(model, backend=spectral, options={**(options or {}), "inner": "eager"})
    inputs = {"use_cache": True, **inputs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        out = compiled(**inputs)
        cache = cache_of(out)
        if cache is not None:
            step = {k: v for k, v in inputs.items() if k not in _ONCE}
            if (mask := step.get("attention_mask")) is not None:
                step["attention_mask"] = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), 1)
            compiled(input_ids=out.logits[:, -1:].argmax(-1), **step, **cache_argument(cache))
    torch._dynamo.reset()
    return report.reports()[before:]
