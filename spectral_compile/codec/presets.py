"""Named points on the curve of size against fidelity, and how one becomes the layout of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..errors import Mistake
from .layout import Layout, Rotary, Tiers

# channels that are coded jointly at most: attention rebuilds each key from all codes of its group, so wider ones are slower
_JOINT_WIDTH = 192


def tiers(in_32ths: tuple[int, int, int], width: int, most: bool = False) -> Tiers:
    """Channels at 8, 4 and 2 bits in a group of ``width`` channels, given in 32ths of it.

    Rows of codes are whole words of four bytes: the nearest number of them, or where ``most`` the next larger one.
    """
    # The running sums are rounded down, and not each tier by itself, so that the total is at most the width.
    ends = [width * sum(in_32ths[:count]) // 32 for count in range(4)]
    bits8, bits4, bits2 = (end - start for start, end in pairwise(ends))
    if bits2:  # a GPU copies words of four bytes: the 2-bit tier is rounded to whole words, if there are channels for it
        fixed = bits8 + -(-bits4 // 2)
        row, begin = max(fixed // 4 + 1, (fixed + -(-bits2 // 4) + (3 if most else 2)) // 4), (fixed + 2) // 4
        if bits8 < 4 * begin < 4 * row:
            bits4, fixed = 2 * (4 * begin - bits8), 4 * begin
        bits2 = min(4 * (4 * row - fixed), width - bits8 - bits4)
    return Tiers(bits8, bits4, bits2)


def largest_group(kv_heads: int, head_dim: int, channels: int) -> int:
    """The most heads that have up to ``channels`` together and divide the KV heads evenly; 1 where no head is so narrow."""
    fitting = (size for size in range(kv_heads, 0, -1) if kv_heads % size == 0 and size * head_dim <= channels)
    return next(fitting, 1)


@dataclass(frozen=True)
class Preset:
    """A codec without a model: tiers are channels at (8, 4, 2) bits in 32ths of the width; the rest is as in ``Layout``.

    ``key_group`` and ``value_group`` None take as many heads together as fit 192 channels and divide the KV heads evenly.
    """

    key: tuple[int, int, int]
    value: tuple[int, int, int]
    key_group: int | None = None
    value_group: int | None = None
    lossless: bool = False
    query_weighted: bool = True
    token_weighted: bool = True
    normalised: bool = True
    margin: float = 1.25
    first_exact: int = 4
    recent: int = 64
    block: int = 8
    warmup: int = 1024
    segment: int = 0
    recent_bits: int = 16

    def layout(self, kv_heads: int, head_dim: int, rotary: Rotary | None = None) -> Layout:
        """The layout of a layer with ``kv_heads`` heads of ``head_dim`` channels."""
        joint = largest_group(kv_heads, head_dim, _JOINT_WIDTH)
        key_group, value_group = self.key_group or joint, self.value_group or joint
        for name, heads in (("key_group", key_group), ("value_group", value_group)):
            if kv_heads % heads:
                name = "head_group" if key_group == value_group else name
                raise Mistake(f"{name}={heads} does not divide the {kv_heads} KV heads")
        if max(key_group, value_group) % min(key_group, value_group):
            raise Mistake(f"of key_group={key_group} and value_group={value_group} one must divide the other")
        sides = {"key": tiers(self.key, key_group * head_dim, most=True), "value": tiers(self.value, value_group * head_dim)}
        groups = {"key_group": key_group, "value_group": value_group}
        return Layout(**vars(self) | sides | groups, kv_heads=kv_heads, head_dim=head_dim, rotary=rotary)


PRESETS: dict[str, Preset] = {
    "exact": Preset(
        key=(0, 0, 0), value=(0, 0, 0), lossless=True, query_weighted=False, token_weighted=False, normalised=False
    ),
    "quality": Preset(key=(2, 6, 12), value=(0, 4, 22), recent=248, recent_bits=8),
    "balanced": Preset(key=(1, 3, 7), value=(0, 2, 17), recent=216, recent_bits=8),
    "compact": Preset(key=(1, 2, 5), value=(0, 1, 7), recent=104, recent_bits=8),
    "seed": Preset(
        key=(8, 0, 0),
        value=(16, 0, 0),
        key_group=1,
        value_group=1,
        query_weighted=False,
        token_weighted=False,
        normalised=False,
        block=512,
        warmup=512,
        segment=512,
    ),
}
