"""Profiles with chosen losses."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_compile.codec import Profile


def profile(geometry: tuple[int, int], losses: Sequence[float]) -> Profile:
    """Keys and values of each layer lose as much, and in the cheapest grade five times that."""
    fine, coarse = tuple(losses), tuple(5 * x for x in losses)
    return Profile(*geometry, fine, fine, coarse, coarse)
