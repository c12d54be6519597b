"""A chunk enters one layer's store, in PyTorch: the truth that the kernels are held against."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spectral_compile import codec
from spectral_compile.codec.layout import Layout, Side, Tiers
from spectral_compile.kernels import dense
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.kernels.ledger import rows_of
from spectral_compile.kernels.values import Chunk

_AT_ONCE = 1024  # tokens that are coded at a time, which bounds what the prefill needs beside its own activations


def append(
    chunk: Chunk, ledger: torch.Tensor, buffers: Buffers, layout: Layout, token_weight: torch.Tensor | None = None
) -> None:
    """Store one chunk: its first tokens and recent ones as they are, and code what falls out of the recent ones.

    ``token_weight`` float32 [B, layout.groups, n] counts in the bases of a prompt (see ``codec.token_scale``), the first tokens
    of a store.
    ``ledger`` has been advanced. With n = 0 only what is due is coded, out of the recent tokens; with n = 1 no basis is
    computed.
    """
    for row in range(len(ledger)):
        q = chunk.query[row] if chunk.valid is None else chunk.query[row][:, chunk.valid[row]]
        squares = (part.float().square().sum(1) for part in q.split(_heads_at_once(q)))
        buffers.moment[row] += torch.cat(list(squares)).unflatten(0, (layout.kv_heads, -1)).sum(1)
    enter(chunk, ledger, buffers, layout, token_weight)


def enter(
    chunk: Chunk, ledger: torch.Tensor, buffers: Buffers, layout: Layout, token_weight: torch.Tensor | None = None
) -> None:
    """``append`` but for the queries, which have been summed up."""
    _, key, value, valid = chunk
    may_fit = chunk.columns != 1
    first_exact = layout.first_exact
    for row, (before, coded, after, coded_after, *_) in enumerate(rows_of(ledger)):
        k, v = key[row], value[row]
        if valid is not None:
            k, v = k[:, valid[row]], v[:, valid[row]]
        k_exact, v_exact = buffers.k_exact[row], buffers.v_exact[row]
        in_first = min(max(first_exact - before, 0), after - before)
        k_exact[:, before : before + in_first] = k[:, :in_first]
        v_exact[:, before : before + in_first] = v[:, :in_first]
        first = max(before - first_exact, 0)  # slot of the first new token past the first_exact
        if coded_after > coded:
            held = torch.arange(coded, min(max(first, coded), coded_after), device=k.device)
            fresh = slice(in_first, in_first + coded_after - coded - len(held))
            key_tail, value_tail = (
                torch.cat((dense.recent(row, side, held, buffers, layout), new[:, fresh]), 1) if len(held) else new[:, fresh]
                for side, new in (("k", k), ("v", v))
            )
            weights = None
            if token_weight is not None:
                weights = (token_weight[row] if valid is None else token_weight[row][:, valid[row]])[:, fresh]
            _code(row, coded, key_tail, value_tail, weights, buffers, layout, may_fit)
        slots = torch.arange(max(first, coded_after), max(after - first_exact, 0), device=k.device)
        for side, new in (("k", k), ("v", v)):
            _keep(row, side, slots, new[:, slots - first + in_first], buffers, layout)


def _heads_at_once(query: torch.Tensor) -> int:
    """How many heads of queries [Hq, n, D], which are large, are copied at a time: those of ``_AT_ONCE`` tokens, or one."""
    return max(1, _AT_ONCE // max(1, query.shape[1]))


def _keep(row: int, side: str, slots: torch.Tensor, x: torch.Tensor, buffers: Buffers, layout: Layout) -> None:
    """Write tokens [H, n, D] to their places among the recent ones."""
    place = slots % buffers.recent_slots(layout)
    if layout.recent_bits != 8:
        getattr(buffers, f"{side}_exact")[row][:, layout.first_exact + place] = x
        return
    codes, sizes = codec.recent_code(x)
    getattr(buffers, f"{side}_recent")[row][:, place] = codes
    getattr(buffers, f"{side}_sizes")[row][:, place] = sizes


def _code(
    row: int,
    start: int,
    key: torch.Tensor,
    value: torch.Tensor,
    token_weight: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
    may_fit: bool,
) -> None:
    """Code tokens [H, n, D] of one row, of weights [G, n], into the slots from ``start`` on."""
    if layout.lossless:
        span = slice(start, start + key.shape[1])
        buffers.k_codes[row, :, span], buffers.v_codes[row, :, span] = dense.group(key, layout.k), dense.group(value, layout.v)
        return
    k_weight, v_weight = (buffers.moment.new_ones(side.groups, side.width) for side in (layout.k, layout.v))
    k_scale = v_scale = None
    if layout.query_weighted:
        k_weight = codec.key_weight(buffers.moment[row], layout.rotary).reshape(k_weight.shape)
    if layout.token_weighted and token_weight is not None:
        k_scale, v_scale = (codec.token_scale(over_side(token_weight, side)) for side in (layout.k, layout.v))
    length = layout.segment or key.shape[1]
    for at in range(0, key.shape[1], length):
        part = slice(at, at + length)
        slots = slice(start + at, start + at + length)
        sides = (
            _Side(dense.group(key[:, part], layout.k).float(), k_weight, *_coded("k", row, buffers), layout.key,
                  None if k_scale is None else k_scale[:, part]),
            _Side(_normalised(row, slots, dense.group(value[:, part], layout.v).float(), buffers, layout), v_weight,
                  *_coded("v", row, buffers), layout.value, None if v_scale is None else v_scale[:, part]),
        )  # fmt: skip
        segment = _segment(row, start + at, sides, buffers, layout, may_fit)
        for side in sides:
            for tokens in torch.arange(side.x.shape[1]).split(_AT_ONCE):
                here = slice(int(tokens[0]), int(tokens[-1]) + 1)
                codes = codec.encode(side.x[:, here], side.basis[:, segment], side.affine[:, segment], side.tiers)
                side.codes[:, slots.start + here.start : slots.start + here.stop] = codes


def over_side(token_weight: torch.Tensor, side: Side) -> torch.Tensor:
    """Token weights [..., G, n] of the groups that are attended to at a time as those of the groups of one side."""
    of_groups = token_weight.unflatten(-2, (side.groups, -1))
    return of_groups.mean(-2) if of_groups.shape[-2] > 1 else token_weight


class _Side(NamedTuple):
    """Keys or values [G, n, W] of one row that are to be coded, and where their codes go."""

    x: torch.Tensor
    weight: torch.Tensor
    codes: torch.Tensor
    basis: torch.Tensor
    affine: torch.Tensor
    tiers: Tiers
    token_scale: torch.Tensor | None  # [G, n], for a basis


def _coded(side: str, row: int, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, basis, affine = (getattr(buffers, f"{side}_{what}")[row] for what in ("codes", "basis", "affine"))
    return codes, basis.mT, affine


def _normalised(row: int, slots: slice, value: torch.Tensor, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """Values over their tokens' norms, which are stored."""
    if not layout.normalised:
        return value
    norms = codec.norm_code(value)
    buffers.v_norms[row, :, slots] = norms
    return value / codec.norm_value(norms)[..., None]


