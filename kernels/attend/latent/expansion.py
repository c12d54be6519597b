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
RUN = 768  # tokens over which the slowest pairs share one
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

    Fragments of the query's terms t = e and t = 2 + e come together, for e of 0 and 1, as cosines and sines times coefficients.
    """

    channels: torch.Tensor  # int32 [2, pairs], first and second channel of each, or -1
    turns: torch.Tensor  # int32 [pairs], turns per position as fractions of 2**32
    over_run: torch.Tensor  # [eights, e, c, 4]: terms over a whole run
    steps: torch.Tensor  # what every stretch takes, laid out by ``Steps``


class Steps(NamedTuple):
    """Where among the words of ``ExpansionTables.steps`` a stretch finds its own, which fragments take four at a time.

    First come, for all stretches, cosines and then sines of the distances of tokens r and r + 8 of sixteen, for each sixteen,
    fast eight and lane. Then each stretch has ``words``: from the powers of x over a run to those over the stretch [e or none,
    4]; for two fast eights each [c, 4] cosine and sine of one, then of the other, to its beginning; and for each medium eight
    the terms [e, c, 4]. Since a kernel reads one ahead, there is one stretch more than a run has, of no meaning.
    """

    first: int  # word of the first stretch
    turned: int  # from the beginning of a stretch
    medium: int
    words: int
    all_words: int

    @classmethod
    def of(cls, fast: int, medium: int) -> Steps:
        """For so many eights."""
        first, turned, of_medium = 2 * fast * 32 * 4, 12, 12 + 16 * -(-fast // 2)
        words = of_medium + 32 * medium
        return cls(first, turned, of_medium, words, first + (RUN // STRETCH + 1) * words)


@functools.cache
def tables(rotary: Rotary | None, dim: int, device: torch.device) -> ExpansionTables:
    """They live as long as the process, so they must be made before a CUDA graph is captured."""
    expansion = Expansion.of(rotary, dim)
    w = np.array([pair[2] for pair in expansion.pairs])
    eights, fast, medium = (count // EIGHT for count in (len(w), expansion.fast, expansion.medium))
    by_eights = w.reshape(eights, 4, 2)  # [eight, c, pair of two]
    at = Steps.of(fast, medium)
    steps = np.zeros(at.all_words, np.uint32)
    lane = np.arange(32)
    distances = steps[: at.first].reshape(2, fast, 32, 4)
    for sixteen, s, i in np.ndindex(2, fast, 2):
        angles = by_eights[s][lane % 4] * (16 * sixteen + 8 * i + lane // 4)[:, None]
        distances[sixteen, s, :, i], distances[sixteen, s, :, 2 + i] = words(np.cos(angles)), words(np.sin(angles))
    over_stretch, turned_by = _terms(w, STRETCH / 2), slice(fast, fast + medium)
    for stretch, step in enumerate(steps[at.first : -at.words].reshape(-1, at.words)):
        middle = STRETCH * stretch + STRETCH / 2
        step[: at.turned] = _shift((middle - RUN / 2) / (RUN / 2)).ravel()
        turned = step[at.turned : at.medium].reshape(-1, 4, 2, 2)
        for s in range(fast):
            angles = by_eights[s] * STRETCH * stretch
            turned[s // 2, :, s % 2, 0], turned[s // 2, :, s % 2, 1] = words(np.cos(angles)), words(np.sin(angles))
        step[at.medium :] = _turned_terms(over_stretch[turned_by], by_eights[turned_by] * middle).ravel()
    over_run = _turned_terms(_terms(w, RUN / 2), by_eights * (RUN / 2))

    channels = torch.tensor([pair[:2] for pair in expansion.pairs], dtype=torch.int32).T.contiguous()
    turns = (torch.tensor(w, dtype=torch.float64) / (2 * math.pi) * 2**32).round().to(torch.int64).to(torch.int32)
    held = (torch.from_numpy(x.view(np.int32)).contiguous() for x in (over_run, steps))
    return ExpansionTables(*(x.to(device) for x in (channels, turns, *held)))


def _shift(middle: float) -> np.ndarray:
    """Words [3, 4] from powers of x over a run to those over the stretch whose middle lies there, for e of 0, 1 and none."""
    ratio = STRETCH / RUN
    # (middle + ratio x)**j in powers of x
    m = [[math.comb(j, i) * middle ** (j - i) * ratio**i if j >= i else 0.0 for j in range(TERMS)] for i in range(TERMS)]
    shift = np.zeros((3, 4), np.uint32)
    for e in range(2):
        rows = ((e, 0), (2 + e, 0), (e, 2), (2 + e, 2))
        shift[e] = [words(np.array([m[row][first], m[row][first + 1]])) for row, first in rows]
    return shift


def _turned_terms(terms: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Words [eights, e, c, 4] of coefficients [eights, c, 2, t] at these angles [eights, c, 2]."""
    out = np.zeros((len(terms), 2, 4, 4), np.uint32)
    for e, at in np.ndindex(2, 2):
        term = terms[..., e + 2 * at]
        out[:, e, :, 2 * at], out[:, e, :, 2 * at + 1] = words(term * np.cos(angles)), words(term * np.sin(angles))
    return out


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
