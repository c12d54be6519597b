"""Attention that a model writes out as matmul, softmax and matmul, perhaps with capped scores or a learned sink score."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import Node

from spectral_compile.passes.trace import Site, argument, fake, is_call, module_of

DROPS_OUT = "attention dropout is on: call model.eval()"
_CASTS = ("to", "type_as", "float", "type")
_PRODUCTS = ("matmul", "bmm")
ALIBI = "its attention adds a bias to its scores (ALiBi), which attention to a compressed cache does not"
_OTHERWISE = "attention is computed by matmul and softmax: load the model with attn_implementation='sdpa' if it has that"


class _Unknown(Exception):
    """Attention, but not of a kind that is known; the message says what is in the way."""


def written_out(softmax: Node) -> Site | str | None:
    """The site around a softmax, what keeps it from being one, or None where this is no attention at all."""
    way = _way(softmax)
    if not way or argument(softmax, 1, "dim") not in (-1, 3):
        return None
    scores, sink_score, attended = _past_casts(softmax.args[0]), None, way[-1]
    if is_call(scores, "sub") and scores.args[0] is _of_maximum(scores.args[1]):
        scores = scores.args[0]  # a softmax stays the same
    if is_call(scores, "cat", "concat") and len(argument(scores, 0, "tensors")) == 2:
        scores, sink_score = argument(scores, 0, "tensors")
    scores, mask = _masked(scores)
    scores, softcap = _capped(scores)
    scores, scale = _scaled(scores)
    try:
        query, key = _factors(scores)
        _check(way, sink_score is not None)
        return Site(
            attended=attended,
            query=query,
            key=key,
            value=attended.args[1],
            mask=_seen(mask),
            scale=scale,
            where=module_of(attended),
            softcap=softcap,
            sink_score=None if sink_score is None else _per_head(sink_score),
        )
    except _Unknown as reason:
        return str(reason)


def _past_casts(node: Node) -> Node:
    while is_call(node, *_CASTS):
        node = node.args[0]
    return node


def _of_maximum(node: Any) -> Any:
    """What ``node`` is the maximum of, if it is one."""
    call = node.args[0] if is_call(node, "getitem", "getattr") else node
    return call.args[0] if is_call(call, "max", "amax") else None


def _masked(scores: Node) -> tuple[Node, Node | None]:
    """Scores before a mask was added to them, and the mask."""
    added = is_call(scores, "add") and isinstance(scores.args[1], Node)
    return (scores.args[0], scores.args[1]) if added else (scores, None)


def _capped(scores: Node) -> tuple[Node, float]:
    """``cap * tanh(scores / cap)`` as (scores, cap); (scores, 0.0) where nothing caps them."""
    if is_call(scores, "mul") and is_call(scores.args[0], "tanh"):
        inner = scores.args[0].args[0]
        if is_call(inner, "truediv", "div") and inner.args[1] == scores.args[1] and isinstance(inner.args[1], (int, float)):
            return inner.args[0], float(inner.args[1])
    return scores, 0.0


def _scaled(scores: Node) -> tuple[Node, float]:
    """Scores before they were multiplied or divided by a number, and what that comes to as a factor."""
    if is_call(scores, "mul", "truediv", "div"):
        number = fake(scores.args[1])
        if isinstance(number, (int, float, torch.SymFloat)):  # a second model of a class makes Dynamo vary it
            return scores.args[0], float(number) if is_call(scores, "mul") else 1 / float(number)
    return scores, 1.0


def _factors(scores: Node) -> tuple[Node, Node]:
    """Queries and keys, of which ``scores`` are the product."""
    seen = scores.args[0] if is_call(scores, "masked_fill") else scores
    biased = is_call(seen, "add") and is_call(_scaled(seen.args[0])[0], *_PRODUCTS)
    if biased or (is_call(scores, "view", "reshape") and is_call(scores.args[0], "baddbmm")):
        raise _Unknown(ALIBI)
    if is_call(scores, "matmul") and is_call(scores.args[1], "transpose"):
        turned = scores.args[1]
        if fake(turned).ndim == 4 and sorted(dim % 4 for dim in turned.args[1:]) == [2, 3]:
            return scores.args[0], turned.args[0]
    raise _Unknown(_OTHERWISE)


def _way(softmax: Node) -> list[Node]:
    """The nodes from the weights to their product with the values; none if they come to no product."""
    way = [softmax]
    while not is_call(way[-1], *_PRODUCTS):
        users = sorted(way[-1].users, key=lambda user: not is_call(user, *_PRODUCTS))
        if not users or not is_call(users[0], *_PRODUCTS, *_CASTS, "dropout", "getitem", "view"):
            return []
        way.append(users[0])
    return way


def _check(way: list[Node], has_sink: bool) -> None:
    """Raise unless the weights are used for nothing else, and changed by nothing but to leave out that of the sink score."""
    for node, user in itertools.pairwise(way):
        if len(node.users) > 1:
            raise _Unknown("its attention weights are used elsewhere too: leave output_attentions out")
        if is_call(user, "dropout") and argument(user, 1, "p", 0.5) and argument(user, 2, "training", True):
            raise _Unknown(DROPS_OUT)
        if is_call(user, "view") or (is_call(user, "getitem") and not has_sink) or user.args[0] is not node:
            raise _Unknown(_OTHERWISE)
    shares = [node.args[1] for node in way if is_call(node, "getitem")]
    if has_sink and shares != [(Ellipsis, slice(None, -1, None))]:
        raise _Unknown(_OTHERWISE)


def _seen(mask: Node | None) -> Node | None:
    """The bool mask behind one of zeros and least numbers; any other as it is."""
    if mask is None or not is_call(mask, "where"):
        return mask
    seen, zero, least = mask.args
    nothing = is_call(zero, "zeros") or (is_call(zero, "tensor") and zero.args[0] == 0) or zero == 0
    return seen if nothing and isinstance(least, float) and least <= torch.finfo(fake(mask).dtype).min else mask


def _per_head(sink_score: Node) -> Node:
    """The sink score of each query head, [Hq], behind what was expanded to all queries."""
    shaped = sink_score.args[0] if is_call(sink_score, "expand") else sink_score
    given = shaped.args[0] if is_call(shaped, "reshape", "view") else shaped
    if fake(given).ndim != 1 or shaped.args[1:] != (1, -1, 1, 1):
        raise _Unknown("its attention has sink scores that are not one number a head")
    return given
