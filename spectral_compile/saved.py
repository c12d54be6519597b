"""A compressed cache on disk, and back.

A file is in the form of safetensors: tensors as the cache holds them, and in its header what they are. It is data, never code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spectral_compile.cache.store import SpectralStore
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec.layout import Layout
from spectral_compile.errors import Mistake
from spectral_compile.explain import fingerprint_of
from spectral_compile.files import check_writable, replacing
from spectral_compile.fingerprint import fingerprint
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.outputs import cache_of
from spectral_compile.tensor import Kind, SpectralTensor, store_of

FORMAT, VERSION = "spectral-compile cache", "1"
_TIMELINE = ("ledger", "positions", "columns", "visible", "flags")  # the order of ``Timeline.tensors``
_CODED = ("k_codes", "v_codes", "v_norms")  # buffers with a place for each coded slot


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache of transformers to a file: all that it holds, as it holds it, but for coded slots that it has to spare.

    ``cache`` is a ``DynamicCache``, or an output that has one; its layers that are dense are written as they are. ``Mistake``
    where there is no such cache, where nothing in it is compressed, or where the file cannot be written: what was there before
    is there still.
    """
    target = Path(path)
    check_writable(target)
    written = _Written()
    said = {"layers": [written.layer(i, layer) for i, layer in enumerate(_layers_of(cache))]}
    if not written.stores:
        raise Mistake("nothing in this cache is compressed: torch.save writes it")
    said |= {"stores": [written.store(i, store) for i, store in enumerate(written.stores)]}
    said |= {"timelines": [written.timeline(i, trimmed) for i, trimmed in enumerate(written.trimmed)]}
    tensors = {name: x.detach().to("cpu").contiguous() for name, x in written.tensors.items()}
    told = json.dumps({**said, "digests": _digests(tensors)})
    header = {"format": FORMAT, "version": VERSION, "cache": told, "digest": hashlib.sha256(told.encode()).hexdigest()}
    with replacing(target) as scratch:
        try:
            save_file(tensors, scratch, header)
        except SafetensorError as error:
            raise Mistake(f"cannot write to {path}: {error}") from None


def load_cache(path: str | os.PathLike[str], model: torch.nn.Module) -> Any:
    """The cache that ``save_cache`` wrote, on the device of ``model``: a ``DynamicCache`` for ``generate`` or a forward.

    The next tokens are those of the cache that was saved. On a CPU its memory is the file's, which is not written to.
    ``Mistake`` where the file is none, was cut short or changed, or is of another version, of another model, or of this one in
    another dtype.
    """
    said, tensors = _read(Path(path))
    first = next(model.parameters())
    dtypes = {one["dtype"] for one in said["stores"]}
    if not all(_is_of(model, one["model"]) for one in said["timelines"]):
        raise Mistake(f"{path} is the cache of another model")
    if dtypes != {str(first.dtype)}:
        raise Mistake(f"{path} was made by this model in {', '.join(sorted(dtypes))}, and it is in {first.dtype}: load it so")
    return _restored(said, {name: x.to(first.device) for name, x in tensors.items()}, model, str(path))


def _layers_of(cache: Any) -> list[Any]:
    from transformers import DynamicCache  # here, since to import it takes seconds

    cache = cache_of(cache) if isinstance(cache, Mapping) else cache  # as outputs are
    if type(cache) is not DynamicCache:
        raise Mistake(f"only a DynamicCache of transformers can be saved, not {type(cache).__name__}")
    return cache.layers


