"""What commands are given: options of the backend, and counts of tokens."""

from __future__ import annotations

import ast
from typing import Any

from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Mistake, mistakes


def parse_options(given: dict[str, Any], pairs: list[str]) -> SpectralConfig:
    """The config of ``given`` options and every ``key=value``; ``Mistake`` where it is none."""
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise Mistake(f"--options takes key=value, not {pair!r}")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            given[key] = value
    with mistakes(ValueError):
        return SpectralConfig.parse(given)


def count(text: str) -> int:
    """A count of tokens; ``Mistake`` where it is none."""
    if not text.isdecimal() or len(text) > 12 or int(text) < 1:
        raise Mistake(f"{text!r} is no count of tokens, such as 4096")
    return int(text)
