"""Match RoPE by what it does: keys are stored before it, and turned again when they are attended to.

Walking back from the keys that attention sees, the pass looks for the one node through which all of their data comes and
behind which positions are mixed in. What lies between is run: at position 0 it gives the scaling, at position 1 which channels
are paired and by what angle, at powers of two the angle to full precision, and at random positions the proof that angles are
linear and that no token's depends on where other tokens are.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from spectral_compile.codec.layout import Layout, Rotary
from spectral_compile.kernels.dense import rotate
from spectral_compile.passes.constants import PLANES, planes_equal
from spectral_compile.passes.lift import Unliftable, arguments_of, computed_from, hint, is_size, lift
from spectral_compile.passes.trace import Site, Trace, call_name, fake, is_call, is_float
from spectral_compile.passes.writes import memory, writes

log = logging.getLogger(__name__)

_FARTHEST = 1 << 16
_BEYOND = 1 << 24  # past any border at which a model takes other frequencies
_FEW = 64
_SEVERAL = 8
_LONGEST = 64  # nodes between a key and the projection that it comes from
_BARRIER = ("linear", "matmul", "addmm", "mm", "bmm", "embedding", "scaled_dot_product_attention", "conv1d", "einsum")
_VIEWS = ("unsqueeze", "squeeze", "view", "reshape", "transpose", "to", "expand", "contiguous")
_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)  # of a piece of a graph that is run by itself


_Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Found(NamedTuple):
    """A key before RoPE, the tensors of angles mixed into it, and the positions [1 or batch, tokens] that they come from.

    Positions in time, height and width, [3 or 4, batch, tokens], do if they are equal, as those of a text are.
    """

    source: Node
    angles: tuple[Node, ...]
    ids: Node | None


def match_rope(trace: Trace) -> None:
    """Give every site its stored key, and positions and rotation where the key is rotated in the graph.

    Requires: edges and layouts.
    Gives: each matched site a ``stored_key`` [B, Hkv, n, D]. Where RoPE is found, that is the key before it, ``positions`` [1
    or B, n] and ``rotary`` are set, and the layout of a prefill has the rotation; all sites then take positions from one node.
    Where the key depends on positions in a way that is not RoPE, the key is stored as attention sees it and ``note`` says why.
    A site is refused only if its keys are rotated in another way than those in its cache. Nodes that only transpose a key or
    take one of several equal rows of positions may be added. Constants that were read are noted in the ``meta`` of
    placeholders.
    """
    known: dict[tuple[Any, bool], Rotary | str] = {}
    written, positions = writes(trace.gm.graph), None
    for site in trace.matched:
        site.stored_key = site.edge.new[0]
        found = _find(trace, site)
        if found is None:
            continue
        rotary: Rotary | _Found | str = found
        if isinstance(found, _Found):
            if found.ids is None and any(is_float(node) for angle in found.angles for node in arguments_of(angle)):
                rotary = "the graph is given their angles, not their positions"
            elif found.ids is None or positions not in (None, found.ids):
                rotary = "positions do not come from one [batch, tokens] tensor"
            elif any(found.source < write for write in written.get(memory(found.source), ())):
                rotary = "they are rotated in place"
            else:
                rotary = _rotation(trace, site, found, written, known)
        if isinstance(found, _Found) and isinstance(rotary, Rotary):
            positions = found.ids
            log.debug("%s: keys are stored before RoPE, at %s; positions are %s", site.where, site.stored_key, positions)
        else:
            site.note = f"keys are stored after RoPE: {rotary}"
    for site in trace.matched:
        if site.edge.past is None:
            site.layout = Layout.parse(replace(site.layout, rotary=site.rotary).spec())
        elif site.layout.rotary is None:
            if site.rotary is not None:
                site.note = "keys are stored after RoPE: so are those in the cache"
            site.stored_key, site.positions, site.rotary = site.edge.new[0], None, None
        elif site.rotary is None or not _same(site.rotary, site.layout.rotary):
            site.refusal = "its keys are rotated in another way than those in the cache"
        # the layout that the store was made with stays the key of guards and operations


def _rotation(
    trace: Trace,
    site: Site,
    found: _Found,
    written: dict[int | None, list[Node]],
    known: dict[tuple[Any, bool], Rotary | str],
) -> Rotary | str:
    """The rotation between what was found and the key, which ``site`` is then given, or why there is none.

    ``known`` holds what angles came to, by how they are computed, of keys [B, H, T, D] and of [B, T, H, D].
    """
    source, angles, ids = found
    dim, reason = hint(fake(source).shape[3]), ""
    computed = tuple(_computation(angle, written) for angle in angles)
    for tokens_first in _orders(site, source):
        turn = _turn(trace, site, found, written, tokens_first)
        if (computed, tokens_first) not in known:
            known[computed, tokens_first] = _probe(turn, dim)
            log.debug("angles %s come to %s", angles, known[computed, tokens_first])
        rotary = known[computed, tokens_first]
        if isinstance(rotary, Rotary) and not _agrees(turn, rotary, dim):
            rotary = "what is done to the keys is no rotation"
        if isinstance(rotary, Rotary):
            if tokens_first:
                source = _heads_first(trace, source)
            site.stored_key, site.positions, site.rotary = source, _one_of(ids), rotary
            return rotary
        reason = reason or rotary
    return reason


def _orders(site: Site, source: Node) -> list[bool]:
    """Whether ``source`` may be a key [B, H, T, D] (False), or one that is transposed later, [B, T, H, D] (True)."""
    shape, (batch, heads, tokens, dim) = getattr(fake(source), "shape", None), hint(fake(site.edge.new[0]).shape)
    if shape is None:  # halves of a channel come as a tuple
        return []
    wanted = ((batch, heads, tokens, dim), False), ((batch, tokens, heads, dim), True)
    return [tokens_first for shape_, tokens_first in wanted if tuple(hint(shape)) == shape_]


def _heads_first(trace: Trace, source: Node) -> Node:
    with trace.gm.graph.inserting_after(source):
        turned = trace.gm.graph.call_method("transpose", (source, 1, 2))
    turned.meta = {"example_value": fake(source).transpose(1, 2)}
    return turned


def _same(a: Rotary | None, b: Rotary | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.interleaved, a.dim) == (b.interleaved, b.dim) and all(
        math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-9)
        for x, y in zip((*a.frequencies, a.scaling), (*b.frequencies, b.scaling), strict=True)
    )


def _find(trace: Trace, site: Site) -> _Found | str | None:
    """The key before RoPE and what turns it, why it is not there, or None where the key does not depend on positions."""
    order = trace.order
    frontier: list[tuple[int, Node]] = []
    queued: set[Node] = set()
    angles: list[Node] = []

    def push(node: Node) -> None:
        if node not in queued:
            queued.add(node)
            heapq.heappush(frontier, (-order[node], node))

    push(site.edge.new[0])
    for _ in range(_LONGEST):
        if len(frontier) == 1 and angles and _orders(site, frontier[0][1]):
            return _Found(frontier[0][1], tuple(angles), _positions(trace, angles))
        _, node = heapq.heappop(frontier)
        if is_call(node, *_BARRIER) or node.op == "placeholder":
            break
        for parent in node.all_input_nodes:
            if not isinstance(fake(parent), (torch.Tensor, tuple, list)):
                continue
            if trace.is_data(parent):
                push(parent)
            elif is_float(parent) and parent not in angles and _moves(parent):
                angles.append(parent)
        if not frontier:
            break
    if not angles:
        return None
    if any(node.op == "placeholder" for _, node in frontier):
        return "parameters are applied to them after it"
    return "no tensor of the graph holds them before it"


def _moves(angles: Node) -> bool:
    """Whether a tensor that is no data may differ from token to token, or from call to call."""
    numbers = (fake(node) for node in computed_from(angles) if not is_size(node) and not is_float(node))
    return any(isinstance(x, torch.Tensor) and x.ndim for x in numbers) or bool(arguments_of(angles))


def _positions(trace: Trace, angles: list[Node]) -> Node | None:
    """The last integer tensor [1 or batch, tokens] on the way to the angles; all of them must come from it.

    Or an argument of several such that were all the same while tracing, which Dynamo is to guard.
    """
    found, seen, stack = None, set(), list(angles)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = fake(node)
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.ndim == 2:
            if found is None or trace.order[node] > trace.order[found]:
                found = node
            continue
        if _several_alike(node):
            return node if found is None and all(node in computed_from(angle) for angle in angles) else None
        stack.extend(node.all_input_nodes)
    return found


def _several_alike(node: Node) -> bool:
    """Whether ``node`` is an argument of integers [3 or 4, batch, tokens] whose planes were equal while tracing."""
    value, argument = fake(node), node.meta.get("grapharg")
    if node.op != "placeholder" or argument is None or not isinstance(value, torch.Tensor) or value.is_floating_point():
        return False
    return value.ndim == 3 and value.shape[0] in (3, 4) and planes_equal(argument.example)


def _one_of(ids: Node) -> Node:
    """Positions [1 or batch, tokens]: ``ids``, or the first of several that are the same, which are noted to be guarded."""
    if fake(ids).ndim == 2:
        return ids
    if (first := ids.meta.get(PLANES)) is None:
        with ids.graph.inserting_after(ids):
            first = ids.graph.call_function(operator.getitem, (ids, 0))
        first.meta = {"example_value": fake(ids)[0]}
        ids.meta[PLANES] = first
    return first


def _computation(node: Node, written: dict[int | None, list[Node]]) -> Any:
    """What tells ``node`` from others: of a view how it is made, since each layer has its own views of the same tensor."""
    if not is_call(node, *_VIEWS) or memory(node) in written:
        return node
    leaves, structure = tree_flatten((node.args, node.kwargs))
    parts = (_computation(leaf, written) if isinstance(leaf, Node) else leaf for leaf in leaves)
    return call_name(node), str(structure), *parts


def _turn(trace: Trace, site: Site, found: _Found, written: dict[int | None, list[Node]], tokens_first: bool) -> _Turn:
    """``turn(x [n, D], positions [n]) -> [n, D]``: what the graph does to keys ``x`` at these positions."""
    ids = found.ids
    run = lift(trace.gm, [found.source, ids], site.edge.new[0], device=torch.device("cpu"), written=written)
    batch, heads, tokens, dim = hint(fake(site.edge.new[0]).shape)
    *planes, rows, _ = hint(fake(ids).shape)

    def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        try:  # few tokens are cheap; a graph that has its own number built in needs that number
            return turn_by(min(tokens, _FEW), x, positions)
        except RuntimeError:
            return turn_by(tokens, x, positions)

    def turn_by(columns: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = []
        for part, at in zip(x.split(columns), positions.split(columns), strict=True):
            key = torch.zeros(batch, heads, columns, dim)
            where = torch.zeros(rows, columns, dtype=torch.int64)
            key[:, :, : len(part)], where[:, : len(at)] = part, at
            key = key.transpose(1, 2).contiguous() if tokens_first else key
            out.append(run(key, where.expand(*planes, rows, columns))[0, 0, : len(part)].float())
        return torch.cat(out)

    return turn


def _probe(turn: _Turn, dim: int) -> Rotary | str:
    """The rotation that ``turn`` performs, or why it is none that this project knows."""
    try:
        return _measure(turn, dim)
    except Unliftable as missing:
        return str(missing)
    except _FAILURES as error:
        return f"it can not be run by itself ({type(error).__name__})"


def _farthest(turn: _Turn, dim: int) -> int:
    """The farthest power of two that ``turn`` takes for a position: where angles are looked up, their table ends."""
    farthest = _FARTHEST
    while farthest > 1:
        with contextlib.suppress(IndexError, RuntimeError):
            turn(torch.zeros(1, dim), torch.tensor([farthest]))
            break
        farthest //= 2
    return farthest


def _measure(turn: _Turn, dim: int) -> Rotary | str:
    unit = torch.eye(dim)
    still, turned = turn(unit, torch.zeros(dim, dtype=torch.int64)), turn(unit, torch.ones(dim, dtype=torch.int64))
    if not torch.equal(still, torch.diag(still.diag())):
        return "position 0 does not leave channels apart"
    moved = [i for i in range(dim) if float(turned[i].abs().sum() - turned[i, i].abs()) > 0]
    if not moved or moved[0] > 0:
        return "the rotated channels are not the first ones"
    partner = int(turned[0, 1:].abs().argmax()) + 1
    interleaved = partner == 1 and len(moved) > 2
    half = moved[-1] // 2 + 1 if interleaved else partner  # pairs, of which some may stand still
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    if 2 * half > dim or any((i in moved) != (j in moved) for i, j in pairs):
        return "its channels are paired in an unknown way"
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    scaling = float(still[0, 0])
    if not torch.allclose(still.diag()[: 2 * half], torch.tensor(scaling)) or not torch.all(still.diag()[2 * half :] == 1):
        return "position 0 scales channels unevenly"

    steps = [1 << k for k in range(_farthest(turn, dim).bit_length())]
    first = torch.zeros(len(steps), dim)
    first[:, a] = 1.0
    seen = turn(first, torch.tensor(steps)).double()
    angle = torch.atan2(seen[:, b], seen[:, a])
    frequency = angle[0]
    for step, at in zip(steps[1:], angle[1:], strict=True):  # the whole turns at 2^k follow from what 2^(k-1) gave
        frequency = (at + 2 * math.pi * torch.round((step * frequency - at) / (2 * math.pi))) / step
    return Rotary(tuple(float(torch.tensor(f, dtype=torch.float32)) for f in frequency.tolist()), interleaved, scaling)


def _agrees(turn: _Turn, rotary: Rotary, dim: int) -> bool:
    """Whether ``rotate`` gives what the graph gives, for random keys at random positions, whatever token is beside them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SEVERAL, dim, generator=generator)
    try:
        farthest = _farthest(turn, dim)
        positions = torch.randint(0, farthest, (_SEVERAL,), generator=generator)
        expected = turn(x, positions)
        alone = turn(x[:1], torch.tensor([1]))
        for far in (farthest, _BEYOND):
            with contextlib.suppress(IndexError, RuntimeError):  # past the end of a table
                if not torch.equal(turn(x[:2], torch.tensor([1, far]))[:1], alone):
                    return False
    except (Unliftable, *_FAILURES):
        return False
    # float32 rounds an angle of p radians to about p * 6e-8
    return torch.allclose(rotate(x, positions, rotary), expected, atol=1e-5 + 4e-7 * farthest * rotary.scaling)
