"""The documentation holds: its links lead somewhere, what is made of code is up to date, and README stays short."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from spectral_compile.codec import PRESETS
from spectral_compile.config import SpectralConfig
from spectral_compile.evaluation.plot import Point
from tests.docs import api, picture, rooms
from tests.docs.markdown import DOCS, PAGES, ROOT, anchors, name, prose, section, table, text

README = ROOT / "README.md"
LONGEST = 128  # characters of a line that is no table, link or picture
# a path is told by a slash or by an ending that files of this repository have
SUFFIXES = "py|md|json|png|toml|yaml|cfg"
TOP = "spectral_compile|passes|kernels|profiles|tests|examples|docs"
A_FILE = re.compile(rf"`([\w./-]+\.(?:{SUFFIXES})|(?:{TOP})/[\w./-]*)`")
IN_COMMANDS = re.compile(rf"(?:^|[\s=])((?:{TOP})/[\w./-]+)", re.MULTILINE)
FILES = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def test_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_wrapped(page: Path) -> None:
    lines = [line for line in prose(page).splitlines() if not line.lstrip().startswith(("|", "!", "#"))]
    assert [line for line in lines if len(line) > LONGEST and " " in line.strip()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    """By their path from the root or from the page, or by their bare name."""
    named = {*A_FILE.findall(text(page)), *IN_COMMANDS.findall(text(page))}
    found = {path.name for path in FILES}
    assert [path for path in sorted(named) if not any((root / path).exists() for root in (ROOT, page.parent)) and
            ("/" in path or path not in found)] == []  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_names_that_are_mentioned_exist(page: Path) -> None:
    for dotted in re.findall(r"`((?:spectral_compile|tests)(?:\.\w+)+)", text(page)):
        if importlib.util.find_spec(dotted.rsplit(".", 1)[0]) is not None:
            pkgutil.resolve_name(dotted)
        else:  # a member of a class
            owner, member = dotted.rsplit(".", 1)
            assert hasattr(pkgutil.resolve_name(owner), member), dotted


@pytest.mark.parametrize("module", [api, rooms])
def test_what_is_made_of_code_is_up_to_date(module: ModuleType) -> None:
    """Else: ``python -m tests.docs.write``."""
    assert text(module.PAGE) == module.written()


def test_the_picture_shows_the_table(tmp_path: Path) -> None:
    """The one that is committed, and the one that the command draws."""
    picture.write(tmp_path / "again.png")
    assert len(picture.points()) >= 20
    for path in (picture.PNG, tmp_path / "again.png"):
        with Image.open(path) as image:
            assert [Point(**each) for each in json.loads(image.info["Description"])] == picture.points()


def test_every_option_is_in_the_table() -> None:
    listed = [option for cell, *_ in table(DOCS / "api.md", "option") for option in cell.split(", ")]
    assert set(listed) == {field.name for field in fields(SpectralConfig)} - {"inductor"} and len(listed) == len(set(listed))


def test_readme_names_options_and_presets_that_exist() -> None:
    assert {cell for cell, *_ in table(README, "option")} <= {field.name for field in fields(SpectralConfig)}
    assert {preset for cell, *_ in table(README, "preset") for preset in cell.split(", ")} == set(PRESETS)


def test_readme_has_no_figure_that_was_not_measured() -> None:
    """Of its table of sizes and times, and of presets."""
    known = set(re.findall(r"\d+\.\d+|\d+", text(DOCS / "measured.md")))
    cells = [cell for header in ("tokens in the prompt", "preset") for row in table(README, header) for cell in row[1:]]
    figures = [figure for cell in cells for figure in re.findall(r"\d+\.\d+|\d+", cell)]
    assert len(figures) > 30 and set(figures) <= known


def test_messages_in_the_troubleshooting_exist() -> None:
    """As they stand in the source, where a text may go on in the next line."""
    sources = "".join(text(path) for room in rooms.ROOMS for path in (ROOT / room).rglob("*.py"))
    joined = re.sub(r"""["']\s*\n\s*f?["']""", "", sources)
    quoted = re.findall(r'^\| "(.*?)" \|', text(DOCS / "troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 20
    assert [message for message in quoted if message not in joined] == []


def test_the_changelog_begins_with_this_version() -> None:
    from spectral_compile import __version__

    assert f"## [{__version__}]" in text(ROOT / "CHANGELOG.md")


def test_the_glossary_has_the_words_of_the_code() -> None:
    """Fields of a layout that a reader of a report meets, and what the rooms are built around."""
    words = section(DOCS / "architecture.md", "Glossary").lower()
    wanted = ["store", "timeline", "ledger row", "slot", "split", "append tile", "row field", "sink score", "sliding window"]
    wanted += ["first exact", "recent", "token weight", "segment", "tiers", "margin", "site", "edge", "refusal", "profile"]
    assert [word for word in wanted if f"**{word}" not in words] == []
