"""What a compile leaves behind for whoever looks inside: files in ``dump_graphs``, and artefacts that ``tlparse`` shows.

With ``TORCH_TRACE=DIR`` torch writes a structured log, to which the graph before the passes, the graph behind them and the
report are added under the names ``spectral_graph_before``, ``spectral_graph_after`` and ``spectral_report``.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from torch._logging import trace_structured
from torch.fx import GraphModule

from spectral_compile.config import SpectralConfig
from spectral_compile.files import write_whole
from spectral_compile.passes.trace import Trace
from spectral_compile.report import GraphReport

log = logging.getLogger(__name__)


class Artefacts:
    """Those of one graph. A graph is turned into text only if somebody asked for files or for a structured log."""

    def __init__(self, config: SpectralConfig) -> None:
        self._folder = None if config.dump_graphs is None else _new_folder(Path(config.dump_graphs))
        self._last = ""

    def before(self, trace: Trace) -> None:
        """The graph as it came."""
        _log_graph("spectral_graph_before", trace.gm)
        self._write_graph("as_it_came", trace)

    def after_pass(self, trace: Trace) -> None:
        """The graph behind the pass that was the last to run, if that has changed it."""
        self._write_graph(trace.passes[-1].name, trace)

    def after(self, trace: Trace) -> None:
        """The graph as the passes leave it, and the parts that are compiled by themselves.

        If ``trace.plan`` is None, the inner compiler does not get this graph but the one that came.
        """
        _log_graph("spectral_graph_after", trace.gm)
        if self._folder is not None:
            for name, part in trace.parts.items():
                write_whole(self._folder / f"part_{name}.py", readable(part.gm).encode())

    def report(self, made: GraphReport) -> None:
        """What is reported of the graph: as text in the folder, as JSON in the structured log."""
        trace_structured(
            "artifact",
            lambda: {"name": "spectral_report", "encoding": "json"},
            payload_fn=lambda: dataclasses.asdict(made),
        )
        if self._folder is not None:
            write_whole(self._folder / "report.txt", described(made).encode())

    def _write_graph(self, name: str, trace: Trace) -> None:
        if self._folder is not None and (text := readable(trace.gm)) != self._last:
            self._last = text
            write_whole(self._folder / f"{len(trace.passes)}_{name}.py", text.encode())


def readable(gm: GraphModule) -> str:
    """A graph as Python, with shapes, strides, devices and the lines of the model that operations come from."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)


def described(made: GraphReport) -> str:
    """A report in full: what ``str`` says of it, a line a pass, and a line an attention site."""
    lines = [str(made), "", "passes:", *(f"  {done}" for done in made.passes), "", "attention sites:"]
    for site in made.layers:
        lines.append(f"  {site.where}: " + (f"{site.mask} mask, {site.layout.spec()}" if site.layout else f"{site.refusal}"))
    return "\n".join(lines) + "\n"


def _log_graph(name: str, gm: GraphModule) -> None:
    trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: readable(gm))


def _new_folder(parent: Path) -> Path:
    """The first of ``graph_000``, ``graph_001`` ... that is not there yet; several processes may write to one ``parent``."""
    number = 0
    while True:
        folder = parent / f"graph_{number:03}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        log.info("the next graph is written to %s", folder)
        return folder
