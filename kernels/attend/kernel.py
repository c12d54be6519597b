"""Attention over a compressed past, in Triton.

The tokens of a row are split among programs. Most take coded tokens, in one of two forms: keys are scored in the latent, in a
warp's registers (``latent``), or a tile of codes times the basis gives keys, which are rotated and scored (``coded``). Values
stay in the latent until a split ends or, where one basis serves all tokens, until splits are merged. The others take what is
exact (``exact``): first tokens, recent ones and the chunk. A second kernel merges all of them by log-sum-exp (``merge``). In a
step of one column these two launches also store it: the first codes what is no longer recent, the second writes to the recent
tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from spectral_compile.errors import Mistake
from spectral_compile.kernels.append.kernel import Entering, enter, ledger_row, tiles_of
from spectral_compile.kernels.arguments import LEDGER_COLUMNS, ChunkArguments, Geometry
from spectral_compile.kernels.attend.coded import attend_coded, distances_of, key_basis
from spectral_compile.kernels.attend.exact import attend_exact, prefetch_exact
from spectral_compile.kernels.attend.latent import warp
from spectral_compile.kernels.attend.latent.kernel import attend_latent
from spectral_compile.kernels.attend.latent.opt_in import opt_in
from spectral_compile.kernels.attend.latent.plan import COLUMNS, QUARTETS, ROOM, LatentPlan, LatentTables, plan_of
from spectral_compile.kernels.attend.latent.recent import attend_recent
from spectral_compile.kernels.attend.merge import merge_kernel
from spectral_compile.kernels.attend.parts import LOG2E, Angles, Left, Masks, leave, own_tokens, queries_of
from spectral_compile.kernels.attend.plan import (
    USUAL,
    Arithmetic,
    AttendPlan,
    Form,
    MergePlan,
    ProgramSize,
    Rope,
    keys_in,
    places_left,
    tiles_at_once,
)
from spectral_compile.kernels.digits import as_loaded
from spectral_compile.kernels.rotary import TILE, tables
from spectral_compile.kernels.values import NOTHING_HIDDEN, Chunk, Hidden, Past, Scoring

# calls of this process by form, "latent" or "rebuilt"; the replay of a CUDA graph is none
taken: Counter[str] = Counter()


@triton.jit(do_not_specialize=["splits", "exact_splits", "exact_parts", "exact_from", "places", "slots", "coders"])
def attend_kernel(
    chunk, store, ledger, positions, masks, angles, entering, code_tiles, coders, left, splits, exact_splits, exact_parts,
    exact_from, n, first_tile, coded_slots, places, segments, slots, scale, tables,
    G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, F: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One split of the tokens of one group of KV heads, for M (query, head) pairs.

    The first ``splits`` programs, or as many for each quartet of queries, take coded tokens, those from ``exact_from`` on what
    is exact; some may take both.
    """
    split, tile, row_group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = row_group // G.groups, row_group % G.groups
    if L is not None:
        if tile == 0 and split >= exact_from:
            prefetch_exact(store, row_group, places, split - exact_from, exact_splits, G)
        T: tl.constexpr = 32 * L.warps
        RESERVE: tl.constexpr = L.reserve
        BYTES: tl.constexpr = L.room.bytes
        room = warp.room(tables.scratch, tl.arange(0, T), RESERVE, BYTES)
    ROWS: tl.constexpr = G.heads * G.query_heads
    M: tl.constexpr = F.queries
    PRECISION: tl.constexpr = A.precision
    QUARTETS: tl.constexpr = 1 if L is None else G.heads * L.quartets
    m = (first_tile + tile) * M + tl.arange(0, M)
    live = m < n * ROWS
    qi, qh = m // ROWS, m % ROWS
    head = qh // G.query_heads
    before, coded, after, _coded_after = ledger_row(ledger, b)
    own = tl.where(live, own_tokens(chunk, b, n, before, after, qi, live, F), -1)
    mask_row, visible_row, visible_codes = None, None, None
    if masks.mask is not None:
        mask_row = masks.mask + (b * n + qi) * masks.mask_slots
    if masks.visible is not None:
        visible_row = masks.visible + b * slots
        visible_codes = visible_row + G.first_exact

    q_row = chunk.query + b * chunk.query_strides.row + (g * ROWS + qh) * chunk.query_strides.head
    q_row += qi * chunk.query_strides.column
    scale = scale * LOG2E
    row_positions = positions + b * slots
    at = ((row_group.to(tl.int64) * tl.num_programs(1) + tile) * M + tl.arange(0, M)) * (splits + exact_parts)
    if not G.lossless and split < splits * QUARTETS:
        gaps = tl.load(ledger + b * LEDGER_COLUMNS + 5)
        low = 0
        if F.slides:
            low = tl.maximum(tl.min(tl.where(live, own, 2147483647)) - masks.sliding_window + 1 - G.first_exact, 0)
            low = low // F.tokens * F.tokens
        share = tl.cdiv(tl.cdiv(tl.maximum(coded - low, 0), F.tokens), splits) * F.tokens
        low += split // QUARTETS * share
        high = tl.minimum(low + share, coded)
        row_slots = row_positions + G.first_exact
        if L is not None:
            if tile == 0:
                attend_latent(
                    chunk, store, before, after, masks, tables, room, left, row_group, split % QUARTETS, low, high, n,
                    row_slots, gaps, coded_slots, slots, segments, splits + exact_parts, split // QUARTETS, scale, G, R, F, L,
                )  # fmt: skip
        else:
            # all that depends on nothing is on its way before anything is waited for
            queries = queries_of(q_row, live, angles.turns, scale, R.AT_ONCE, R.parts, G, R)
            distances = distances_of(angles.table, R, F)
            basis = ()
            if not F.in_segments:
                K: tl.constexpr = G.k
                own_keys = g % K.share * (G.heads * G.dim)
                basis = key_basis(store, b * K.groups + g // K.share, own_keys, G, R, A)
            distances = as_loaded(distances)
            if gaps == 0:
                sums, highest, total = attend_coded(
                    queries, distances, basis, head, live, own, low, high, b, g, store, row_slots, mask_row, visible_codes,
                    coded_slots, segments, masks.sliding_window, G, R, A, F, False,
                )  # fmt: skip
            else:
                sums, highest, total = attend_coded(
                    queries, distances, basis, head, live, own, low, high, b, g, store, row_slots, mask_row, visible_codes,
                    coded_slots, segments, masks.sliding_window, G, R, A, F, True,
                )  # fmt: skip
            leave(sums, highest, total, left, at + split, F)
    exact_split = split - exact_from
    if exact_split >= 0 and exact_split < exact_splits:
        at += splits
        if F.recent_apart:  # the last part is what is exact beside them, and a program that is alone takes both
            if tile == 0 and exact_split < exact_parts - 1:
                attend_recent(
                    chunk, store, before, coded, after, masks, angles.turns, room, left, row_group, n, row_positions, places,
                    slots, exact_split, exact_parts - 1, splits + exact_split, splits + exact_parts, scale, G, R, F, L,
                )  # fmt: skip
            if exact_split == exact_splits - 1:
                attend_exact(
                    q_row, head, live, own, 0, 1, b, g, n, before, coded, scale, chunk, store, row_positions, mask_row,
                    visible_row, angles.turns, coded_slots, places, masks.sliding_window, left, at + exact_parts - 1,
                    G, R, A, F,
                )  # fmt: skip
        else:
            attend_exact(
                q_row, head, live, own, exact_split, exact_splits, b, g, n, before, coded, scale, chunk, store, row_positions,
                mask_row, visible_row, angles.turns, coded_slots, places, masks.sliding_window, left, at + exact_split,
                G, R, A, F,
            )  # fmt: skip
        if F.enters and tile == 0:
            for job in range(exact_split, 2 * code_tiles * coders, exact_splits):
                append_tile, side = job // (2 * coders), job // coders % 2
                enter(append_tile, row_group, side, job % coders, coders, entering, entering.columns, entering.code_tiles,
                      entering.segments, G, True, False, True, PRECISION)  # fmt: skip


def attend(chunk: Chunk, past: Past, scoring: Scoring, hidden: Hidden = NOTHING_HIDDEN, enters: bool = False) -> torch.Tensor:
    """``reference.attend`` by kernels; nothing waits for the device, and the grid depends on shapes alone.

    A chunk of one column that ``enters`` the store does so in the same launches, as ``reference.append`` has it.
    """
    ledger, positions, buffers, layout = past
    (batch, q_heads, count, dim), dtype = chunk.query.shape, chunk.query.dtype
    valid = chunk.valid if count > 1 else None  # of one column the ledger says enough
    index = None if valid is None else valid.cumsum(1, dtype=torch.int32) - 1
    given, geometry = ChunkArguments.of(chunk, index), Geometry.of(layout, q_heads)
    rows, pairs = count * geometry.heads * geometry.query_heads, batch * layout.groups
    coded_slots, places = buffers.k_codes.shape[2], layout.first_exact + buffers.recent_slots(layout)
    device = chunk.query.device
    latent = latent_of(past, chunk)
    taken["latent" if latent else "rebuilt"] += 1
    size = USUAL
    if latent:
        size = ProgramSize(latent.resident, geometry.heads * latent.quartets, True, latent.recent is not None)
    plan = AttendPlan.of(layout, batch, rows, coded_slots, places + count, device, size)
    form = form_of(past, scoring, count, geometry, plan, latent)
    merge, merge_warps = MergePlan.of(plan, form, geometry.DIM, pairs * rows, device)
    rope, arithmetic = Rope.of(layout.rotary, dim), Arithmetic.of(dtype)

    mask = None if hidden.mask is None else over_tokens(hidden, chunk, positions.shape[1])
    masks = Masks(mask, hidden.visible, 0 if mask is None else mask.shape[2], scoring.sliding_window)
    angles = Angles(*tables(layout.rotary, chunk.query.device, keys_in(dtype)))
    store, code_tiles = in_halfwords(past), tiles_of(layout.block)
    segments = buffers.starts.shape[1]
    entering = Entering(given, buffers, ledger, coded_slots, places, count, code_tiles, segments) if enters else None
    out = chunk.query.new_empty(batch, count, q_heads, dim)
    tiles, tile = triton.cdiv(rows, plan.tile), plan.tile
    most = tiles if latent else tiles_at_once(plan, form, pairs)
    latent_tables, warps = None, plan.warps
    if latent is not None:
        plan = replace(plan, programs=plan.programs + plan.splits * (geometry.heads * latent.quartets - 1))
        latent_tables = LatentTables.of(layout, device, plan.programs * tiles * pairs * latent.room.bytes)
        warps = latent.warps
        if device.type == "cuda":
            opt_in(attend_kernel.__name__)
    for first in range(0, tiles, most):
        held = min(most, tiles - first)
        now = enters and first + held == tiles
        here, writes = form._replace(enters=now), entering if now else None
        sums = out.new_empty(pairs, held * tile, plan.splits + plan.exact_parts, form.left, dtype=torch.float32)
        left = Left(sums, *sums.new_empty(2, *sums.shape[:-1]))
        attend_kernel[(plan.programs, held, pairs)](
            given, store, ledger, positions, masks, angles, writes, code_tiles, plan.coders, left, plan.splits,
            plan.exact_splits, plan.exact_parts, plan.exact_from, count, first, coded_slots, places, segments,
            positions.shape[1], scoring.scale, latent_tables,
            G=geometry, R=rope, A=arithmetic, F=here, L=latent, num_warps=warps,
        )  # fmt: skip
        merged = min(held * tile, rows - first * tile)
        merge_kernel[(merged + 2 * now, pairs, geometry.DIM // merge.channels)](
            left, out, plan.splits, plan.exact_parts, count, first * tile, held * tile, merged, writes, code_tiles,
            buffers.v_basis, buffers.v_affine, scoring.sink_score,
            G=geometry, A=arithmetic, F=here, P=merge, num_warps=merge_warps,
        )  # fmt: skip
    return out.transpose(1, 2)


def latent_of(past: Past, chunk: Chunk) -> LatentPlan | None:
    """How the step scores keys in the latent, or None where it rebuilds them. ``Mistake`` where a plan asks and it cannot.

    Unasked it does so where that is faster: not where each segment has a basis, of which what is prepared takes longer than it
    saves, nor for many queries of a KV head, since each four take a program of their own.
    """
    asked = AttendPlan.asked()
    if asked.latent == 0:
        return None
    latent = plan_of(past, chunk, asked.warps, asked.stages)
    if asked.latent is None:
        return latent if latent and not past.layout.segment and latent.quartets <= QUARTETS else None
    if latent is None and chunk.columns <= COLUMNS and not past.layout.lossless:
        raise Mistake(
            "--plan latent=1 has no form for this step: it takes float16 or bfloat16, room for coded tokens by 32, and a"
            f" basis that leaves room in {ROOM >> 10} KB of shared memory"
        )
    return latent


def form_of(past: Past, scoring: Scoring, count: int, geometry: Geometry, plan: AttendPlan, latent: LatentPlan | None) -> Form:
    """What kind of step this is."""
    layout, segments = past.layout, past.buffers.starts.shape[1]
    # where one basis serves all tokens, its product with what values came to is left for the end
    few = COLUMNS if latent else 1
    latent_out = count <= few and segments == 1 and not layout.lossless
    left, places = places_left(layout, geometry.DIM, latent_out)
    return Form(
        one=count == 1,
        in_segments=segments > 1,
        slides=scoring.sliding_window > 0,
        enters=False,
        softcap=scoring.softcap * LOG2E.value,
        queries=plan.tile,
        tokens=TILE,
        exact_tokens=plan.exact_tile,
        stages=plan.stages,
        latent_out=latent_out,
        recent_apart=bool(plan.apart),
        left=left,
        places=places,
    )


def in_halfwords(past: Past) -> Any:
    """The buffers of a store, with codes as attention reads them."""
    buffers = past.buffers
    if past.layout.lossless:
        return buffers
    return buffers._replace(k_codes=buffers.k_codes.view(torch.int16), v_codes=buffers.v_codes.view(torch.int16))


def over_tokens(hidden: Hidden, chunk: Chunk, slots: int) -> torch.Tensor:
    """A mask over columns [B or 1, 1, n, columns] as one over tokens, uint8 [B, n, slots], in which padding is left out."""
    mask, columns, valid, count = hidden.mask, hidden.columns, chunk.valid, chunk.columns
    batch, past = columns.shape[0], mask.shape[-1] - count
    held = columns.new_ones(batch, mask.shape[-1])
    held[:, :past] = False  # a static cache has columns that no store has room for yet
    held[:, : min(past, columns.shape[1])] = columns[:, :past]
    if valid is not None:
        held[:, past:] = valid
    token = torch.where(held, held.cumsum(1) - 1, slots)  # padding goes to a slot that is cut off
    wide = torch.zeros(batch, count, slots + 1, dtype=torch.uint8, device=mask.device)
    given = mask[:, 0].expand(batch, -1, -1).to(torch.uint8)
    return wide.scatter_(2, token[:, None].expand_as(given), given)[..., :slots].contiguous()
