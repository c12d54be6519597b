"""How attention in a warp's registers is laid out: registers, shared memory and the tables that it reads."""

from __future__ import annotations

import functools
from itertools import product
from typing import NamedTuple

import torch
import triton

from spectral_compile.codec.layout import Layout, Tiers
from spectral_compile.kernels.attend.latent import warp
from spectral_compile.kernels.attend.latent.expansion import EIGHT, STRETCH, Expansion, ExpansionTables, Steps
from spectral_compile.kernels.attend.latent.expansion import tables as expansion_tables
from spectral_compile.kernels.attend.latent.registers import (
    KeySource,
    LeftRegister,
    ValueGroup,
    ValueTable,
    constant_at,
    key_sources,
    key_table,
    left_registers,
    value_groups,
    value_registers,
    value_table,
)
from spectral_compile.kernels.digits import HALFWORDS, INTERPRETED
from spectral_compile.kernels.values import Chunk, Past

QUERIES = 4  # of a quartet
QUARTETS = 2  # of a KV head, up to which it is faster than to rebuild keys
ALIGNED = 1024  # bytes, of operands in shared memory that lie as wgmma reads them (PTX ISA, "Shared Memory Matrix Layout")
ROOM = 48 << 10  # bytes of shared memory that a program may reserve by name on any GPU
RESIDENT = 8  # warps of as many registers as one may have, on a multiprocessor
SIXTEEN = 16  # recent tokens of a warp at a time
COLUMNS = 8  # of a chunk, at most: to more queries it pays to rebuild keys


