"""Who else reads a store, and what layers that are changed one after the other have to share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Prefix:
    """The first ``length`` columns of a cache, as the tensors that one call returned read them; None for all that there are.

    It is alive as long as one of these tensors is, and a store keeps weak references to the prefixes that are read of it.
    """

    __slots__ = ("__weakref__", "length")

    def __init__(self, length: int | None) -> None:
        self.length = length


class SharedResults:
    """Copies made of one object (a timeline or a store), each of which several users ask for one by one and share.

    transformers reorders or crops a cache layer by layer, and within a layer keys before values. The first call builds the
    copy, and the calls of the other layers, or of the other role, find it here. A user that asks a second time begins a new
    copy of the cache and gets a result of its own; where there are several, each user gets them in the order in which they
    were built. Results are held by weak references.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[weakref.ref[Any], set[int], object]]] = {}

    def get(self, key: Hashable, user: object, build: Callable[[], _Result], holder: object = None) -> _Result:
        """``build()``, or what another user's call with this ``key`` gave.

        ``key`` may contain the ``id`` of an object: as ``holder`` that object is kept alive, so that no other gets its id.
        """
        known = self._known[key] = [entry for entry in self._known.get(key, []) if entry[0]() is not None]
        for reference, users, _ in known:
            if id(user) not in users and (result := reference()) is not None:
                users.add(id(user))
                return result
        result = build()
        known.append((weakref.ref(result), {id(user)}, holder))
        return result

    def clear(self) -> None:
        self._known.clear()
