"""The recipes of CONTRIBUTING are followed: a new preset is one entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

import spectral_compile as sc
from spectral_compile.codec import PRESETS
from spectral_compile.evaluation import plot
from spectral_compile.evaluation.contenders import options_of
from tests.docs.markdown import ROOT, blocks, section, text
from tests.shell import invoke
from tests.tiny import GREEDY, WINDOWS, build, tokens

PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def tight() -> Iterator[None]:
    """The entry of the recipe, without what it shows."""
    (entry,) = [line for block in blocks(PAGE, "python") for line in block.splitlines() if line.startswith("PRESETS[")]
    with patch.dict(PRESETS):
        exec(entry, {"PRESETS": PRESETS, "Preset": type(PRESETS["balanced"])})
        yield


def test_a_preset_of_one_entry_compresses_and_lies_between_its_neighbours(tight: None) -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={"preset": "tight", "strict": True, "inner": "eager", **WINDOWS})
    out = model.generate(tokens(1, 200), max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    assert sc.memory_stats(out).parts["codes"] > 0
    assert torch.isfinite(out.past_key_values.layers[0].keys.dense()).all()
    rows = {name: PRESETS[name].layout(8, 128) for name in ("balanced", "tight", "compact")}
    sizes = {name: layout.key.row_bytes + layout.value.row_bytes for name, layout in rows.items()}
    assert sizes["compact"] < sizes["tight"] < sizes["balanced"]


def test_the_command_line_knows_a_preset_of_one_entry(tight: None, tiny_folder: object) -> None:
    assert (options_of("tight-margin") or {})["preset"].margin == 1
    result = invoke("doctor", tiny_folder, "--preset", "tight")
    assert result.exit_code == 0 and 'options={"preset": "tight"}' in result.stdout
    figure = plot.picture([plot.Point("balanced", 8.5, 0.01), plot.Point("tight", 11.0, 0.02)], "a title")
    assert [line.get_label() for line in figure.axes[0].lines] == ["presets"]


def test_every_recipe_is_there_and_names_commands_that_exist() -> None:
    for title in ("A pass", "A preset", "A model's quirk", "A tile plan"):
        assert re.findall(r"^\d\. ", section(PAGE, title), re.MULTILINE)[:4] == ["1. ", "2. ", "3. ", "4. "]
    targets = re.findall(r"^([\w.-]+):", text(ROOT / "Makefile"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w.-]*\w)", text(PAGE))) <= set(targets)
