"""The reference part of docs/api.md: each public name with its signature and docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import spectral_compile
import spectral_compile.unsloth
from tests.docs.markdown import DOCS, text

PAGE = DOCS / "api.md"
ELSEWHERE = {"spectral_compile.unsloth.standard_forward": spectral_compile.unsloth.standard_forward}
_BEGIN, _END = "<!-- reference: written", "<!-- end of reference -->"


def public() -> dict[str, Any]:
    """What users may import, by the name under which they do."""
    return {f"spectral_compile.{name}": getattr(spectral_compile, name) for name in spectral_compile.__all__} | ELSEWHERE


def reference() -> str:
    """The reference as Markdown."""
    parts = []
    for name, thing in public().items():
        parts += [f"### `{name}`", *_entry(name.rpartition(".")[2], thing)]
        for member, value in sorted(_members(thing).items()):
            parts += [f"#### `{name}.{member}`", *_entry(member, value)]
    return "\n\n".join(parts) + "\n"


def _members(thing: Any) -> dict[str, Any]:
    """Public methods and properties of a class that are its own and say what they do."""
    if not inspect.isclass(thing):
        return {}
    own = {name: getattr(value, "__func__", value) for name, value in vars(thing).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if _is_member(value) and value.__doc__}


def _is_member(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property)


def _entry(name: str, thing: Any) -> list[str]:
    docstring = re.sub(r"``(.*?)``", r"`\1`", inspect.getdoc(thing) or "", flags=re.DOTALL)
    return [f"```\n{_signature(name, thing)}\n```", *([docstring] if docstring else [])]


def _signature(name: str, thing: Any) -> str:
    if isinstance(thing, property):
        return f"{name}: {thing.fget.__annotations__['return']}"
    if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
        return f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})"
    signature = inspect.signature(thing)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
    shown = [str(parameter.replace(annotation=_Written(parameter.annotation))) for parameter in parameters]
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    head, tail = ("class ", ")") if inspect.isclass(thing) else ("", f") -> {signature.return_annotation}")
    line = f"{head}{name}({', '.join(shown)}{tail}"
    return line if len(line) <= 100 else "\n".join([f"{head}{name}(", *(f"    {each}," for each in shown), tail])


class _Written:
    """An annotation that shows as it is written, without quotes."""

    def __init__(self, annotation: str) -> None:
        self.annotation = annotation

    def __repr__(self) -> str:
        return self.annotation


def written() -> str:
    """The page with the reference as it should be."""
    before, rest = text(PAGE).split(_BEGIN, 1)
    comment, rest = rest.split("\n", 1)
    return f"{before}{_BEGIN}{comment}\n\n{reference()}\n{_END}{rest.split(_END, 1)[1]}"
