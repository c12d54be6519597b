"""Scores of keys that are not rebuilt: which RoPE pairs are absorbed into the query, and the tables by which they are.

RoPE turns pair w of the key at position p by the angle w p. With the query turned back to a place m near, what the pair gives
to the score is cos(w d) times one product and sin(w d) times another, with d = p - m. Over a stretch of positions, d = h x with
x from -1 to 1, both are Chebyshev series (Abramowitz and Stegun 9.1.44, 9.1.45; J are Bessel functions, z = w h):

    cos(z x) = J0(z) - 2 J2(z) T2(x) + 2 J4(z) T4(x) - ...
    sin(z x) = 2 J1(z) T1(x) - 2 J3(z) T3(x) + 2 J5(z) T5(x) - ...

Up to T3 that is a polynomial of third degree in x, so a score is the sum over x**t of four products of the key with vectors
that do not depend on its position: the query's, turned and weighted, times the basis of the codes, once for all tokens of the
stretch. What is cut off is at most 2 J4(z) of what the pair gives.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spectral_compile.codec.layout import Rotary

STRETCH = 32  # tokens that share one expansion, and a warp's at a time
RUN = 512  # tokens over which the slowest pairs share one
TERMS = 4  # powers of x
EIGHT = 8  # pairs are taken by eights, as fragments have them
CUT_OFF = 7e-4  # of what a pair gives to a score, at most


def bessel(order: int, z: float) -> float:
    """The Bessel function of the first kind, of small ``z``."""
    return sum((-1) ** k / (math.factorial(k) * math.factorial(k + order)) * (z / 2) ** (2 * k + order) for k in range(16))


def coefficients(z: float) -> tuple[float, float, float, float]:
    """What x**0 and x**2 are times in cos(z x), and x and x**3 in sin(z x), in the order of powers."""
    j = [bessel(order, z) for order in range(TERMS)]
    return j[0] + 2 * j[2], 2 * j[1] + 6 * j[3], -4 * j[2], -8 * j[3]


def cut_off(z: float) -> float:
    """The largest part of a pair's share of the score that the expansion leaves out."""
    return 2 * abs(bessel(TERMS, z))


@dataclass(frozen=True)
class Expansion:
    """Pairs of channels by how fast RoPE turns them, fastest first.

    The first ``fast`` ones are rebuilt for every token, the next ``medium`` ones absorbed for every ``STRETCH`` tokens and the
    ``slow`` ones for every ``RUN``: multiples of eight, so that pairs may stand among faster ones than they need. ``pairs`` has
    for each its two channels, or -1 where a place is empty, and its radians per position. Channels that are not turned are
    pairs of no frequency.
    """

    fast: int
    medium: int
    slow: int
    pairs: tuple[tuple[int, int, float], ...]

    @classmethod
    @functools.cache
    def of(cls, rotary: Rotary | None, dim: int) -> Expansion:
        """Of a head of ``dim`` channels."""
        count = len(rotary.frequencies) if rotary else 0
        pairs = []
        for i, frequency in enumerate(rotary.frequencies if rotary else ()):
            channels = (2 * i, 2 * i + 1) if rotary and rotary.interleaved else (i, i + count)
            pairs.append((*channels, frequency))
        pairs += [(i, i + 1 if i + 1 < dim else -1, 0.0) for i in range(2 * count, dim, 2)]
        pairs.sort(key=lambda pair: -abs(pair[2]))
        fast = _eights(sum(cut_off(abs(w) * STRETCH / 2) > CUT_OFF for *_, w in pairs))
        turned = max(fast, _eights(sum(cut_off(abs(w) * RUN / 2) > CUT_OFF for *_, w in pairs)))
        total = max(turned, _eights(len(pairs)))
        pairs += [(-1, -1, 0.0)] * (total - len(pairs))
        return cls(fast, turned - fast, total - turned, tuple(pairs))


