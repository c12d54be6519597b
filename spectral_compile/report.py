"""What the backend did: one report a graph, a warning when it was never asked, and counted losses of compression."""

from __future__ import annotations

import atexit
import logging
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from spectral_compile.asked import being_compiled, misdirected, passed_by
from spectral_compile.codec.layout import Layout

log = logging.getLogger(__name__)

UNSLOTH = (
    "Unsloth replaces attention while it decodes by code that no compiler sees: compile "
    "spectral_compile.unsloth.standard_forward(model) instead"
)


class SpectralWarning(UserWarning):
    """Something runs densely that could have been compressed."""


@dataclass(frozen=True)
class Refusal:
    """An attention site, or a whole graph, that stays as it is, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class PassReport:
    """One pass over one graph: its wall time in ``seconds``, how many sites match behind it, and how many it has refused."""

    name: str
    seconds: float
    matched: int
    refused: int

    def __str__(self) -> str:
        return f"{self.name}: {self.matched} sites match, {self.refused} refused ({1000 * self.seconds:.1f} ms)"


@dataclass(frozen=True)
class SiteReport:
    """One attention: ``mask`` is causal or tensor, ``layout`` that of its store, RoPE included; None where it is refused."""

    where: str
    mask: str
    layout: Layout | None
    refusal: str | None


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo handed over.

    ``kind`` is prefill, extend, decode or other; of ``sites`` attentions ``matched`` run on the compressed cache and the others
    are in ``refusals``; ``notes`` say what matched in a lesser form, and ``layers`` has all of them. ``seconds`` holds the time
    spent in ``passes`` and in the ``inner`` compiler; ``passes`` has a report of each pass that ran, in order.
    """

    kind: str
    sites: int
    matched: int
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[Refusal, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    layers: tuple[SiteReport, ...] = ()
    passes: tuple[PassReport, ...] = ()
    fingerprint: str | None = None
    profiled: bool = False

    def __str__(self) -> str:
        lines = [
            f"{self.kind}: {self.matched} of {self.sites} attention sites compressed{', by a profile' if self.profiled else ''}"
            f" (passes {self.seconds.get('passes', 0.0):.1f} s, compiler {self.seconds.get('inner', 0.0):.1f} s)"
        ]
        return "\n  ".join(lines + [str(refusal) for refusal in (*self.refusals, *self.notes)])


def first_refusal(made: Iterable[GraphReport]) -> str:
    """Why nothing was compressed, in a sentence."""
    reasons = (str(refusal) for report in made for refusal in report.refusals)
    return next(reasons, "the backend got no graph with a KV cache")


_reports: list[GraphReport] = []
_decodes = _recordings = 0
_ever = False


def reports() -> list[GraphReport]:
    """The reports of all graphs compiled since the last ``reset()``, oldest first.

    Where there was no graph, a module that was compiled with the backend though its ``generate`` never calls it has a line.
    """
    return list(_reports) or [GraphReport("other", 0, 0, (Refusal("graph", reason),)) for reason in misdirected()]


def record(report: GraphReport) -> None:
    global _ever
    _ever = True
    _reports.append(report)
    log.info("%s", report)


def decodes() -> int:
    """How often a compressed layer was decoded to a dense tensor since the last ``reset()``."""
    return _decodes


def count_decode(what: str, strict: bool) -> None:
    """Note that ``what`` needs a dense tensor; an error where ``strict``, else a warning the first time."""
    global _decodes
    if strict:
        raise RuntimeError(f"strict: {what} would decode the compressed cache to a dense tensor")
    if _decodes == 0:
        warnings.warn(
            f"{what} decodes the compressed cache to a dense tensor; reports() and explain() say which graphs did not match",
            SpectralWarning,
            stacklevel=3,
        )
    _decodes += 1


def recordings() -> int:
    """How often decode steps were recorded as a CUDA graph since the last ``reset()``."""
    return _recordings


def count_recording() -> None:
    global _recordings
    _recordings += 1


def clear() -> None:
    global _decodes, _recordings
    _reports.clear()
    _decodes = _recordings = 0


def expect_a_graph() -> None:
    """The backend is being looked up: warn at once if no graph can come, and at exit if none ever came."""
    module = being_compiled()
    if module is not None and (reason := passed_by(module)) is not None:
        warnings.warn(reason, SpectralWarning, stacklevel=2)
    atexit.register(_warn_if_unused)


def stance_warning() -> str | None:
    """What to do about a stance of ``torch.compiler`` under which no backend is asked, if it is on."""
    if torch._dynamo.eval_frame._stance.stance != "eager_on_recompile":
        return None
    return (
        'the stance of torch.compiler is "eager_on_recompile", which Unsloth sets after its first inference and which compiles'
        ' nothing new: call torch.compiler.set_stance("default") first'
    )


def why_no_graph() -> str | None:
    """Why the backend is given no graph, where something else in this process explains it."""
    return stance_warning() or (UNSLOTH if "unsloth" in sys.modules else None)


def _warn_if_unused() -> None:
    if not _ever:
        warnings.warn(
            why_no_graph()
            or next(iter(misdirected()), None)
            or 'the backend "spectral" was asked for but never given a graph, so nothing was compressed:'
            " torch.compile(model).generate() runs the uncompiled model;"
            ' call model.compile(backend="spectral") and then model.generate()',
            SpectralWarning,
            stacklevel=1,
        )