@dataclass
class _Written:
    """What a file is to hold: ``tensors`` by name, and stores and timelines in the order of their numbers.

    ``trimmed`` are the timelines without what they have to spare, each of which its stores ask how many slots to write.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    stores: list[SpectralStore] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    trimmed: list[Timeline] = field(default_factory=list)

    def layer(self, number: int, layer: Any) -> dict[str, Any]:
        """What a layer's attributes are, by name."""
        plain, tensors, compressed = {}, [], {}
        for name, value in vars(layer).items():
            if isinstance(value, SpectralTensor):
                store = store_of(value)
                if store.pending:
                    raise Mistake("a layer of this cache has new keys and no values yet: save it between two steps")
                which = _number(self.stores, store)
                compressed[name] = {
                    "store": which,
                    "role": value.kind.role,
                    "length": value.length,
                    "strict": value.kind.strict,
                }
            elif isinstance(value, torch.Tensor):
                self.tensors[f"layers.{number}.{name}"] = value
                tensors.append(name)
            elif isinstance(value, (int, float, str, type(None))):
                plain[name] = value
            elif not isinstance(value, (torch.device, torch.dtype)):
                raise Mistake(f"layer {number} of this cache is a {type(layer).__name__}, of which {name} cannot be saved")
        return {"class": type(layer).__name__, "plain": plain, "tensors": tensors, "compressed": compressed}

    def store(self, number: int, store: SpectralStore) -> dict[str, Any]:
        which = _number(self.timelines, store.timeline)
        if which == len(self.trimmed):
            self.trimmed.append(store.timeline.trimmed())
        slots = self.trimmed[which].capacity.coded
        for name, x in store.buffers._asdict().items():
            self.tensors[f"stores.{number}.{name}"] = x[:, :, :slots] if name in _CODED else x
        return {"layout": store.layout.spec(), "timeline": which, "dtype": str(store.dtype)}

    def timeline(self, number: int, trimmed: Timeline) -> dict[str, Any]:
        self.tensors |= {f"timelines.{number}.{name}": x for name, x in zip(_TIMELINE, trimmed.tensors(), strict=True)}
        return trimmed.numbers()


def _number(known: list[Any], one: Any) -> int:
    """The place of an object, which is added where it is none of those."""
    for i, other in enumerate(known):
        if other is one:
            return i
    known.append(one)
    return len(known) - 1


def _restored(said: dict[str, Any], tensors: dict[str, torch.Tensor], model: torch.nn.Module, path: str) -> Any:
    from transformers import DynamicCache

    timelines = [
        Timeline.restored(one, [tensors[f"timelines.{i}.{name}"] for name in _TIMELINE])
        for i, one in enumerate(said["timelines"])
    ]
    stores = []
    for i, one in enumerate(said["stores"]):
        buffers = Buffers(**{name: tensors[f"stores.{i}.{name}"] for name in Buffers._fields})
        dtype = buffers.k_exact.dtype
        stores.append(SpectralStore(Layout.parse(one["layout"]), timelines[one["timeline"]], dtype, buffers))
    cache = DynamicCache(config=model.config)
    if [type(layer).__name__ for layer in cache.layers] != [one["class"] for one in said["layers"]]:
        raise Mistake(f"{path} has other layers than transformers has for this model: use the version that it was saved with")
    for i, (layer, one) in enumerate(zip(cache.layers, said["layers"], strict=True)):
        held = {name: tensors[f"layers.{i}.{name}"] for name in one["tensors"]}
        for name, part in one["compressed"].items():
            store = stores[part["store"]]
            kind = Kind(store.dtype, part["role"], store.layout, part["strict"])
            held[name] = SpectralTensor(store.handle, torch.Size((0,) * 4), kind, store)._on(store, part["length"])
        vars(layer).update(one["plain"] | held)
        if (keys := held.get("keys")) is not None:
            layer.device, layer.dtype = keys.device, keys.dtype
    return cache


def _is_of(model: torch.nn.Module, known: str | None) -> bool:
    """Whether a fingerprint is the model's: of all its weights, or of those that graphs for text have."""
    return fingerprint(model.parameters()) == known or (known is not None and fingerprint_of(model) == known)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a file says and holds, if it is whole; memory-mapped."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            names = file.keys() if header.get("format") == FORMAT else []
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError:
        raise Mistake(f"{path} is no cache that was saved, or was cut short") from None
    if header.get("format") != FORMAT:
        raise Mistake(f"{path} is no cache that was saved")
    if header.get("version") != VERSION:
        raise Mistake(f"{path} is of version {header.get('version')} of the format, and this package reads {VERSION}")
    told = header.get("cache", "")
    whole = hashlib.sha256(told.encode()).hexdigest() == header.get("digest")
    said = json.loads(told) if whole else {}
    if not whole or said.pop("digests") != _digests(tensors):
        raise Mistake(f"{path} was changed after it was saved: save it anew")
    return said, tensors


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor with its dtype and shape; several at a time, since that is what a large file waits for."""

    def digest(x: torch.Tensor) -> str:
        told = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode())
        told.update(x.reshape(-1).view(torch.uint8).numpy().data)
        return told.hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
