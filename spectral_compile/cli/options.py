"""What commands are given: options of the backend, and counts of tokens."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Mistake, mistakes

_DEFAULTS = {"preset": "balanced"}  # what nobody has to write


def parse_options(given: Mapping[str, Any], pairs: list[str]) -> SpectralConfig:
    """The config of ``given`` options and every ``key=value``; ``Mistake`` where it is none."""
    with mistakes(ValueError):
        return SpectralConfig.parse({**given, **parse_pairs(pairs)})


def parse_pairs(pairs: list[str], option: str = "--options") -> dict[str, Any]:
    """``key=value`` pairs of an ``option``, whose values are Python's literals or else text.

    ``Mistake`` where one is no pair.
    """
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise Mistake(f"{option} takes key=value, not {pair!r}")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            given[key] = value
    return given


def compile_line(given: Mapping[str, Any]) -> str:
    """The line of Python that compiles a model with ``given`` options."""
    shown = {key: value for key, value in given.items() if (key, value) not in _DEFAULTS.items()}
    pairs = (
        f"{json.dumps(key)}: {json.dumps(value) if isinstance(value, str) else repr(value)}" for key, value in shown.items()
    )
    options = f", options={{{', '.join(pairs)}}}" if shown else ""
    return f'model.compile(backend="spectral"{options})'


def count(text: str) -> int:
    """A count of tokens; ``Mistake`` where it is none."""
    if not text.isdecimal() or len(text) > 12 or int(text) < 1:
        raise Mistake(f"{text!r} is no count of tokens, such as 4096")
    return int(text)
