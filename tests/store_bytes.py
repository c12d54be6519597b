"""Hashes of every byte that a store holds after prefill, decode, extend, crop, fork, reorder and what else changes a cache.

``python -m tests.store_bytes`` prints a line for each preset and step. A refactoring leaves all lines as they were; compare
them on one machine, since eigenvectors differ in their last bits from one linear algebra library to another.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator

import torch
from transformers import DynamicCache

from spectral_compile import SpectralTensor, spectral
from spectral_compile.outputs import cache_argument
from tests.tiny import WINDOWS, build, tokens

PRESETS = ("exact", "quality", "balanced", "compact", "seed")


def digest(cache: DynamicCache) -> str:
    """SHA-256 of all layers' buffers, of what their timelines hold, and of what the keys and values decode to."""
    found = hashlib.sha256()

    def add(name: str, x: torch.Tensor) -> None:
        found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            assert isinstance(tensor, SpectralTensor)
            store = tensor.store
            for name, buffer in store.buffers._asdict().items():
                add(name, buffer)
            for number, x in enumerate(store.timeline.tensors()):
                add(f"timeline {number}", x)
            for role, x in store.pending.items():
                add(f"pending {role}", x)
            found.update(f"{store.timeline.length} {store.timeline.capacity} {tuple(tensor.shape)}".encode())
            add("dense", store.dense(tensor.kind.role, tensor.shape[2]))
    return found.hexdigest()


def steps(preset: str, padded: bool, recent_bits: int) -> Iterator[tuple[str, str]]:
    """The name of each step of one script, and the ``digest`` of what it leaves."""
    torch._dynamo.reset()
    model = build("llama")
    options = {"preset": preset, "strict": True, "inner": "eager", "recent_bits": recent_bits, **WINDOWS}
    run = torch.compile(model, backend=spectral, options=options)
    ids = tokens(2, 200)
    mask = torch.ones(2, 200, dtype=torch.long)
    if padded:
        mask[1, :9] = 0
    cache = DynamicCache(config=model.config)
    at = 0

    def feed(cache: DynamicCache, count: int, rows: slice | torch.Tensor = slice(None), start: int | None = None) -> None:
        nonlocal at
        at = (cache.get_seq_length() if start is None else start) + count
        given = {"attention_mask": mask[rows, :at]} if padded else {}
        run(input_ids=ids[rows, at - count : at], **given, **cache_argument(cache), use_cache=True, logits_to_keep=1)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(cache, 40)
        yield "prefill 40", digest(cache)
        for _ in range(20):
            feed(cache, 1)
        yield "decode 20", digest(cache)
        feed(cache, 37)
        yield "extend 37", digest(cache)
        cache.crop(-45)
        feed(cache, 1)
        yield "crop to 52 in place, decode 1", digest(cache)
        fork = copy.deepcopy(cache)
        feed(fork, 9)
        feed(cache, 1)
        yield "deepcopy, extend 9", digest(fork)
        yield "its original, decode 1", digest(cache)
        kept = [(layer.keys, layer.values) for layer in fork.layers]
        fork.crop(-30)
        feed(fork, 3)
        yield "crop of a cache that another handle reads, extend 3", digest(fork)
        del kept
        fork.reorder_cache(torch.tensor([1, 1]))
        yield "reorder", digest(fork)
        cache.batch_repeat_interleave(2)
        yield "repeat rows", digest(cache)
        cache.batch_select_indices(torch.tensor([3, 0]))
        yield "select rows", digest(cache)
        for layer in cache.layers:
            more = torch.linspace(-1.0, 1.0, 5 * layer.keys.shape[1] * layer.keys.shape[3])
            more = more.reshape(1, layer.keys.shape[1], 5, -1).expand(2, -1, -1, -1)
            layer.keys, layer.values = torch.cat((layer.keys, more), 2), torch.cat((layer.values, -more), 2)
        yield "append 5 eagerly", digest(cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(torch.bfloat16), layer.values.to(torch.bfloat16)
        yield "to bfloat16", digest(cache)
        for layer in fork.layers:
            layer.keys, layer.values = torch.cat((layer.keys, layer.keys)), torch.cat((layer.values, layer.values))
        yield "stack rows", digest(fork)


def main() -> None:
    torch.set_num_threads(1)  # what the model computes differs in its last bits with the number of threads
    whole = hashlib.sha256()
    for preset in PRESETS:
        for padded in (False, True):
            for recent_bits in (16,) if preset == "exact" else (8, 16):
                name = f"{preset}, {recent_bits} bits{', padded' if padded else ''}"
                for step, found in steps(preset, padded, recent_bits):
                    print(f"{found[:16]}  {name}: {step}")
                    whole.update(found.encode())
    print(f"{whole.hexdigest()}  all")


if __name__ == "__main__":
    main()
