"""The pages of documentation, and what stands in them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md")))
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    """What tests are called by: the path from the root of the repository."""
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [textwrap.dedent(code) for found, code in _FENCE.findall(text(page)) if found == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text(page))


def table(page: Path, header: str) -> list[list[str]]:
    """The cells of each row of the table whose first column has this header, without backticks."""
    _, found = text(page).split(f"\n| {header} |", 1)
    _, _, *rows = found.split("\n\n", 1)[0].split("\n")
    return [[cell.strip().replace("`", "") for cell in row.strip("| ").split(" | ")] for row in rows]


def section(page: Path, title: str) -> str:
    """What stands under a heading of the second level."""
    return text(page).split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def anchors(page: Path) -> set[str]:
    """What links to the page may name behind ``#``, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
