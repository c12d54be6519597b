"""``SpectralTensor``: keys or values with the shape, dtype and device of a dense tensor, whose bytes are a store's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map

from spectral_compile.cache.sharing import Prefix
from spectral_compile.cache.store import SpectralStore
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec.layout import Layout
from spectral_compile.foreign import decoded
from spectral_compile.report import count_decode

aten = torch.ops.aten

_WRITES = "this would write to a compressed cache, which only grows: start with a new cache, or write to keys.dense()"
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_IN_PLACE.add("__setitem__")
_INNER = ["handle"]  # one list for all tensors, since Dynamo asks for it at every call


class Kind(NamedTuple):
    """The metadata of a ``SpectralTensor``: with its shape all that Dynamo compiles for. Guards compare it at every call."""

    dtype: torch.dtype
    role: str  # "key" or "value"
    layout: Layout
    strict: bool
    static: bool = False


class SpectralTensor(torch.Tensor):
    """The first T columns of one role of a ``SpectralStore``: logically [B, KV heads, T, head_dim] of the model's dtype.

    Where ``static``, T is the number of columns that a static cache has room for, of which those not yet written are zeros,
    and the length is always the store's own.

    Concatenating, cropping, reordering, selecting and repeating rows, cloning, copying and moving act on the compressed form.
    Any other operation decodes to a dense tensor, which is counted and warned of, or a RuntimeError where ``strict``; writing
    in place is a RuntimeError. To Dynamo only ``handle``, an empty tensor, and ``kind`` are visible.
    """

    handle: torch.Tensor
    kind: Kind
    store: SpectralStore | None
    prefix: Prefix | None

    @staticmethod
    def __new__(
        cls,
        handle: torch.Tensor,
        shape: torch.Size,
        kind: Kind,
        store: SpectralStore | None = None,
        prefix: Prefix | None = None,
    ) -> SpectralTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=kind.dtype, device=handle.device)
        self.handle, self.kind, self.store, self.prefix = handle, kind, store, prefix
        return self

    @property
    def length(self) -> int:
        """The columns that are there."""
        return store_of(self).timeline.length if self.kind.static else self.shape[2]

    @property
    def shape_only(self) -> bool:
        """Whether Dynamo traces with this tensor, which then has no store and is asked for no values."""
        return self.store is None and isinstance(self.handle, FakeTensor)

    def __tensor_flatten__(self) -> tuple[list[str], Kind]:
        return _INNER, self.kind

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> SpectralTensor:
        return SpectralTensor(inner["handle"], size, context)

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache of graphs knows this tensor by."""
        return repr((tuple(self.shape), self.kind))

    def __repr__(self, *, tensor_contents=None):  # mypy refuses annotations here, which torch's own lacks
        return f"SpectralTensor({self.kind.role}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def dense(self) -> torch.Tensor:
        """The dense tensor that this stands for: keys after RoPE, as attention sees them, and padding as zeros."""
        if self.store is None:  # traced: by Dynamo for the shape alone, by other compilers for what the graph is to compute
            return decoded(self.handle, self.kind.role, list(self.shape), self.dtype, self.kind.strict)
        return self.store.dense(self.kind.role, self.shape[2])

    def _on(self, store: SpectralStore, length: int | None = None) -> SpectralTensor:
        """The same role of ``store``, up to column ``length``, by default as many as this tensor has."""
        length = self.shape[2] if length is None or self.kind.static else length
        shape = torch.Size((store.timeline.batch, store.layout.kv_heads, length, store.layout.head_dim))
        prefix = Prefix(None if self.kind.static else length)
        store.add_prefix(prefix)
        new = SpectralTensor(store.handle, shape, self.kind._replace(dtype=store.dtype), store, prefix)
        if hasattr(self, "_dynamo_weak_dynamic_indices"):
            torch._dynamo.maybe_mark_dynamic(new, 2)  # a copy of what a prefill returned keeps its mark
        return new

    def _moved(self, key: Any, move: Callable[[torch.Tensor], torch.Tensor], holder: Any = None) -> SpectralTensor:
        """The same role of a new store, with ``move`` applied to every buffer.

        ``key`` names the operation, with ``holder`` alive where it contains its id: the other role of the layer gets the same
        new store, and the other layers get stores on the same new timeline (``SharedResults``).
        """
        store, length = store_of(self), self.length

        def timeline() -> Timeline:
            return store.timeline.crop(min(length, store.timeline.length)).map(move)

        def build() -> SpectralStore:
            new = store.map(store.timeline.derived.get((key, length), store, timeline, holder), move)
            new.drop_segments()
            return new

        return self._on(store.derived.get((key, length), self.kind.role, build, holder), length)

    # PyTorch records what these return as a view of ``self``, which Dynamo would then rebuild from ``self``.

    def __getitem__(self, index: Any) -> torch.Tensor:
        made = NotImplemented
        if self.store is not None and (cut := _only_cut(index, self.ndim)) is not None:
            dim, kept = cut
            made = _slice(self, dim, kept.start, kept.stop, kept.step or 1)
        return super().__getitem__(index) if made is NotImplemented else made

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **rest: Any) -> torch.Tensor:
        if self.store is not None and isinstance(repeats, int) and dim in (0, -4) and not rest:
            return self._moved(("interleave", repeats), lambda t: t.repeat_interleave(repeats, dim=0))
        return super().repeat_interleave(repeats, dim, **rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralTensor:
        store = memo.get(id(self.store))
        if store is None:
            store = store_of(self).__deepcopy__(memo)
        memo[id(self)] = new = self._on(store)
        return new

    def __copy__(self) -> SpectralTensor:
        return self._on(store_of(self))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(_WRITES)

    def _refuse(self, *given: Any, **more: Any) -> Any:
        raise TypeError(
            "a compressed tensor has no memory of its own to share, save or hand to other libraries: call .dense() for the"
            " tensor that it stands for; copy.deepcopy(cache) copies a cache, and spectral_compile.save_cache saves it"
        )

    # PyTorch's own methods of these names would read memory that a wrapper tensor does not have
    share_memory_ = is_shared = storage = data_ptr = numpy = tolist = __array__ = __dlpack__ = _refuse

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.store is not None:
            self._refuse()
        return str, (self._stable_hash_for_caching(),)  # torch before 2.13 hashes the pickle of a graph's inputs for its cache

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        first = args[0] if args else None
        if func is aten.index_copy_.default and isinstance(first, SpectralTensor) and first.kind.static:
            return _write(*args)
        if rule is not None and isinstance(first, (SpectralTensor, list)) and not _traced(args):
            result = rule(first, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result

        if func._schema.is_mutable and isinstance(first, SpectralTensor) and not first.shape_only:
            raise RuntimeError(f"{func}: {_WRITES}")

        def plain(x: Any) -> Any:
            if not isinstance(x, SpectralTensor):
                return x
            if x.store is not None:
                count_decode(str(func), x.kind.strict)
            return x.dense()

        if func in (aten.detach.default, aten.alias.default):
            return SpectralTensor(first.handle, first.shape, first.kind, first.store, first.prefix)
        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        views = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns)
        if views and isinstance(first, SpectralTensor) and first.store is not None:
            out = tree_map(lambda x: x.as_subclass(Decoded) if isinstance(x, torch.Tensor) else x, out)
        return out


class Decoded(torch.Tensor):
    """A view of a decoded compressed tensor. It may be read; writing to it, which would not change the cache, is an error."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if (in_place and isinstance(args[0], Decoded)) or isinstance(kwargs.get("out"), Decoded):
            raise RuntimeError(_WRITES)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            given = args[0] if args else None
            if (
                isinstance(out, torch.Tensor)
                and isinstance(given, Decoded)
                and out.untyped_storage()._cdata == given.untyped_storage()._cdata
            ):
                return out.as_subclass(Decoded)
        return out


def store_of(x: SpectralTensor) -> SpectralStore:
    """The store of a tensor that is not traced."""
    assert x.store is not None, "only a traced tensor has no store"
    return x.store


def shape_of(x: SpectralTensor) -> torch.Tensor:
    """A tensor of the shape and dtype of ``x`` that holds one element, for graphs that only read sizes off it."""
    return x.handle.new_zeros((), dtype=x.dtype).expand(x.shape)


def _only_cut(index: Any, ndim: int) -> tuple[int, slice] | None:
    """The dimension and the slice of an ``index`` that does nothing but cut along one dimension; None for any other."""
    given = index if isinstance(index, tuple) else (index,)
    if not all(x is Ellipsis or isinstance(x, slice) for x in given) or given.count(Ellipsis) > 1:
        return None
    at = given.index(Ellipsis) if Ellipsis in given else len(given)
    first, last = given[:at], given[at + 1 :]
    whole = (slice(None),) * (ndim - len(first) - len(last))
    cuts = [(dim, x) for dim, x in enumerate((*first, *whole, *last)) if x != slice(None)]
    return cuts[0] if len(cuts) == 1 else None


def _traced(args: Any) -> bool:
    """Whether a tensor among ``args`` is only a shape that Dynamo traces with."""
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return any(isinstance(x, SpectralTensor) and x.store is None for x in flat)


def _write(x: SpectralTensor, dim: int, index: torch.Tensor, new: torch.Tensor) -> SpectralTensor:
    """``index_copy_`` of new tokens into a static cache, which can only come after those that are there."""
    if x.store is None and not x.shape_only:
        raise RuntimeError(
            'a graph of another compiler than backend="spectral" would write to a compressed static cache: compile with that'
            " backend whatever is given this cache, or use the default DynamicCache"
        )
    if x.store is not None:
        if dim % 4 != 2 or index.tolist() != list(range(x.length, x.length + len(index))):
            raise RuntimeError("a compressed static cache is only written to behind its last token: start with a new cache")
        x.store.append_eagerly(x.kind.role, new)
    return x


def _cat(tensors: list[torch.Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not isinstance(first, SpectralTensor) or first.kind.static:
        return NotImplemented
    if dim % 4 == 2 and len(tensors) == 2 and not isinstance(tensors[1], SpectralTensor):
        length, new = first.shape[2], tensors[1]
        if new.shape[2] == 0:
            return first._on(store_of(first))
        store = store_of(first)
        if length > store.timeline.length:
            return NotImplemented  # the other role still lacks the chunk before this one
        if length != store.timeline.length:
            longer = store
            store = longer.derived.get(("append", length), first.kind.role, lambda: longer.fork(length))
        return first._on(store.append_eagerly(first.kind.role, new), length + new.shape[2])
    stores = [store_of(t) for t in tensors if isinstance(t, SpectralTensor)]
    alike = {(s.layout, s.dtype, s.timeline.length, bool(s.pending)) for s in stores}
    if dim % 4 != 0 or len(stores) < len(tensors) or len(alike) > 1 or first.shape[2] != stores[0].timeline.length:
        return NotImplemented
    key = ("stack", *(id(store) for store in stores))
    return first._on(stores[0].derived.get(key, first.kind.role, lambda: SpectralStore.stack(stores), stores))


def _slice(x: SpectralTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    first, last, _ = slice(start, end).indices(x.shape[dim])
    if step != 1 or (dim % 4 != 0 and first != 0):
        return NotImplemented
    if last - first == x.shape[dim]:
        return x._on(store_of(x))
    if dim % 4 == 2 and not x.kind.static:
        return x._on(store_of(x), last)
    if dim % 4 == 0:
        return x._moved(("rows", first, last), lambda t: t[first:last].clone())
    return NotImplemented


def _index_select(x: SpectralTensor, dim: int, index: torch.Tensor) -> Any:
    if dim % 4 != 0:
        return NotImplemented
    return x._moved(("select", id(index)), lambda t: t.index_select(0, index.to(t.device)), index)


def _index(x: SpectralTensor, indices: list[torch.Tensor | None]) -> Any:
    index, *rest = indices
    if index is None or index.ndim != 1 or any(i is not None for i in rest):
        return NotImplemented
    return x._moved(("index", id(index)), lambda t: t[index.to(t.device)], index)


def _split(x: SpectralTensor, size: int, dim: int = 0) -> Any:
    if dim % 4 != 0:
        return NotImplemented
    return [_slice(x, 0, at, at + size) for at in range(0, x.shape[0], size)]


def _repeat(x: SpectralTensor, repeats: list[int]) -> Any:
    if len(repeats) != 4 or any(r != 1 for r in repeats[1:]):
        return NotImplemented
    return x._moved(("repeat", repeats[0]), lambda t: t.repeat(repeats[0], *[1] * (t.ndim - 1)))


def _clone(x: SpectralTensor, memory_format: Any = None) -> Any:
    return x._moved("clone", torch.clone)


def _to_copy(x: SpectralTensor, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Any:
    dtype = dtype or x.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return NotImplemented

    moved = x._moved(("to", dtype, str(device)), lambda t: t.to(device=device, copy=True))
    store = store_of(moved)
    store.cast(dtype)
    return moved._on(store)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.repeat.default: _repeat,
    aten.split.Tensor: _split,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
}
