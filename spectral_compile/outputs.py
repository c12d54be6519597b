"""The cache in what transformers takes and returns: it is called ``cache`` from 5.24 on, and ``past_key_values`` before."""

from __future__ import annotations

from typing import Any


def cache_of(output: Any) -> Any:
    """The cache that a model or ``generate`` returned in ``output``; None where there is none."""
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


def cache_argument(cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model's forward."""
    from transformers.modeling_outputs import BaseModelOutputWithPast  # here, since to import it takes seconds

    return {"cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values": cache}
