"""Errors that whoever calls can put right."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


class Mistake(ValueError):
    """What the caller can put right, in a sentence, which is all that the command line shows; it then exits with ``status``."""

    status = 2


class Refused(Mistake):
    """Nothing of a model can be compressed."""

    status = 1


@contextmanager
def mistakes(*kinds: type[Exception], what: str | None = None) -> Iterator[None]:
    """Make errors of these ``kinds`` a ``Mistake`` of one line: around calls that raise them for the caller alone.

    ``what`` comes first, if it is given: what cannot be done.
    """
    try:
        yield
    except Mistake:
        raise
    except kinds as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise Mistake(f"{what}: {reason}" if what else reason) from error
