"""What the operations compute, in plain PyTorch: the truth that every kernel is held against.

Rows are independent: each has its own count of tokens, so that padding and neighbours never reach a row's codes.
The ledger [B, 6] int64 says for each row: tokens and coded tokens before this step, the same after it, whether the row
still waits for enough tokens to compute a basis from, and how many tokens have a position that is not one more than that of the
token before.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch

from spectral_compile import codec
from spectral_compile.codec.layout import Layout, Rotary, Tiers
from spectral_compile.kernels.autocast import without_autocast
from spectral_compile.kernels.buffers import Buffers

REFRESH = 2.0  # a new segment starts when the old basis loses this many times what a fresh one would, in keys or values

_PIECE = 1024  # tokens that are coded at a time, which bounds what the prefill needs beside its own activations


@functools.cache
def _frequencies(rotary: Rotary, device: torch.device) -> torch.Tensor:
    return torch.tensor(rotary.frequencies, dtype=torch.float32, device=device)  # a copy that waits for the device


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """``x`` [..., n, D] rotated to int ``positions`` [n] (RoPE; Su et al., arXiv 2104.09864), in the dtype of ``x``."""
    if rotary is None:
        return x
    angle = positions.to(torch.float32)[:, None] * _frequencies(rotary, x.device)
    cos, sin = (turn if rotary.scaling == 1 else turn * rotary.scaling for turn in (angle.cos(), angle.sin()))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def unrotate(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """The ``x`` whose ``rotate(x, positions, rotary)`` is given, in its dtype."""
    if rotary is None:
        return x
    back = replace(rotary, scaling=1 / rotary.scaling)
    return rotate(x.float(), -positions, back).to(x.dtype)


def group(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[H, n, D] as joint channels [G, n, W]."""
    heads = x.unflatten(0, (layout.groups, layout.head_group))
    return heads.transpose(1, 2).flatten(-2)