def _eights(count: int) -> int:
    return -(-count // EIGHT) * EIGHT


class ExpansionTables(NamedTuple):
    """An ``Expansion`` as a kernel reads it. Words are int32 of two float16, of pairs 2 c and 2 c + 1 of eight.

    Tables hold a stretch more than a run has, since a kernel reads one ahead. Fragments of the query's terms t = e and
    t = 2 + e come together, for e of 0 and 1, as cosines and sines times coefficients.
    """

    channels: torch.Tensor  # int32 [2, pairs], first and second channel of each, or -1
    turns: torch.Tensor  # int32 [pairs], turns per position as fractions of 2**32
    absorbed: torch.Tensor  # [stretches of a run + 1, eights, e, c, 4], the last stretch for a whole run
    turned: torch.Tensor  # [stretches + 1, pairs of fast eights, c, 4]: cosine and sine of one, then of the other
    shifts: torch.Tensor  # [stretches + 1, e or none, 4]: from the powers of x over a run to those over a stretch
    distances: torch.Tensor  # [2, eights, lanes, 4]: cosines, then sines, of tokens r and r + 8 of sixteen


@functools.cache
def tables(rotary: Rotary | None, dim: int, device: torch.device) -> ExpansionTables:
    """They live as long as the process, so they must be made before a CUDA graph is captured."""
    expansion = Expansion.of(rotary, dim)
    w = np.array([pair[2] for pair in expansion.pairs])
    eights, fast, stretches = len(w) // EIGHT, expansion.fast // EIGHT, RUN // STRETCH
    by_eights = w.reshape(eights, 4, 2)  # [eight, c, pair of two]

    absorbed = np.zeros((stretches + 1, eights, 2, 4, 4), np.uint32)
    over_stretch, over_run = _terms(w, STRETCH / 2), _terms(w, RUN / 2)
    for stretch in range(stretches + 1):
        terms, middle = (over_run, RUN / 2) if stretch == stretches else (over_stretch, STRETCH * (stretch + 0.5))
        angles = by_eights * middle
        for e in range(2):
            for at, t in enumerate((e, 2 + e)):
                absorbed[stretch, :, e, :, 2 * at] = words(terms[..., t] * np.cos(angles))
                absorbed[stretch, :, e, :, 2 * at + 1] = words(terms[..., t] * np.sin(angles))

    turned = np.zeros((stretches + 1, -(-fast // 2), 4, 4), np.uint32)
    distances = np.zeros((2, fast, 32, 4), np.uint32)
    lane = np.arange(32)
    for s in range(fast):
        for stretch in range(stretches):
            angles = by_eights[s] * STRETCH * stretch
            turned[stretch, s // 2, :, s % 2 * 2], turned[stretch, s // 2, :, s % 2 * 2 + 1] = (
                words(np.cos(angles)),
                words(np.sin(angles)),
            )
        for sixteen in range(2):
            for i in range(2):
                angles = by_eights[s][lane % 4] * (16 * sixteen + 8 * i + lane // 4)[:, None]
                distances[sixteen, s, :, i], distances[sixteen, s, :, 2 + i] = words(np.cos(angles)), words(np.sin(angles))

    shifts = np.zeros((stretches + 1, 3, 4), np.uint32)
    for stretch in range(stretches):
        middle, ratio = (STRETCH * stretch + STRETCH / 2 - RUN / 2) / (RUN / 2), STRETCH / RUN
        # (middle + ratio x)**j in powers of x
        m = [[math.comb(j, i) * middle ** (j - i) * ratio**i if j >= i else 0.0 for j in range(TERMS)] for i in range(TERMS)]
        for e in range(2):
            rows = ((e, 0), (2 + e, 0), (e, 2), (2 + e, 2))
            shifts[stretch, e] = [words(np.array([m[row][first], m[row][first + 1]])) for row, first in rows]

    channels = torch.tensor([pair[:2] for pair in expansion.pairs], dtype=torch.int32).T.contiguous()
    turns = (torch.tensor(w, dtype=torch.float64) / (2 * math.pi) * 2**32).round().to(torch.int64).to(torch.int32)
    held = (torch.from_numpy(x.view(np.int32)).contiguous() for x in (absorbed, turned, shifts, distances))
    return ExpansionTables(*(x.to(device) for x in (channels, turns, *held)))


def _terms(w: np.ndarray, half: float) -> np.ndarray:
    """Coefficients [eights, c, 2, t] of pairs of these frequencies over ``half`` a stretch, or run, to each side.

    Of those that turn too fast for it, which do not ask, some number that float16 has.
    """
    terms = np.array([coefficients(min(abs(x) * half, 1.0)) for x in w]).reshape(-1, 4, 2, TERMS)
    terms[..., 1::2] *= np.sign(w).reshape(-1, 4, 2, 1)  # sines of pairs that turn the other way
    return terms


def words(x: np.ndarray) -> np.ndarray:
    """Pairs of numbers [..., 2] as two float16 in one word, the first in the low half."""
    bits = np.ascontiguousarray(x, dtype=np.float16).view(np.uint16).astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << 16
