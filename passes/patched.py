"""Refuse what other libraries have patched or cut: what is left of attention in such a graph says nothing of how the model
decodes."""

from __future__ import annotations

import re

from spectral_compile.passes.trace import Trace
from spectral_compile.report import UNSLOTH, Refusal

ACCELERATE = (
    "accelerate's hooks (device_map over several devices, or offloading) break the model into pieces: load it onto one device"
)
WEIGHTS = "output_attentions=True breaks the graph in each attention: leave it out"
_UNSLOTH_FILE = re.compile(
    r'[/\\](unsloth[/\\](models|kernels|utils)|unsloth_zoo|unsloth_compiled_cache)[/\\]([^/\\"]+[/\\])?[^/\\"]+\.py$'
)
_FILE = re.compile(r'^ *File "(.*?)", line', re.MULTILINE)
_ATTENTION_FILE = re.compile(r"transformers[/\\]integrations[/\\]\w*attention\.py$")
_HOOKS = ("accelerate/hooks.py", "accelerate\\hooks.py")


def refuse_patched(trace: Trace) -> None:
    """Refuse every site of a graph that Unsloth wrote parts of, that accelerate's hooks cut off around a layer, or that a word
    about attention weights cut off before attention.

    Requires: ``trace.sites``, and what Dynamo says of a graph break in ``gm.compile_subgraph_reason``.
    Gives: all sites of such a graph refused for this reason, or a refusal of the graph where it has none. The graph stays as it
    is.
    """
    causes = ((UNSLOTH, _by_unsloth), (ACCELERATE, _cut_by_hooks), (WEIGHTS, _cut_for_weights))
    reason = next((reason for reason, applies in causes if applies(trace)), None)
    if reason is None:
        return
    for site in trace.sites:
        site.refusal = site.refusal or reason
    if not trace.sites:
        trace.refusals.append(Refusal("graph", reason))


def _by_unsloth(trace: Trace) -> bool:
    """Whether operations or code of Unsloth's stand in the graph; it assigns to transformers' classes, whose names stay.

    Its code around all of a layer, which only hands on what it is given, stands in stack traces too, but never innermost.
    """
    for node in trace.gm.graph.nodes:
        if getattr(node.target, "namespace", None) == "unsloth" or str(node.target).startswith("unsloth."):
            return True
        files = _FILE.findall(node.stack_trace or "")
        if files and _UNSLOTH_FILE.search(files[-1]):
            return True
    return False


def _cut_by_hooks(trace: Trace) -> bool:
    """Whether the graph ends where a hook within the model begins; a hook around the whole model leaves all sites in one."""
    cut = getattr(trace.gm, "compile_subgraph_reason", None)
    if cut is None or not cut.graph_break or len(trace.sites) != 1:
        return False
    return any(frame.filename.endswith(_HOOKS) for frame in cut.user_stack)


def _cut_for_weights(trace: Trace) -> bool:
    """Whether the graph ends where transformers logs that this attention gives no weights."""
    cut = getattr(trace.gm, "compile_subgraph_reason", None)
    if cut is None or not cut.graph_break or not cut.user_stack:
        return False
    return bool(_ATTENTION_FILE.search(cut.user_stack[-1].filename)) and "Logger" in cut.reason
