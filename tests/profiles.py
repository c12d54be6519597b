"""Profiles with chosen losses."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_compile.codec import Profile


def profile(geometry: tuple[int, int], losses: Sequence[float], fingerprint: str | None = None) -> Profile:
    """Layers lose this, and in the cheapest grade five times as much."""
    return Profile(*geometry, tuple(losses), tuple(5 * x for x in losses), fingerprint)
