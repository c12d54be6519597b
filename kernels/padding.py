"""What the host knows of a prompt's mask: where it hides nothing, no operation asks it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Known(threading.local):
    unpadded = False  # every column of the chunk that this thread's call brings is a token


_known = _Known()


@contextmanager
def unpadded(known: bool) -> Iterator[None]:
    """Within it all columns of the operations' chunks are tokens, if that is ``known``."""
    before, _known.unpadded = _known.unpadded, known
    try:
        yield
    finally:
        _known.unpadded = before


def asked(valid: torch.Tensor | None) -> torch.Tensor | None:
    """``valid`` if it may hide a column, else None: to count columns takes a dozen launches a layer."""
    return None if _known.unpadded else valid
