"""A way to look inside: the folder that ``dump_graphs`` names, the structured log of torch, and log lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectral_compile as sc
from spectral_compile.config import SpectralConfig
from spectral_compile.passes import slices
from spectral_compile.passes.pipeline import PASSES
from tests.passes.harness import Attention, hidden
from tests.shell import invoke
from tests.tiny import WINDOWS

ROOT = Path(__file__).parents[1]
NAMES = [run.__name__ for run in PASSES]
COMPILE = """
import torch
import spectral_compile as sc
from tests.passes.harness import Attention, hidden

model = torch.compile(Attention(), backend=sc.spectral, options={"inner": "eager"})
with torch.no_grad():
    model(**hidden(1, 40))
"""


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def compile_and_run(folder: Path, module: torch.nn.Module, *lengths: int, **options: object) -> None:
    """One prefill of each length, and a graph of its own for each."""
    compiled = torch.compile(
        module, backend=sc.spectral, options={**WINDOWS, "inner": "eager", **options, "dump_graphs": folder}
    )
    with torch.no_grad():
        for length in lengths:
            torch._dynamo.reset()
            compiled(**hidden(1, length))


def files(folder: Path) -> dict[str, list[str]]:
    return {graph.name: sorted(path.name for path in graph.iterdir()) for graph in sorted(folder.iterdir())}


def test_each_graph_has_a_folder_with_what_passes_have_made_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "graphs"
    compile_and_run(folder, Attention(), 40, 30)
    names = ["0_as_it_came.py", "8_rewrite.py", "9_clean_up.py", "report.txt"]
    assert files(folder) == {"graph_000": names, "graph_001": names}
    came, rewritten, cleaned = ((folder / "graph_000" / name).read_text() for name in names[:3])
    for text in (came, rewritten, cleaned):
        compile(text, "a dumped graph", "exec")  # readable is Python
    assert "append_" not in came and "append_" in rewritten and "append_" in cleaned
    assert "f32[1, 40, 32]" in came and len(cleaned) < len(rewritten)


def test_the_report_of_a_graph_has_a_line_for_each_pass_and_each_site(tmp_path: Path) -> None:
    compile_and_run(tmp_path, Attention(), 40)
    text = (tmp_path / "graph_000" / "report.txt").read_text()
    (report,) = sc.reports()
    assert text.startswith(str(report))
    assert [done.name for done in report.passes] == NAMES
    assert all(f"  {done}\n" in text for done in report.passes)
    assert report.layers[0].layout.spec() in text


def test_a_graph_that_is_refused_is_written_with_the_reason(tmp_path: Path) -> None:
    module = Attention()
    compiled = torch.compile(
        lambda given: module(**given)[0], backend=sc.spectral, options={"inner": "eager", "dump_graphs": str(tmp_path)}
    )
    with torch.no_grad(), pytest.warns(sc.SpectralWarning):
        compiled(hidden(1, 9))
    assert files(tmp_path) == {"graph_000": ["0_as_it_came.py", "report.txt"]}
    assert sc.reports()[0].refusals[0].reason in (tmp_path / "graph_000" / "report.txt").read_text()


def test_parts_that_are_compiled_by_themselves_are_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "ROWS", 16)
    compile_and_run(tmp_path, Attention(mlp=256), 40)
    (part,) = (tmp_path / "graph_000").glob("part_*.py")
    assert "linear" in part.read_text()
    assert part.stem.removeprefix("part_") in (tmp_path / "graph_000" / "9_clean_up.py").read_text()


def test_the_command_line_takes_the_folder(tmp_path: Path, tiny_folder: Path) -> None:
    done = invoke("doctor", tiny_folder, "--options", f"dump_graphs={tmp_path}")
    assert done.exit_code == 0, done.output
    assert list(files(tmp_path)) == ["graph_000", "graph_001"]


@pytest.mark.parametrize(("below", "reason"), [("", "File exists"), ("/folder", "Not a directory")])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(below: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = f"{tmp_path / 'file'}{below}"
    with pytest.raises(ValueError) as raised:
        SpectralConfig.parse({"dump_graphs": folder})
    assert str(raised.value) == f"cannot write to the folder {folder}: {reason}"


def test_torch_logs_and_torch_trace_show_passes_graphs_and_reports(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_LOGS": "+spectral_compile", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [name for line in lines for name in re.findall(r" (\w+): 1 sites match, 0 refused \(", line)] == NAMES
    assert any("keys are stored before RoPE" in line for line in lines if line.startswith("V"))
    assert sum("prefill: 1 of 1 attention sites compressed" in line for line in lines) == 1

    found = {}
    (log,) = tmp_path.glob("*.log")
    payload: list[str] = []
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            payload.append(line[1:])
        elif (entry := json.loads(line[line.index("{") :])).get("artifact", {}).get("name", "").startswith("spectral"):
            payload = found[entry["artifact"]["name"]] = []
            assert "has_payload" in entry and entry["frame_id"] == 0
        else:
            payload = []
    assert list(found) == ["spectral_graph_before", "spectral_graph_after", "spectral_report"]
    before, after, report = ("\n".join(lines) for lines in found.values())
    assert "append_" not in before and "append_" in after
    assert [done["name"] for done in json.loads(report)["passes"]] == NAMES


def test_nothing_is_logged_by_default(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        torch.compile(Attention(), backend=sc.spectral, options={"inner": "eager"})(**hidden(1, 40))
    assert sc.reports()[0].matched == 1
    assert capfd.readouterr() == ("", "") and not caplog.records