class Room(NamedTuple):
    """How the shared memory of a program is shared out, in bytes from its beginning: a basis, queries, tables, codes."""

    pitch: int  # of a row of it: eight rows begin at eight different banks
    queries: int
    digits: int  # what is known of each digit of a key
    steps: int  # where the tables of a run's stretches are, if they are there
    queues: int
    queue: int  # of a warp
    stages: int  # of a queue
    bytes: int

    @classmethod
    def of(cls, eights: int, stages: int, registers: int, warps: int, stage: int, step_bytes: int, left: int) -> Room:
        pitch, queue = 32 * eights + 16, stages * stage
        queries = -(-8 * registers * pitch // 128) * 128
        digits = queries + max(warps * QUERIES * 32 * eights, 160 * left)  # and what a segment's values came to
        steps = digits + 16 * 8 * registers
        queues = steps + step_bytes
        return cls(pitch, queries, digits, steps, queues, queue, stages, _whole(queues + warps * queue))


class Slices(NamedTuple):
    """Each warp's share of a program's shared memory, in bytes: where the first begins, and its size."""

    queues: int
    queue: int


class RecentPlan(NamedTuple):
    """What is fixed about recent tokens in bytes; members that ``LatentPlan`` has, too, mean the same."""

    turned: int  # eights of pairs that RoPE turns
    others: int  # and that it does not
    row: int  # bytes of a token in shared memory: they begin at different banks
    quartets: int
    groups: tuple[ValueGroup, ...]
    value_registers: int
    left: tuple[LeftRegister, ...]
    warps: int
    room: Slices

    @classmethod
    def of(cls, layout: Layout, quartets: int, warps: int, count: int) -> RecentPlan | None:
        """In ``count`` bytes of shared memory; None where tokens are not in bytes, or do not come in eights of pairs."""
        pairs = layout.rotary.dim // 2 if layout.rotary else 0
        row, others, tiers = layout.head_dim + 16, layout.head_dim - 2 * pairs, Tiers(layout.head_dim, 0, 0)
        if layout.recent_bits != 8 or pairs % EIGHT or others % 16 or 2 * SIXTEEN * row * warps > count:
            return None
        groups = value_groups(tiers)
        left = tuple(
            LeftRegister(group.first + 2 * i, 0, True, group.byte + i, 0, HALFWORDS, 128.0, 2)
            for group, i in product(groups, range(2))
        )
        slices = Slices(0, 2 * SIXTEEN * row)
        return cls(pairs // EIGHT, others // 16, row, quartets, groups, value_registers(tiers), left, warps, slices)


def _whole(count: int) -> int:
    """``count`` bytes rounded up, so that what Triton has beside them begins where Hopper's products of four warps want it.

    They find operands by bits of the address: where these began elsewhere, of 64 exact tokens every sum was wrong.
    """
    return -(-count // ALIGNED) * ALIGNED


class LatentPlan(NamedTuple):
    """What is fixed about attention in a warp's registers, as kernels are compiled for it."""

    quartets: int  # of queries of a KV head
    sources: tuple[KeySource, ...]
    registers: int  # of digits of keys
    constant: int  # where among the digits the constant stands
    groups: tuple[ValueGroup, ...]
    value_registers: int
    left: tuple[LeftRegister, ...]
    fast: int  # eights of pairs
    medium: int
    slow: int
    full: bool  # each place of a pair has both of its channels
    between: int  # channels from one pair to the next, where all pairs are as the head has them; else 0, and a table says
    apart: int  # and between the two of a pair
    columns: int  # lanes that take a row of the basis
    steps: Steps
    steps_held: bool  # whether they are in shared memory
    warps: int
    stage: int  # bytes of the codes of 32 tokens
    room: Room
    reserve: str
    all_but: str  # what waits for the codes that are next
    all_but_fetched: str  # and for what has been copied before the first of a run's
    recent: RecentPlan | None  # None where recent tokens are attended to as all that is exact

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor has registers for."""
        return RESIDENT // self.warps

    @classmethod
    @functools.cache
    def of(cls, layout: Layout, queries: int, warps: int, stages: int) -> LatentPlan:
        """For ``queries`` (query, head) pairs of a KV head, with fewer ``stages`` where there is no room for so many."""
        expansion = Expansion.of(layout.rotary, layout.head_dim)
        sources, groups = key_sources(layout.key), value_groups(layout.value)
        registers = sum(len(source.masks) for source in sources)
        fast, medium, slow = (count // EIGHT for count in (expansion.fast, expansion.medium, expansion.slow))
        stage = STRETCH * (layout.key.row_bytes + layout.value.row_bytes + 1)
        steps, eights, left = Steps.of(fast, medium), fast + medium + slow, left_registers(layout.value)
        choices = product((4 * steps.all_words, 0), (stages, 2))  # tables of stretches come from L2 where they must
        sized = [Room.of(eights, s, registers, warps, stage, held, len(left)) for held, s in choices]
        between, apart = _spaced(expansion)
        room = next((room for room in sized if room.bytes <= ROOM), sized[-1])
        quartets = -(-queries // QUERIES)
        return cls(
            quartets=quartets,
            sources=sources,
            registers=registers,
            constant=constant_at(layout.key),
            groups=groups,
            value_registers=value_registers(layout.value),
            left=left,
            fast=fast,
            medium=medium,
            slow=slow,
            columns=min(warp.LANES.value * warps, triton.next_power_of_2(8 * eights)),
            between=between,
            apart=apart,
            full=all(first >= 0 and second >= 0 for first, second, _ in expansion.pairs),
            steps=steps,
            steps_held=room.queues > room.steps,
            warps=warps,
            stage=stage,
            room=room,
            reserve=warp.reserve(room.bytes),
            all_but=warp.all_but(room.stages - 2),
            all_but_fetched=warp.all_but(room.stages - 1),
            recent=RecentPlan.of(layout, quartets, warps, room.bytes),
        )


def _spaced(expansion: Expansion) -> tuple[int, int]:
    """``LatentPlan.between`` and ``apart``."""
    (first, second, _), count = expansion.pairs[0], len(expansion.pairs)
    between = 2 if second == first + 1 else 1
    apart = second - first
    spaced = all(pair[:2] == (between * i, between * i + apart) for i, pair in enumerate(expansion.pairs))
    return (between, apart) if spaced and count > 1 else (0, 0)


class LatentTables(NamedTuple):
    """What the kernel reads that is neither the store's nor the step's."""

    of_pairs: ExpansionTables
    of_keys: torch.Tensor  # of ``key_table``
    of_values: ValueTable
    scratch: torch.Tensor | None  # the interpreter's shared memory, uint8 [programs, bytes]

    @classmethod
    def of(cls, layout: Layout, device: torch.device, count: int) -> LatentTables:
        """``count`` bytes of shared memory in all, where there is none."""
        scratch = torch.empty(count, dtype=torch.uint8, device=device) if INTERPRETED.value else None
        pairs = expansion_tables(layout.rotary, layout.head_dim, device)
        keys, values = key_table(layout.key, device), value_table(layout.value, device)
        return cls(pairs, keys, values, scratch)


def plan_of(past: Past, chunk: Chunk, warps: int, stages: int) -> LatentPlan | None:
    """How a step is attended to in this form; None where it is not.

    Not in float32, of which products take as many instructions again, nor where a basis has no room: heads of 256 channels took
    twice as long as rebuilt keys when each run made it ready in turns.
    """
    buffers, layout = past.buffers, past.layout
    if layout.lossless or chunk.columns > COLUMNS or chunk.query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if buffers.k_codes.shape[2] % STRETCH:  # tokens whose codes are copied at a time
        return None
    queries = chunk.columns * chunk.query.shape[1] // layout.kv_heads
    latent = LatentPlan.of(layout, queries, warps, stages)
    return latent if latent.room.bytes <= ROOM else None
