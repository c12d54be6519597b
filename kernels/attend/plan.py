"""How attention over a store is shared out and computed: splits, tiles and number formats."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Layout, Rotary
from spectral_compile.errors import Mistake
from spectral_compile.kernels.append.kernel import tiles_of
from spectral_compile.kernels.arguments import LEAST
from spectral_compile.kernels.digits import INTERPRETED, PACKED, row_fields, scaled, unpack
from spectral_compile.kernels.rotary import TILE

_PAIRS = 32  # RoPE pairs of keys that are in registers at a time
_MULTIPROCESSORS = 132  # of an H100 or H200: what programs are planned for where there is no GPU
_PASS = 2  # tiles of codes that take a program as long as a tile of what is exact, if it takes both
_CODERS = 3  # programs that share the coding of a tile
_SCRATCH = 1 << 24  # numbers that the splits of one launch may leave for the merge
_MERGES = 16  # programs of one warp that a multiprocessor runs at once, at least
_MERGED = 1 << 12  # and that one warp of the merge holds at a time

# Turn two pairs in float16; what Triton makes of the same arithmetic takes twice as many instructions.
_ROTATE = """{ .reg .b32 t, n, z;
    mov.b32 z, 0x80008000; neg.f16x2 n, $5;
    fma.rn.f16x2 t, $3, n, z; fma.rn.f16x2 $0, $2, $4, t;
    fma.rn.f16x2 t, $2, $5, z; fma.rn.f16x2 $1, $3, $4, t; }"""

_overrides: dict[str, Any] = {}


class Rope(NamedTuple):
    """RoPE as kernels are compiled for it. Names in capitals are padded to a power of two."""

    pairs: int
    PAIRS: int
    AT_ONCE: int  # pairs that are in registers at a time
    parts: int  # of the pairs, of ``AT_ONCE`` each
    REST: int  # channels that are not rotated, 0 where there are none
    interleaved: bool
    scaling: float

    @classmethod
    def of(cls, rotary: Rotary | None, dim: int) -> Rope:
        pairs = rotary.dim // 2 if rotary else 0
        padded, rest = max(LEAST, triton.next_power_of_2(max(pairs, 1))), dim - 2 * pairs
        return cls(
            pairs=pairs,
            PAIRS=padded,
            AT_ONCE=min(_PAIRS, padded),
            parts=-(-pairs // _PAIRS),
            REST=max(LEAST, triton.next_power_of_2(rest)) if rest else 0,
            interleaved=bool(rotary and rotary.interleaved),
            scaling=rotary.scaling if rotary else 1.0,
        )


class Arithmetic(NamedTuple):
    """The types that attention computes in, and the instructions that make them of codes, None where Triton's own must do."""

    dtype: tl.dtype  # of queries, and of what is exact
    of_keys: tl.dtype  # of coded keys
    of_weights: tl.dtype  # of what coded values are times
    precision: str  # of products in float32
    scaled: str | None
    keys_scaled: str | None
    unpack_keys: tuple[str, str, str] | None
    unpack_values: tuple[str, str, str] | None
    rotate: str | None

    @classmethod
    @functools.cache
    def of(cls, dtype: torch.dtype) -> Arithmetic:
        """For a model in ``dtype``."""
        # weights may be as far from 1 as scores from their reference, for which float16 has no exponents
        weights, keys = dtype, keys_in(dtype)
        if dtype == torch.float16:
            weights = torch.float32 if INTERPRETED.value else torch.bfloat16  # of which the interpreter makes no products
        return cls(
            dtype=_TRITON[dtype],
            of_keys=_TRITON[keys],
            of_weights=_TRITON[weights],
            precision="tf32x3" if dtype == torch.float32 else "tf32",
            scaled=scaled(dtype),
            keys_scaled=scaled(keys),
            unpack_keys=unpack(keys),
            unpack_values=unpack(weights),
            rotate=_ROTATE if keys in PACKED else None,
        )


class ProgramSize(NamedTuple):
    """What the programs that take coded tokens ask for."""

    resident: int = 2  # that a multiprocessor runs at once
    each: int = 1  # programs that one split of them takes
    quick: bool = False  # they take a tile of codes in a third of the time of a tile of what is exact
    apart: bool = False  # and recent tokens as quickly


USUAL = ProgramSize()


