"""The list of rooms in docs/architecture.md: each module, with the first sentence of its docstring."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from tests.docs.markdown import DOCS, ROOT, text

PAGE = DOCS / "architecture.md"
ROOMS = {  # in the order of a call; the folders below each of them follow it
    "spectral_compile": "the backend, its runtime, and what users import",
    "passes": "one pass over the graph a file",
    "kernels": "the operations, in Triton and in plain PyTorch",
    "profiles": "profiles that come with the package",
    "examples": "programs of one page",
}
_BEGIN, _END = "<!-- rooms: written", "<!-- end of rooms -->"


def rooms() -> str:
    """The list as Markdown."""
    lines: list[str] = []
    for room, what in ROOMS.items():
        for folder in [ROOT / room, *sorted(path for path in (ROOT / room).rglob("*") if path.is_dir())]:
            modules = sorted(folder.glob("*.py")) or sorted(folder.glob("*.json"))
            if folder.name == "__pycache__" or not modules:
                continue
            about = what if folder == ROOT / room else sentence(folder / "__init__.py")
            lines += ["", _line(f"`{folder.relative_to(ROOT)}/`", about), ""]
            lines += [
                _line(f"- `{module.relative_to(ROOT)}`", sentence(module)) for module in modules if module.name != "__init__.py"
            ]
    return "\n".join(lines).strip("\n") + "\n"


def sentence(module: Path) -> str:
    """The first sentence of a module's docstring in Markdown; nothing where there is none."""
    if module.suffix != ".py" or not module.exists():
        return ""
    docstring = ast.get_docstring(ast.parse(text(module))) or ""
    first = re.split(r"(?<=[.!?])\s(?=[A-Z`])", " ".join(docstring.split("\n\n")[0].split()))[0]
    return re.sub(r"``(.*?)``", r"`\1`", first).rstrip(".")


def _line(path: str, about: str) -> str:
    shown, indent = path + (f": {about}" if about else ""), "  " if path.startswith("- ") else ""
    return textwrap.fill(shown, 128, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def written() -> str:
    """The page with the list as it should be."""
    before, rest = text(PAGE).split(_BEGIN, 1)
    comment, rest = rest.split("\n", 1)
    return f"{before}{_BEGIN}{comment}\n\n{rooms()}\n{_END}{rest.split(_END, 1)[1]}"
