"""What is fixed about one layer's compressed cache: shapes, tiers, exact and recent tokens, and RoPE, in one hashable value."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tiers:
    """How many channels, from the largest eigenvalue down, are coded at 8, 4 and 2 bits; the others are dropped."""

    bits8: int
    bits4: int
    bits2: int

    @property
    def rank(self) -> int:
        return self.bits8 + self.bits4 + self.bits2

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's packed codes; each tier starts on a byte, and rows on a word of four, as a GPU copies them."""
        return -(-(self.bits8 + -(-self.bits4 // 2) + -(-self.bits2 // 4)) // 4) * 4


class Side(NamedTuple):
    """How keys, or values, are coded: ``heads`` KV heads jointly, in ``groups`` of ``width`` channels."""

    heads: int
    groups: int
    width: int
    tiers: Tiers


@dataclass(frozen=True)
class Rotary:
    """The rotation that stands between a stored key and the key that is attended to.

    ``frequencies`` are radians per position, one a pair; channels past ``2 * len(frequencies)`` are not rotated.
    Pairs are (i, i + len(frequencies)), or (2i, 2i + 1) when ``interleaved``. ``scaling`` multiplies rotated channels.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    scaling: float = 1.0

    @property
    def dim(self) -> int:
        return 2 * len(self.frequencies)


@dataclass(frozen=True)
class Layout:
    """The static geometry of one layer's store.

    Keys of ``key_group`` KV heads are coded jointly, and values of ``value_group``, of which one divides the other. Tokens are
    held as ``first_exact`` exact ones, then coded ones, then ``recent`` to ``recent + block - 1`` recent ones.
    Coding moves ``block`` tokens at a time, and starts when ``warmup`` tokens are there to compute a basis from. With
    ``segment`` > 0 every ``segment`` coded tokens get a basis of their own; with 0 a basis serves until it no longer captures
    new tokens.
    ``query_weighted`` counts key channels by their queries, ``token_weighted`` the tokens of a prompt by the attention they
    get, and ``normalised`` takes the norm out of each token's values. Steps are ``margin`` times those of least squared error.
    With ``recent_bits`` 8 a recent token is a byte a channel and one for each head; with 16 it is in the model's dtype.
    """

    kv_heads: int
    head_dim: int
    key_group: int
    value_group: int
    key: Tiers
    value: Tiers
    lossless: bool = False
    query_weighted: bool = True
    token_weighted: bool = True
    normalised: bool = True
    margin: float = 1.25  # clipped outliers hurt more than their energy says, and later tokens spread wider
    first_exact: int = 4
    recent: int = 64
    block: int = 8
    warmup: int = 1024
    segment: int = 0
    recent_bits: int = 16
    rotary: Rotary | None = None

    @functools.cached_property
    def k(self) -> Side:
        """How keys are coded."""
        return self._side(self.key_group, self.key)

    @functools.cached_property
    def v(self) -> Side:
        """How values are coded."""
        return self._side(self.value_group, self.value)

    def _side(self, heads: int, tiers: Tiers) -> Side:
        return Side(heads, self.kv_heads // heads, heads * self.head_dim, tiers)

    @property
    def heads(self) -> int:
        """KV heads that are attended to at a time: no group of keys or of values is smaller."""
        return min(self.key_group, self.value_group)

    @property
    def groups(self) -> int:
        """How many times so many heads there are."""
        return self.kv_heads // self.heads

    @property
    def first(self) -> int:
        """How many tokens a row waits for until its first basis is computed and its first blocks are coded."""
        return max(self.warmup, self.block)

    def spec(self) -> str:
        """This layout as a string: the form in which it is an argument of an operation, and a key of compile caches."""
        return json.dumps(asdict(self), separators=(",", ":"))

    def __deepcopy__(self, memo: dict[int, object]) -> Layout:
        return self  # so that what Dynamo keeps for its guards is equal by identity

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(spec: str) -> Layout:
        """The layout that ``spec()`` wrote down."""
        fields = json.loads(spec)
        fields["key"], fields["value"] = Tiers(**fields["key"]), Tiers(**fields["value"])
        if (rotary := fields["rotary"]) is not None:
            fields["rotary"] = Rotary(**{**rotary, "frequencies": tuple(rotary["frequencies"])})
        return Layout(**fields)
