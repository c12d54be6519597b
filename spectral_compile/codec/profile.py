"""Profiles: which layers of a model get more bits and which get fewer, for the bytes that a preset has in all."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .layout import Layout, Side, Tiers
from .presets import tiers

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_MOST = 4  # grades in one model, since kernels are compiled for each
_TOKENS = 4096  # the bytes of a basis count as if it served as many tokens
_HALVINGS = 40  # of the interval in which the price of a byte is searched
_LARGEST = 2**20  # bytes of a file; a hundred layers take ten thousand


@dataclass(frozen=True)
class Grade:
    """Channels at (8, 4, 2) bits in 32ths of the width, and what that loses of a layer's fidelity, where ``USUAL`` loses 1.

    Losses are geometric means over the layers of SmolLM2-135M of the squared error of coefficients, those of keys and of values
    averaged.
    """

    key: tuple[int, int, int]
    value: tuple[int, int, int]
    loss: float

    def tiers(self, key: Side, value: Side) -> tuple[Tiers, Tiers]:
        """Of layers whose keys and values are grouped like these."""
        return tiers(self.key, key.width, most=True), tiers(self.value, value.width)


USUAL = Grade((1, 5, 12), (0, 2, 20), 1.0)
GRADES = (
    Grade((1, 0, 3), (0, 0, 4), 4.49),
    Grade((1, 2, 5), (0, 1, 7), 2.475),
    Grade((1, 3, 7), (0, 1, 10), 1.78),
    Grade((1, 4, 9), (0, 2, 17), 1.24),
    USUAL,
    Grade((2, 6, 14), (0, 4, 22), 0.675),
    Grade((2, 8, 13), (0, 7, 22), 0.51),
    Grade((3, 10, 16), (0, 12, 20), 0.3),
    Grade((4, 14, 14), (1, 18, 13), 0.16),
)


@dataclass(frozen=True)
class Profile:
    """How much a model suffers where the cache of one attention layer alone is compressed.

    ``loss`` holds the mean KL divergence from the dense model under ``USUAL``, in nats a token, for each layer in the order of
    the graph, ``coarse_loss`` under the cheapest grade, and None where a layer stays dense. Layers of one model differ by
    orders of magnitude, and losses of several layers nearly add up. ``fingerprint`` is of the model's weights.
    """

    kv_heads: int
    head_dim: int
    loss: tuple[float | None, ...]
    coarse_loss: tuple[float | None, ...]
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        both = self.loss, self.coarse_loss
        if any(type(count) is not int or count < 1 for count in (self.kv_heads, self.head_dim)):
            raise ValueError("a profile holds a number of KV heads and one of channels a head")
        if (
            any(not isinstance(losses, tuple) or len(losses) != len(self.loss) or not losses for losses in both)
            or any(type(x) not in (int, float) or not 0 <= x <= sys.float_info.max for x in chain(*map(_known, both)))
            or any((x is None) != (y is None) for x, y in zip(*both, strict=True))
            or not _known(self.loss)
        ):
            raise ValueError("a profile holds two finite losses, not negative, for each attention layer")
        if not isinstance(self.fingerprint, str | None):
            raise ValueError("the fingerprint in a profile is a text")

    def losses(self) -> list[list[float]]:
        """What each layer that does not stay dense is expected to lose at each grade."""
        both = zip(_known(self.loss), _known(self.coarse_loss), strict=True)
        return [[_loss(fine, coarse, grade.loss) for grade in GRADES] for fine, coarse in both]

    @classmethod
    def load(cls, source: str | Path | dict) -> Profile:
        """What ``save`` wrote to a file, the same as a dictionary, or a profile that comes with the package, by its name.

        A file goes before the name of a profile. ValueError where it is something else.
        """
        try:
            found = source if isinstance(source, dict) else json.loads(_read(source))
        except OSError as error:
            raise ValueError(f"cannot read the profile {source}: {error.strerror}") from None
        except (TypeError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or set(found) != {field.name for field in fields(cls)}:
            what = "this dictionary" if isinstance(source, dict) else source
            raise ValueError(f"{what} is no profile: write one with `spectral-compile calibrate`")
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write a file that the option ``profile`` takes."""
        write_whole(Path(path), json.dumps(asdict(self)).encode())

    def misfit(self, kv_heads: int, head_dim: int, layers: int) -> str | None:
        """Why this is not the profile of a model with ``layers`` attention layers like this, if so."""
        if (len(self.loss), self.kv_heads, self.head_dim) == (layers, kv_heads, head_dim):
            return None
        made = f"{len(self.loss)} layers of {self.kv_heads} KV heads with {self.head_dim} channels"
        return f"the profile is of another model, with {made}: write one for this model with `spectral-compile calibrate`"

    def apply(self, layout: Layout, layer: int) -> Layout:
        """``layout``, which every layer would have, with the tiers of this layer; as it is where the profile has none."""
        if self.loss[layer] is None:
            return layout
        place = len(_known(self.loss[:layer]))
        grade = GRADES[_allot(self, layout.k, layout.v)[place]]
        of_keys, of_values = grade.tiers(layout.k, layout.v)
        return replace(layout, key=of_keys, value=of_values)