@dataclass(frozen=True)
class AttendPlan:
    """How one call is shared out among programs.

    ``splits`` of the coded tokens and ``exact_splits`` of what is exact go to ``programs`` programs for each tile of ``tile``
    (query, head) pairs: the first ``splits`` ones take codes, the last ``exact_splits`` ones what is exact, some perhaps both.
    """

    tile: int
    splits: int
    exact_splits: int
    programs: int
    exact_tile: int  # tokens of what is exact that are taken at a time
    coders: int  # programs that share the coding of a tile
    stages: int = 3
    warps: int = 4
    apart: int = 0  # 1 leaves recent tokens in parts of their own, and the last part to first tokens and the chunk
    latent: int | None = None  # 1 scores keys in the latent, 0 rebuilds them; None: see ``kernel.latent_of``

    @classmethod
    def of(
        cls, layout: Layout, batch: int, rows: int, coded: int, exact: int, device: torch.device, size: ProgramSize = USUAL
    ) -> AttendPlan:
        """For ``rows`` (query, head) pairs of a group, and room for ``coded`` and ``exact`` tokens."""
        wide = max(layout.k.width, layout.v.width) > 192  # whose bases leave too little shared memory for more queries
        tile = 16 if rows <= 16 else 32 if rows <= 32 or wide else 64
        others = batch * layout.groups * triton.cdiv(rows, tile)
        # of more than run at once the last ones would wait for the first to end
        most = max(1 if size.quick else 2, size.resident * multiprocessors(device) // others)
        # of few queries what takes time is to fetch instructions, of which a small tile needs fewer
        exact_tile = TILE if layout.lossless or (tile > LEAST and not size.apart) else TILE // 4
        tiles, exact_tiles = triton.cdiv(coded, TILE), triton.cdiv(exact, exact_tile)
        if layout.lossless:
            splits, exact_splits = 0, min(triton.cdiv(exact + coded, 2 * TILE), most)
            programs = exact_splits
        else:
            # a program that takes what is exact has the time of several tiles of codes if others have many
            share = min(2 * TILE, coded // (8 * most)) // exact_tile
            pass_cost = _PASS * triton.cdiv(exact_tiles, most)
            if size.apart:
                exact_tiles = 1 + triton.cdiv(exact, TILE)  # the first is what is not recent
                share = min(1 + tiles // (3 * most), exact_tiles - 1)
                pass_cost = 2 * (1 + triton.cdiv(exact_tiles, most))
            elif size.quick:
                # the first tiles of what is exact while others make their basis ready, the next ones in the time of three
                share = min(3 + tiles // (3 * most), triton.cdiv(exact_tiles, 2))
                pass_cost = 3 * (1 + triton.cdiv(exact_tiles, most))
            exact_splits = min(triton.cdiv(exact_tiles, max(1, share)), max(1, most // 4))
            splits = min(tiles, max(1, (most - exact_splits) // size.each))
            programs, shared = splits + exact_splits, max(1, most // size.each)
            saved = triton.cdiv(tiles, splits) - triton.cdiv(tiles, shared) if tiles else 0
            if tiles and (splits * size.each + exact_splits > most or saved > pass_cost):
                splits = programs = shared
                exact_splits = min(exact_tiles, shared)
        # alone, a program takes longer to code a tile than to attend
        coders = 1 if layout.lossless else max(1, min(_CODERS, exact_splits // (2 * tiles_of(layout.block))))
        made = cls(tile, splits, exact_splits, programs, exact_tile, coders, apart=int(size.apart))
        return made._overridden(layout.lossless)

    @classmethod
    def asked(cls) -> AttendPlan:
        """What is the same for every step."""
        fixed = ("stages", "warps", "latent")
        return replace(cls(0, 0, 0, 0, 0, 0), **{name: x for name, x in _overrides.items() if name in fixed})

    def _overridden(self, lossless: bool) -> AttendPlan:
        if not _overrides:
            return self
        plan = replace(self, **_overrides)
        if lossless:
            plan = replace(plan, splits=0)  # nothing is coded
        if _overrides.keys() & {"splits", "exact_splits"} and "programs" not in _overrides:
            plan = replace(plan, programs=plan.splits + plan.exact_splits)
        if plan.programs < max(plan.splits, plan.exact_splits):
            raise Mistake(f"--plan programs must be at least {max(plan.splits, plan.exact_splits)}, not {plan.programs}")
        return plan

    @property
    def exact_parts(self) -> int:
        """What the programs that take what is exact leave for the merge; where recent tokens are apart, one may leave two."""
        return max(2, self.exact_splits) if self.apart else self.exact_splits

    @property
    def exact_from(self) -> int:
        """The first program that takes what is exact."""
        return self.programs - self.exact_splits


class Form(NamedTuple):
    """What kind of step this is, as the kernels are compiled for it."""

    one: bool  # column
    in_segments: bool  # the store may have several bases
    slides: bool
    enters: bool  # the store, in the same launches
    softcap: float  # of scores in powers of two
    queries: int  # (query, head) pairs of a tile
    tokens: int  # of a tile of codes
    exact_tokens: int  # of a tile of what is exact
    stages: int
    latent_out: bool  # splits leave values in the latent, and the merge multiplies them with the one basis
    recent_apart: bool  # programs take recent tokens apart from all else that is exact
    left: int  # numbers that a split leaves for each (query, head) pair
    places: tuple[int, ...]  # where among these each row field begins


class MergePlan(NamedTuple):
    """How the merge is shared out. Names in capitals are padded to a power of two."""

    channels: int  # that a program takes
    SPLITS: int
    EXACT: int
    ALL: int  # splits of both kinds
    AT_ONCE: int  # splits of codes that are in registers

    @classmethod
    def of(cls, plan: AttendPlan, form: Form, padded_dim: int, queries: int, device: torch.device) -> tuple[MergePlan, int]:
        """The plan for ``queries`` of all rows and heads, and the warps of a program; one warp has no barriers to wait at."""
        channels, warps = (min(8, padded_dim), 1) if form.latent_out else (padded_dim, 4)
        # each program reads all that splits have left, so no more share a query than the device runs at once
        most = _MERGES * multiprocessors(device) // padded_dim
        while form.latent_out and channels < min(32, padded_dim) and queries > most * channels:
            channels *= 2
        splits = triton.next_power_of_2(max(1, plan.splits))
        widths = (end - begin for begin, end in pairwise(form.places))  # of row fields, of which there are none otherwise
        widest = triton.next_power_of_2(max(widths, default=channels))
        made = cls(
            channels=channels,
            SPLITS=splits,
            EXACT=triton.next_power_of_2(max(1, plan.exact_parts)),
            ALL=triton.next_power_of_2(plan.splits + plan.exact_parts),
            AT_ONCE=min(splits, warps * _MERGED // widest),
        )
        return made, warps


def places_left(layout: Layout, padded_dim: int, latent_out: bool) -> tuple[int, tuple[int, ...]]:
    """``Form.left`` and ``Form.places``."""
    widths = [field.digits for field in row_fields(layout.value)] if latent_out else []
    places = tuple(accumulate(widths, initial=0))
    return max(padded_dim, places[-1]), places


def tiles_at_once(plan: AttendPlan, form: Form, pairs: int) -> int:
    """Tiles of queries that one launch takes, of ``pairs`` (row, group) pairs."""
    return max(1, _SCRATCH // (pairs * plan.tile * (plan.splits + plan.exact_parts) * form.left))


def keys_in(dtype: torch.dtype) -> torch.dtype:
    """What coded keys are computed in: float16, which is more exact than bfloat16, for any model of 16 bits."""
    return torch.float32 if dtype == torch.float32 else torch.float16


_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; of an H200 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS


def override(values: Mapping[str, Any]) -> None:
    """Plan every later call of this process with these fields of ``AttendPlan``, such as ``{"splits": 64}``.

    ``Mistake`` for a field that it has not, and for a value that it cannot have.
    """
    known = [field.name for field in fields(AttendPlan) if field.name != "apart"]
    for name, value in values.items():
        if name not in known:
            raise Mistake(f"--plan knows no {name!r}: it has {', '.join(known)}")
        least = 0 if name == "latent" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise Mistake(f"--plan {name} must be an integer of at least {least}, not {value!r}")
        if name in ("tile", "exact_tile") and value not in (16, 32, 64):
            raise Mistake(f"--plan {name} must be 16, 32 or 64, not {value}")
        if name == "latent" and value > 1:
            raise Mistake(f"--plan latent must be 0 or 1, not {value}")
        if name == "warps" and value not in (1, 2, 4, 8, 16):
            raise Mistake(f"--plan warps must be 1, 2, 4, 8 or 16, not {value}")
    _overrides.clear()
    _overrides.update(values)