def ungroup(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[G, n, W] as heads [H, n, D]."""
    return x.unflatten(-1, (layout.head_group, layout.head_dim)).transpose(1, 2).flatten(0, 1)


def advance(
    ledger: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor | None,
    chunk: torch.Tensor,
    layout: Layout,
) -> None:
    """Enter the columns of ``chunk`` [B, H, count, D] in the books that all layers share.

    ``ledger`` int64 [B, 6] and ``positions`` int32 [B, N] are updated; ``position_ids`` is int [1 or B, count] (tokens are
    numbered on where it is None), ``valid`` bool [B, count] leaves padding out. The last slot of ``positions`` is scratch.

    A step of one column never begins a segment, so that no decode step computes a basis: what it leaves to be coded is done
    by a step of no columns, which follows when ``Timeline.catch_up`` says so.
    """
    batch, count = ledger.shape[0], chunk.shape[2]
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=ledger.device)
    before, coded, waiting = ledger[:, 2].clone(), ledger[:, 3].clone(), ledger[:, 4].clone()
    slot = before[:, None] + valid.cumsum(1) - 1
    new = slot if position_ids is None else position_ids.expand(batch, count)
    positions.scatter_(1, torch.where(valid, slot, positions.shape[1] - 1), new.to(torch.int32))
    previous = positions.gather(1, (slot - 1).clamp(min=0))
    gaps = ledger[:, 5] + (valid & (slot > 0) & (new != previous + 1)).sum(1)
    after = before + valid.sum(1)
    ready = (after - layout.first_exact - layout.recent - coded).clamp(min=0)
    step = ready // layout.block * layout.block
    if count == 1:
        step = torch.zeros_like(step) if layout.segment else torch.where(waiting > 0, 0, step)
    else:
        waiting = waiting * (ready < layout.first)
        step = torch.where(waiting > 0, 0, step)
    ledger.copy_(torch.stack((before, coded, after, coded + step, waiting, gaps), 1))


def append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ledger: torch.Tensor,
    valid: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
) -> None:
    """Store one chunk: the first tokens, then the recent ones, and code what falls out of it.

    ``query`` [B, Hq, n, D] (as attention sees it), ``key`` [B, H, n, D] (as stored, before RoPE where the layout has a
    rotary), ``value`` [B, H, n, D]; ``token_weight`` float32 [B, G, n] counts in the bases of a prompt (see
    ``codec.token_scale``),
    the first tokens of a store. ``ledger`` has been advanced. With n = 0 only what is due is coded, out of the window;
    with n = 1 no basis is computed.
    """
    may_fit = key.shape[2] != 1
    first_exact = layout.first_exact
    for row, (before, coded, after, coded_after, *_) in enumerate(ledger.tolist()):
        k, v, q = key[row], value[row], query[row]
        if valid is not None:
            k, v, q = k[:, valid[row]], v[:, valid[row]], q[:, valid[row]]
        squares = torch.stack([head.float().square().sum(0) for head in q])  # head by head: queries are large
        buffers.moment[row] += squares.unflatten(0, (layout.kv_heads, -1)).sum(1)
        k_exact, v_exact = buffers.k_exact[row], buffers.v_exact[row]
        in_first = min(max(first_exact - before, 0), after - before)
        k_exact[:, before : before + in_first] = k[:, :in_first]
        v_exact[:, before : before + in_first] = v[:, :in_first]
        first = max(before - first_exact, 0)  # slot of the first new token past the first_exact
        if coded_after > coded:
            held = torch.arange(coded, min(max(first, coded), coded_after), device=k.device)
            fresh = slice(in_first, in_first + coded_after - coded - len(held))
            tails = [
                torch.cat((recent(row, side, held, buffers, layout), new[:, fresh]), 1) if len(held) else new[:, fresh]
                for side, new in (("k", k), ("v", v))
            ]
            weights = None
            if token_weight is not None:
                weights = (token_weight[row] if valid is None else token_weight[row][:, valid[row]])[:, fresh]
            _code(row, coded, *tails, weights, buffers, layout, may_fit)
        slots = torch.arange(max(first, coded_after), max(after - first_exact, 0), device=k.device)
        for side, new in (("k", k), ("v", v)):
            _keep(row, side, slots, new[:, slots - first + in_first], buffers, layout)


def recent(row: int, side: str, slots: torch.Tensor, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """Tokens [H, n, D] that stand in the window, in the model's dtype, or in float32 where it is in bytes."""
    exact, place = getattr(buffers, f"{side}_exact")[row], slots % buffers.recent_slots(layout)
    if layout.recent_bits != 8:
        return exact[:, layout.first_exact + place]
    codes, sizes = getattr(buffers, f"{side}_recent")[row], getattr(buffers, f"{side}_sizes")[row]
    return codec.recent_value(codes[:, place], sizes[:, place])


def _keep(row: int, side: str, slots: torch.Tensor, x: torch.Tensor, buffers: Buffers, layout: Layout) -> None:
    """Write tokens [H, n, D] to their slots of the window."""
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
    """Code tokens [H, n, D] of one row, as important as [G, n], into the slots from ``start`` on."""
    if layout.lossless:
        span = slice(start, start + key.shape[1])
        buffers.k_codes[row, :, span], buffers.v_codes[row, :, span] = group(key, layout), group(value, layout)
        return
    k_weight = v_weight = buffers.moment.new_ones(layout.groups, layout.width)
    token_scale = None
    if layout.query_weighted:
        k_weight = codec.key_weight(buffers.moment[row], layout.rotary).reshape(layout.groups, layout.width)
    if layout.token_weighted and token_weight is not None:
        token_scale = codec.token_scale(token_weight)
    length = layout.segment or key.shape[1]
    for at in range(0, key.shape[1], length):
        part = slice(at, at + length)
        slots = slice(start + at, start + at + length)
        sides = (
            _Side(group(key[:, part], layout).float(), k_weight, *_coded("k", row, buffers), layout.key),
            _Side(_normalised(row, slots, group(value[:, part], layout).float(), buffers, layout), v_weight,
                  *_coded("v", row, buffers), layout.value),
        )  # fmt: skip
        heard = None if token_scale is None else token_scale[:, part]
        segment = _segment(row, start + at, sides, heard, buffers, layout, may_fit)
        for side in sides:
            for piece in torch.arange(side.x.shape[1]).split(_PIECE):
                here = slice(int(piece[0]), int(piece[-1]) + 1)
                codes = codec.encode(side.x[:, here], side.basis[:, segment], side.affine[:, segment], side.tiers)
                side.codes[:, slots.start + here.start : slots.start + here.stop] = codes


class _Side(NamedTuple):
    """Keys or values [G, n, W] of one row that are to be coded, and where their codes go."""

    x: torch.Tensor
    weight: torch.Tensor
    codes: torch.Tensor
    basis: torch.Tensor
    affine: torch.Tensor
    tiers: Tiers


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
    token_scale: torch.Tensor | None,
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
    fits = [codec.fit(side.x, side.weight, side.tiers, layout.margin, token_scale) for side in sides]
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
    return bool((lost <= REFRESH * codec.residual(side.x, *fit)).all())


def spans(row: int, coded: int, buffers: Buffers, layout: Layout) -> list[tuple[int, slice]]:
    """The coded slots of a row, as (segment, slots)."""
    if coded == 0:
        return []
    if layout.lossless:
        return [(0, slice(0, coded))]
    starts = [s for s in buffers.starts[row].tolist() if s < coded]
    return [(i, slice(a, b)) for i, (a, b) in enumerate(zip(starts, [*starts[1:], coded], strict=True))]


def not_coded(row: int, side: str, before: int, coded: int, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """First and recent tokens of one row, [H, n, D], in the order of tokens and the model's dtype."""
    exact = getattr(buffers, f"{side}_exact")[row]
    slots = torch.arange(coded, max(before - layout.first_exact, coded), device=exact.device)
    window = recent(row, side, slots, buffers, layout).to(exact.dtype)
    return torch.cat((exact[:, : min(before, layout.first_exact)], window), 1)


@without_autocast
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    columns: torch.Tensor | None,
    ledger: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    buffers: Buffers,
    layout: Layout,
    scale: float,
    sliding_window: int,
    softcap: float = 0.0,
    sink_score: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a chunk over the compressed past and over itself (causal), merged in one softmax.

    ``query`` [B, Hq, n, D], ``key`` and ``value`` [B, H, n, D] as for ``append``; the past is what stood in the store before
    this step. A bool ``mask`` [B or 1, Hq or 1, n, columns] replaces causality, ``columns`` bool [B, N] then says which columns
    hold stored tokens. ``sliding_window`` > 0 hides keys that are that many tokens or more behind. With ``softcap`` > 0 a score
    s becomes ``softcap * tanh(s / softcap)``; ``sink_score`` [Hq] is one more score of each head, of no value. Stored tokens
    whose place in uint8 ``visible`` [B, N] is 0 are hidden. Returns [B, Hq, n, D]; a query that may see nothing gives zeros.
    """
    batch, q_heads, count, dim = query.shape
    out = query.new_zeros(batch, count, q_heads, dim).transpose(1, 2)
    for row, (before, coded, after, *_) in enumerate(ledger.tolist()):
        keep = torch.ones(count, dtype=torch.bool, device=query.device) if valid is None else valid[row]
        where = positions[row, :after]
        chunk_k, chunk_v = rotate(key[row][:, keep], where[before:], layout.rotary), value[row][:, keep]
        in_first = min(before, layout.first_exact)
        old = slice(in_first, in_first + coded)  # tokens that are coded, between the first ones and the recent ones
        exact_at = torch.cat((where[: old.start], where[old.stop : before]))
        exact_k = rotate(not_coded(row, "k", before, coded, buffers, layout), exact_at, layout.rotary)

        q = query[row].float().reshape(layout.kv_heads, -1, dim) * scale  # queries of a KV head side by side
        scores = q.new_empty(*q.shape[:2], after)
        exact = q @ exact_k.float().mT
        scores[..., : old.start], scores[..., old.stop : before] = exact[..., : old.start], exact[..., old.start :]
        scores[..., before:] = q @ chunk_k.float().mT
        for segment, slots in spans(row, coded, buffers, layout):
            k = decode(row, segment, slots, "k", buffers, layout)
            k = rotate(k, where[layout.first_exact + slots.start : layout.first_exact + slots.stop], layout.rotary)
            scores[..., layout.first_exact + slots.start : layout.first_exact + slots.stop] = q @ k.float().mT

        allowed = _allowed(row, count, before, after, keep, mask, columns, sliding_window)
        if visible is not None:
            shown = torch.ones(after, dtype=torch.bool, device=query.device)
            shown[:before] = visible[row, :before] != 0
            allowed = allowed & shown
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.unflatten(1, (-1, count)).masked_fill(~allowed, float("-inf"))
        if sink_score is not None:
            taken = sink_score.float().reshape(layout.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, taken), -1)
        nothing = (scores == float("-inf")).all(-1, keepdim=True)  # a softmax of it is NaN, which keys and values may be too
        p = torch.softmax(scores, -1).masked_fill(nothing, 0.0)[..., :after].flatten(1, 2)

        mixed = p[..., before:] @ chunk_v.float()
        exact_p = torch.cat((p[..., : old.start], p[..., old.stop : before]), -1)
        mixed += exact_p @ not_coded(row, "v", before, coded, buffers, layout).float()
        for segment, slots in spans(row, coded, buffers, layout):
            part = p[..., layout.first_exact + slots.start : layout.first_exact + slots.stop]
            mixed += _mix(part, row, segment, slots, buffers, layout)
        out[row] = mixed.reshape(q_heads, count, dim).to(query.dtype)
    return out


def _allowed(
    row: int,
    count: int,
    before: int,
    after: int,
    keep: torch.Tensor,
    mask: torch.Tensor | None,
    columns: torch.Tensor | None,
    sliding_window: int,
) -> torch.Tensor:
    """Which stored tokens each query of the chunk may see: bool, broadcastable to [Hq / H, n, after]."""
    token = torch.arange(after, device=keep.device)
    if mask is not None:
        seen = mask[min(row, mask.shape[0] - 1)]
        past = columns[row, : seen.shape[-1] - count].nonzero().flatten()
        chosen = torch.cat((past, keep.nonzero().flatten() + seen.shape[-1] - count))
        if seen.shape[0] > 1:
            raise NotImplementedError("a mask that differs between heads cannot be attended to")
        return seen[..., chosen]
    own = before + keep.cumsum(0) - 1  # the token that each query is
    allowed = token[None] <= own[:, None]
    return allowed & (token[None] > own[:, None] - sliding_window) if sliding_window else allowed


def _side(side: str, buffers: Buffers, layout: Layout):
    if side == "k":
        return buffers.k_codes, buffers.k_basis.mT, buffers.k_affine, layout.key
    return buffers.v_codes, buffers.v_basis.mT, buffers.v_affine, layout.value


def decode(row: int, segment: int, slots: slice, side: str, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """Coded tokens of one segment, [H, n, D]: float32, or the model's dtype where the store is lossless."""
    codes, basis, affine, tiers = _side(side, buffers, layout)
    if layout.lossless:
        return ungroup(codes[row, :, slots], layout)
    x = codec.decode(codes[row, :, slots], basis[row, :, segment], affine[row, :, segment], tiers)
    if side == "v" and layout.normalised:
        x = x * codec.norm_value(buffers.v_norms[row, :, slots])[..., None]
    return ungroup(x, layout)


def _mix(p: torch.Tensor, row: int, segment: int, slots: slice, buffers: Buffers, layout: Layout) -> torch.Tensor:
    """``p`` [H, m, n] times coded values, without decoding them: summed in the latent, then one product with the basis."""
    if layout.lossless:
        return p @ ungroup(buffers.v_codes[row, :, slots], layout).float()
    codes, basis, affine, tiers = _side("v", buffers, layout)
    latent = codec.latent(codes[row, :, slots], affine[row, :, segment], tiers)  # [G, n, R]
    synthesis = codec.synthesis(basis[row, :, segment], affine[row, :, segment])  # [G, R, W]
    p = p.unflatten(0, (layout.groups, layout.head_group))
    if layout.normalised:
        p = p * codec.norm_value(buffers.v_norms[row, :, slots])[:, None, None]
    own = synthesis.unflatten(-1, (layout.head_group, layout.head_dim)).transpose(1, 2)  # [G, heads, R, D]
    return (p @ latent[:, None] @ own).flatten(0, 1)


@without_autocast
def materialise(
    row: int, before: int, coded: int, positions: torch.Tensor, buffers: Buffers, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys (rotated) and values [H, n, D] of the first ``before`` tokens of a row, in the model's dtype."""
    dense, segments = [], spans(row, coded, buffers, layout)
    for side in ("k", "v"):
        parts = [decode(row, i, slots, side, buffers, layout) for i, slots in segments]
        kept = not_coded(row, side, before, coded, buffers, layout)
        head = min(before, layout.first_exact)
        dense.append(torch.cat([kept[:, :head], *(x.to(kept.dtype) for x in parts), kept[:, head:]], 1))
    return rotate(dense[0], positions[:before], layout.rotary), dense[1]
