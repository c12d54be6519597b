"""A second process compiles nothing: graphs, and the parts that are cut from them, are found in the caches of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CODE = """
import json, pathlib, sys
import torch
from torch._dynamo.utils import counters
import spectral_compile as sc
from spectral_compile.kernels import sliced
from spectral_compile.passes import slices
from tests.passes.harness import Attention, hidden

saved = pathlib.Path(sys.argv[1])
if saved.exists():
    torch.compiler.load_cache_artifacts(saved.read_bytes())
sliced.ROWS = slices.ROWS = 16
model, given = torch.compile(Attention(rope=False, mlp=256), backend=sc.spectral), hidden(1, 41)
with torch.no_grad():
    _, *past = model(**{name: x[:, :40] for name, x in given.items()})
    out, *_ = model(**{name: x[:, 40:] for name, x in given.items()}, past=tuple(past))
if not saved.exists():
    saved.write_bytes(torch.compiler.save_cache_artifacts()[0])
found = {name: n for kind in ("inductor", "aot_autograd") for name, n in counters[kind].items() if "_cache_" in name}
print(json.dumps({"found": found, "matched": [graph.matched for graph in sc.reports()], "out": out.tolist()}))
"""


def compiled_in_a_process(saved: Path, folder: Path) -> dict[str, Any]:
    """What a process with the caches of ``folder`` found in them, after those of ``saved`` were added where it exists."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE, str(saved)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_one_process_compiles_another_one_loads(tmp_path: Path) -> None:
    """Parts of a graph once bypassed AOTAutograd's cache, as the tensors whose methods they call were not known to be some."""
    graphs = 3  # prefill, decode, and the part of the prefill that runs on slices
    first, second = (compiled_in_a_process(tmp_path / "saved", tmp_path / name) for name in ("first", "second"))
    assert first["found"] == {
        "fxgraph_cache_miss": graphs,
        "autograd_cache_miss": graphs,
        "autograd_cache_saved": graphs,
    }
    assert second["found"] == {"fxgraph_cache_hit": graphs, "autograd_cache_hit": graphs}
    assert first["matched"] == second["matched"] == [1, 1]
    assert first["out"] == second["out"]