def _segment(
    row: int,
    start: int,
    sides: tuple[_Side, _Side],
    buffers: Buffers,
    layout: Layout,
    may_fit: bool,
) -> int:
    """The segment whose basis codes these tokens: the current one, or a new one where that is due."""
    starts = buffers.starts[row].tolist()
    current = sum(first <= start for first in starts) - 1
    room = current + 1 < len(starts)  # a log that was cropped among its codes may have more segments than were reserved
    fresh = current < 0 or (layout.segment > 0 and room)
    candidate = sides[0].x.shape[1] >= layout.warmup and room
    if not may_fit or (not fresh and not candidate):
        return current
    fits = [codec.fit(side.x, side.weight, side.tiers, layout.margin, side.token_scale) for side in sides]
    if not fresh and all(_serves(side, current, fit) for side, fit in zip(sides, fits, strict=True)):
        return current
    segment = current + 1
    for side, (basis, affine) in zip(sides, fits, strict=True):
        side.basis[:, segment], side.affine[:, segment] = basis, affine
    buffers.starts[row, segment] = start
    return segment


def _serves(side: _Side, segment: int, fit: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether the basis of a segment captures these tokens nearly as well as one that was made for them."""
    lost = codec.residual(side.x, side.basis[:, segment], side.affine[:, segment])
    return bool((lost <= codec.REFRESH * codec.residual(side.x, *fit)).all())