def _known(losses: tuple[float | None, ...]) -> list[float]:
    return [x for x in losses if x is not None]


def shipped() -> dict[str, Traversable]:
    """The profiles that come with the package, by name."""
    files = importlib.resources.files("spectral_compile.profiles").iterdir()
    return {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}


def _read(source: str | Path) -> bytes:
    """What the file holds, or the profile of that name where there is no such file."""
    path = Path(source)
    if not path.exists() and (known := shipped().get(str(source))) is not None:
        return known.read_bytes()
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"{path} is larger than any profile")
    return content


def _loss(fine: float, coarse: float, usual: float) -> float:
    """The loss of a grade in one layer, of which two losses were measured: ``fine`` under ``USUAL``, ``coarse`` under the
    cheapest grade. ``usual`` is what this grade usually loses, where ``USUAL`` loses 1.

    Between the two it is interpolated on logarithmic scales; for finer grades than ``USUAL`` it is proportional to ``usual``.
    """
    if usual <= 1 or fine == 0:
        return fine * usual
    return fine * max(coarse / fine, 1.0) ** (math.log(usual) / math.log(GRADES[0].loss))


@functools.lru_cache(maxsize=16)
def _allot(profile: Profile, key: Side, value: Side) -> tuple[int, ...]:
    """The grade of each layer with losses: least in sum, with no more bytes than ``key`` and ``value`` in all of them.

    Lagrangian relaxation over each choice of ``_MOST`` grades: of all that a price of a byte makes best, the last that fits.
    """

    def rate(of_keys: Tiers, of_values: Tiers) -> float:
        sides = ((key, of_keys), (value, of_values))
        return sum(side.groups * (chosen.row_bytes + side.width * chosen.rank / _TOKENS) for side, chosen in sides)

    rates = [rate(*grade.tiers(key, value)) for grade in GRADES]
    losses = profile.losses()
    budget = rate(key.tiers, value.tiers) * len(losses)
    best, least = (0,) * len(losses), float("inf")
    for some in combinations(range(len(GRADES)), _MOST):
        low, high = 0.0, 1.0 + sum(map(max, losses))  # at the high price all layers have the cheapest grade
        for _ in range(_HALVINGS):
            price = (low * high) ** 0.5 if low else high / 2**30
            chosen = [min(some, key=lambda g: layer[g] + price * rates[g]) for layer in losses]
            if sum(rates[g] for g in chosen) > budget:
                low = price
                continue
            high = price
            loss = sum(layer[g] for layer, g in zip(losses, chosen, strict=True))
            if loss < least:
                best, least = tuple(chosen), loss
    return best
