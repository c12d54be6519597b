"""Match RoPE by what it does: keys are stored before it, and turned again when they are attended to.

Walking back from the keys that attention sees, the pass looks for the one node through which all of their data comes and
behind which positions are mixed in. What lies between is run: at position 0 it gives the scaling, at position 1 which channels
are paired and by what angle, at powers of two the angle to full precision, and at random positions the proof that angles are
linear.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import Node

from spectral_compile.codec.layout import Layout, Rotary
from spectral_compile.kernels.reference import rotate
from spectral_compile.passes.lift import Unliftable, hint, lift
from spectral_compile.passes.trace import Site, Trace, fake, is_call, is_float

_FARTHEST = 1 << 16
_FEW = 64
_BARRIER = ("linear", "matmul", "addmm", "mm", "bmm", "embedding", "scaled_dot_product_attention", "conv1d", "einsum")


def match_rope(trace: Trace) -> None:
    """Give every site its stored key, and positions and rotation where the key is rotated in the graph."""
    known: dict[tuple[Node, ...], Rotary | str] = {}
    positions: Node | None = None
    for site in trace.matched:
        site.stored_key = site.edge.new[0]
        found = _find(trace, site)
        if found is None:
            continue
        source, angles, ids = found
        rotary: Rotary | str = "positions do not come from one [batch, tokens] tensor"
        if ids is not None and positions in (None, ids):
            turn = _turn(trace, site, source, ids)
            if angles not in known:
                known[angles] = _probe(turn, fake(source).shape[3])
            rotary = known[angles]
            if isinstance(rotary, Rotary) and not _agrees(turn, rotary, fake(source).shape[3]):
                rotary = "what is done to the keys is no rotation"
        if isinstance(rotary, Rotary):
            site.stored_key, site.positions, site.rotary = source, ids, rotary
            positions = ids
        else:
            site.note = f"keys are stored after RoPE: {rotary}"
    for site in trace.matched:
        if site.edge.past is None:
            site.layout = Layout.parse(replace(site.layout, rotary=site.rotary).spec())
        elif (site.rotary is None) != (site.layout.rotary is None) or not _same(site.rotary, site.layout.rotary):
            site.refusal = "its keys are rotated in another way than those in the cache"
        # the layout that the store was made with stays the key of guards and operations


def _same(a: Rotary | None, b: Rotary | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.interleaved, a.dim) == (b.interleaved, b.dim) and all(
        math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-9)
        for x, y in zip((*a.frequencies, a.scaling), (*b.frequencies, b.scaling), strict=True)
    )


def _find(trace: Trace, site: Site) -> tuple[Node, tuple[Node, ...], Node | None] | None:
    """(key before RoPE, the position-dependent tensors mixed into it, the positions), or None where there is no RoPE."""
    order = trace.order
    frontier, queued, angles = [], set(), []

    def push(node: Node) -> None:
        if node not in queued:
            queued.add(node)
            heapq.heappush(frontier, (-order[node], node))

    push(site.edge.new[0])
    for _ in range(64):
        if len(frontier) == 1 and angles:
            source = frontier[0][1]
            if getattr(fake(source), "shape", None) == fake(site.edge.new[0]).shape:  # halves of a channel come as a tuple
                return source, tuple(angles), _positions(trace, angles)
        _, node = heapq.heappop(frontier)
        if is_call(node, *_BARRIER) or node.op == "placeholder":
            return None
        for parent in node.all_input_nodes:
            if not isinstance(fake(parent), (torch.Tensor, tuple, list)):
                continue
            if trace.is_data(parent):
                push(parent)
            elif is_float(parent) and parent not in angles:
                angles.append(parent)
        if not frontier:
            return None
    return None


def _positions(trace: Trace, angles: list[Node]) -> Node | None:
    """The last integer tensor [1 or batch, tokens] on the way to the angles; all of them must come from it."""
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
        stack.extend(node.all_input_nodes)
    return found


def _turn(trace: Trace, site: Site, source: Node, ids: Node) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``turn(x [n, D], positions [n]) -> [n, D]``: what the graph does to keys ``x`` at these positions."""
    run = lift(trace.gm, [source, ids], site.edge.new[0])
    batch, heads, tokens, dim = (hint(n) for n in fake(source).shape)
    rows, device = hint(fake(ids).shape[0]), fake(source).device

    def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        try:  # few tokens are cheap; a graph that has its own number built in needs that number
            return turn_by(min(tokens, _FEW), x, positions)
        except RuntimeError:
            return turn_by(tokens, x, positions)

    def turn_by(columns: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = []
        for part, at in zip(x.split(columns), positions.split(columns), strict=True):
            key = torch.zeros(batch, heads, columns, dim, device=device)
            where = torch.zeros(rows, columns, dtype=torch.int64, device=device)
            key[:, :, : len(part)], where[:, : len(at)] = part.to(device), at.to(device)
            out.append(run(key, where)[0, 0, : len(part)].float().cpu())
        return torch.cat(out)

    return turn


def _probe(turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dim: int) -> Rotary | str:
    """The rotation that ``turn`` performs, or why it is none that this project knows."""
    try:
        return _measure(turn, dim)
    except Unliftable as missing:
        return str(missing)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        return f"it can not be run by itself ({type(error).__name__})"


def _measure(turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dim: int) -> Rotary | str:
    unit = torch.eye(dim)
    still, turned = turn(unit, torch.zeros(dim, dtype=torch.int64)), turn(unit, torch.ones(dim, dtype=torch.int64))
    if not torch.equal(still, torch.diag(still.diag())):
        return "position 0 does not leave channels apart"
    moved = [i for i in range(dim) if float(turned[i].abs().sum() - turned[i, i].abs()) > 0]
    half = len(moved) // 2
    if not moved or len(moved) % 2 or moved != list(range(2 * half)):
        return "the rotated channels are not the first ones"
    partner = int(turned[0, 1:].abs().argmax()) + 1
    if partner not in (1, half):
        return "its channels are paired in an unknown way"
    interleaved = partner != half
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    scaling = float(still[0, 0])
    if not torch.allclose(still.diag()[: 2 * half], torch.tensor(scaling)) or not torch.all(still.diag()[2 * half :] == 1):
        return "position 0 scales channels unevenly"

    steps = [1 << k for k in range(_FARTHEST.bit_length())]
    first = torch.zeros(len(steps), dim)
    first[:, a] = 1.0
    seen = turn(first, torch.tensor(steps)).double()
    angle = torch.atan2(seen[:, b], seen[:, a])
    frequency = angle[0]
    for step, at in zip(steps[1:], angle[1:], strict=True):  # the whole turns at 2^k follow from what 2^(k-1) gave
        frequency = (at + 2 * math.pi * torch.round((step * frequency - at) / (2 * math.pi))) / step
    return Rotary(tuple(float(torch.tensor(f, dtype=torch.float32)) for f in frequency.tolist()), interleaved, scaling)


def _agrees(turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rotary: Rotary, dim: int) -> bool:
    """Whether ``rotate`` gives what the graph gives, for random keys at random positions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, dim, generator=generator)
    positions = torch.randint(0, _FARTHEST, (8,), generator=generator)
    try:
        expected = turn(x, positions)
    except (Unliftable, RuntimeError, IndexError, TypeError, ValueError):
        return False
    # float32 rounds an angle of p radians to about p * 6e-8
    return torch.allclose(rotate(x, positions, rotary), expected, atol=1e-5 + 4e-7 * _FARTHEST * rotary.scaling)
