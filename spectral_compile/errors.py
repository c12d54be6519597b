"""Errors that whoever calls can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Mistake(ValueError):
    """What the caller can put right, in one sentence; the command line shows it without a traceback and exits with status 2."""


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Make errors of these ``kinds`` a ``Mistake`` with their first line: around calls that raise them for the caller alone."""
    try:
        yield
    except Mistake:
        raise
    except kinds as error:
        raise Mistake(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
