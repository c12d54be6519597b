"""A compressed cache is a list of tokens: whatever is done to it, and whoever else holds a copy."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from spectral_compile import SpectralConfig, SpectralTensor, memory_stats, report
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec import PRESETS, Layout, Rotary, Tiers
from spectral_compile.kernels.advance.op import advance_
from spectral_compile.kernels.append.op import append_
from spectral_compile.kernels.buffers import UNUSED, Buffers
from spectral_compile.plan import Plan, SitePlan
from spectral_compile.report import SpectralWarning
from spectral_compile.runtime import BoundGraph
from tests.budget import examples

HEADS, DIM, LAYERS = 2, 8, 2
ROTARY = Rotary(tuple(100.0 ** (-i / 4) for i in range(4)))
FEW = Tiers(1, 2, 3)

COUNTS = st.sampled_from([1, 1, 2, 7, 40, 90])

Pair = tuple[Tensor, Tensor]


def layout_of(preset: str = "exact", rotary: Rotary | None = ROTARY, **sizes: int) -> Layout:
    small = {"first_exact": 2, "recent": 3, "block": 4, "warmup": 6, **sizes}
    if PRESETS[preset].lossless:
        small["recent_bits"] = 16
    if PRESETS[preset].segment:
        small["segment"] = small["block"]
    layout = replace(PRESETS[preset], **small).layout(HEADS, DIM, rotary)
    if not layout.lossless:
        layout = replace(layout, key=FEW, value=FEW)
    return Layout.parse(layout.spec())


def append_in_graph(
    past: list[Pair] | None, chunk: list[Pair], ids: Tensor | None, mask: Tensor | None, layout: Layout, strict: bool = True
) -> list[Pair]:
    """The new cache after a step of the runtime whose graph only stores ``chunk`` (keys before RoPE), layer by layer."""
    batch, _, count, _ = chunk[0][0].shape
    layers = range(len(chunk))
    inputs = [("ledger",), ("positions",), *[("valid",)][: mask is not None]]
    inputs += [("buffer", i, name) for i in layers for name in Buffers._fields]
    kind = "prefill" if past is None else "decode" if count == 1 else "extend"
    pasts = [None if past is None else (2 * i, 2 * i + 1) for i in layers]
    arguments = [] if past is None else [tensor for pair in past for tensor in pair]
    plan = Plan(
        kind=kind,
        sites=tuple(SitePlan(layout, torch.float32, torch.device("cpu"), pair) for pair in pasts),
        inputs=dict(enumerate(inputs)),
        outputs=tuple((role, i) for i in layers for role in ("key", "value")),
        padding=len(arguments) if mask is not None else None,
        masked=False,
        batch=batch,
        count=count,
    )

    def compiled(ledger: Tensor, positions: Tensor, *rest: Tensor) -> tuple[()]:
        valid, buffers = (rest[0], rest[1:]) if mask is not None else (None, rest)
        advance_(ledger, positions, ids, valid, chunk[0][0], layout.spec())
        size = len(Buffers._fields)
        for i, (key, value) in enumerate(chunk):
            append_(key, key, value, ledger, valid, None, 1.0, i, *buffers[i * size : (i + 1) * size], layout.spec())
        return ()

    given = [*arguments, mask] if mask is not None else arguments
    flat = BoundGraph(plan, compiled, SpectralConfig(strict=strict), [], compiled)(*given)
    return list(zip(flat[::2], flat[1::2], strict=True))


def append_eagerly(past: list[Pair], chunk: list[Pair]) -> list[Pair]:
    """As a ``DynamicCache`` appends outside of any graph, ``chunk`` with keys after RoPE."""
    return [(torch.cat((k, a), 2), torch.cat((v, b), 2)) for (k, v), (a, b) in zip(past, chunk, strict=True)]


def each(layers: list[Pair], change: Callable[[Tensor], Tensor]) -> list[Pair]:
    return [(change(k), change(v)) for k, v in layers]


def turned(key: Tensor, ids: Tensor, rotary: Rotary | None) -> Tensor:
    """Keys [B, H, n, D] rotated to ids [B, n], by complex numbers."""
    if rotary is None:
        return key
    pairs = torch.complex(*key.double().chunk(2, -1))
    angle = ids.double()[:, None, :, None] * torch.tensor(rotary.frequencies, dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1).float()


def randn(batch: int, count: int, seed: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, batch, HEADS, count, DIM, generator=generator)) for _ in range(LAYERS)]


@dataclass(eq=False)
class Cache:
    """A compressed cache, and the dense one that it must stand for; ``valid`` bool [B, T] are the columns that are tokens."""

    layers: list[Pair]
    dense: list[Pair]
    valid: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.valid.shape)

    def changed(self, change: Callable[[Tensor], Tensor], on_valid: Callable[[Tensor], Tensor]) -> Cache:
        return Cache(each(self.layers, change), each(self.dense, change), on_valid(self.valid))

    def grown(self, layers: list[Pair], chunk: list[Pair], valid: Tensor) -> Cache:
        hidden = ~valid[:, None, :, None]
        dense = append_eagerly(self.dense, each(chunk, lambda x: x.masked_fill(hidden, 0.0)))
        return Cache(layers, dense, torch.cat((self.valid, valid), 1))


def fresh(layout: Layout, batch: int, count: int, seed: int, layers: int = LAYERS, strict: bool = True) -> Cache:
    chunk = (randn(batch, count, seed) * layers)[:layers]
    ids = torch.arange(count).expand(batch, count)
    keys_turned = [(turned(k, ids, layout.rotary), v) for k, v in chunk]
    valid = torch.ones(batch, count, dtype=torch.bool)
    return Cache(append_in_graph(None, chunk, ids, None, layout, strict), keys_turned, valid)


def check(cache: Cache) -> None:
    for stored, dense in zip(cache.layers, cache.dense, strict=True):
        for mine, expected in zip(stored, dense, strict=True):
            assert isinstance(mine, SpectralTensor)
            assert mine.shape == expected.shape
            torch.testing.assert_close(mine.dense(), expected, atol=1e-4, rtol=1e-4)


class CacheMachine(RuleBasedStateMachine):
    """Caches beside the dense ones that they stand for, under everything that transformers does to a cache.

    With a lossy layout, what an append made of its own cache is taken as given but for the tokens that are not coded; all other
    operations, and all other caches, must keep it.
    """

    preset = "exact"

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Cache] = []
        self.seed = 0

    @initialize(
        rotary=st.sampled_from([None, ROTARY]),
        sizes=st.fixed_dictionaries(
            {
                "first_exact": st.integers(0, 3),
                "recent": st.integers(0, 5),
                "block": st.integers(1, 6),
                "warmup": st.sampled_from([1, 6, 80]),
                "recent_bits": st.sampled_from([8, 16]),
            }
        ),
        masked=st.booleans(),
    )
    def choose(self, rotary: Rotary | None, sizes: dict[str, int], masked: bool) -> None:
        self.layout = layout_of(self.preset, rotary, **sizes)
        self.masked = masked  # whether a 2-D mask goes with every call

    def take(self, index: int) -> Cache:
        return self.live[index % len(self.live)]

    def put(self, cache: Cache, instead_of: Cache | None = None) -> None:
        if instead_of is not None:
            self.live = [other for other in self.live if other is not instead_of]
        self.live = [*self.live[-4:], cache]

    def chunk(self, old: Cache | None, batch: int, count: int, padding: float) -> tuple[list[Pair], Tensor, Tensor]:
        """(keys before RoPE and values, positions, valid): tokens are numbered on in every row."""
        self.seed += 1
        valid = torch.ones(batch, count, dtype=torch.bool)
        if self.masked:
            valid = torch.rand(batch, count, generator=torch.Generator().manual_seed(self.seed)) >= padding
            valid[:, -1] = True
        known = 0 if old is None else old.valid.sum(1, keepdim=True)
        return randn(batch, count, self.seed), known + (valid.cumsum(1) - 1).clamp(min=0), valid

    def after_append(self, cache: Cache, dense: Cache) -> Cache:
        """The cache with the dense one that it must equal."""
        if self.layout.lossless:
            return dense
        for (k, v), (dense_k, dense_v) in zip(cache.layers, dense.dense, strict=True):
            kept = torch.zeros_like(dense.valid)
            for row, valid in enumerate(dense.valid):
                token = valid.nonzero().flatten()
                kept[row, token[: self.layout.first_exact]] = True
                kept[row, token[max(0, len(token) - self.layout.recent) :]] = True
            for mine, expected in ((k, dense_k), (v, dense_v)):
                decoded = mine.dense()
                assert decoded.isfinite().all()
                at = kept[:, None, :, None]
                near = 0.03 if self.layout.recent_bits == 8 else 1e-4  # half a byte's step, of four standard deviations
                torch.testing.assert_close(decoded * at, expected * at, atol=near, rtol=1e-4)
        for other in self.live:  # older handles on this log see what is coded by now
            if other.layers[0][0].store is cache.layers[0][0].store:
                other.dense = each(other.layers, lambda x: x.dense())
        return replace(dense, dense=each(cache.layers, lambda x: x.dense()))

    @rule(batch=st.integers(1, 3), count=st.integers(1, 30), padding=st.sampled_from([0.0, 0.4]))
    def prefill(self, batch: int, count: int, padding: float) -> None:
        chunk, ids, valid = self.chunk(None, batch, count, padding)
        layers = append_in_graph(None, chunk, ids, valid.long() if self.masked else None, self.layout)
        empty = Cache([], [(k[:, :, :0], v[:, :, :0]) for k, v in chunk], valid[:, :0])
        after = empty.grown(layers, [(turned(k, ids, self.layout.rotary), v) for k, v in chunk], valid)
        self.put(self.after_append(after, after))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), count=COUNTS, keep=st.booleans(), padding=st.sampled_from([0.0, 0.4]))
    def append(self, index: int, count: int, keep: bool, padding: float) -> None:
        old = self.take(index)
        chunk, ids, valid = self.chunk(old, old.shape[0], count, padding)
        mask = torch.cat((old.valid, valid), 1).long() if self.masked else None
        layers = append_in_graph(old.layers, chunk, ids, mask, self.layout)
        after = old.grown(layers, [(turned(k, ids, self.layout.rotary), v) for k, v in chunk], valid)
        self.put(self.after_append(after, after), None if keep else old)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), count=st.sampled_from([1, 3, 40, 90]), keep=st.booleans())
    def append_dense_chunk(self, index: int, count: int, keep: bool) -> None:
        old = self.take(index)
        chunk, ids, valid = self.chunk(old, old.shape[0], count, 0.0)
        chunk = [(turned(k, ids, self.layout.rotary), v) for k, v in chunk]
        after = old.grown(append_eagerly(old.layers, chunk), chunk, valid)
        self.put(self.after_append(after, after), None if keep else old)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), drop=st.integers(1, 20), keep=st.booleans())
    def crop(self, index: int, drop: int, keep: bool) -> None:
        old = self.take(index)
        length = max(1, old.shape[1] - drop)
        self.put(old.changed(lambda x: x[..., :length, :], lambda x: x[:, :length]), None if keep else old)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), rows=st.lists(st.integers(0, 9), min_size=1, max_size=4), indexed=st.booleans())
    def reorder(self, index: int, rows: list[int], indexed: bool) -> None:
        old = self.take(index)
        where = torch.tensor(rows) % old.shape[0]
        change = (lambda x: x[where, ...]) if indexed else (lambda x: x.index_select(0, where))
        self.put(old.changed(change, lambda x: x[where]))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), times=st.integers(1, 3), interleave=st.booleans())
    def repeat(self, index: int, times: int, interleave: bool) -> None:
        old = self.take(index)
        assume(old.shape[0] * times <= 6)
        if interleave:
            self.put(old.changed(lambda x: x.repeat_interleave(times, dim=0), lambda x: x.repeat_interleave(times, dim=0)))
        else:
            self.put(old.changed(lambda x: x.repeat(times, 1, 1, 1), lambda x: x.repeat(times, 1)))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9))
    def clone(self, index: int) -> None:
        self.put(self.take(index).changed(torch.clone, torch.clone))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9))
    def deepcopy(self, index: int) -> None:
        self.put(copy.deepcopy(self.take(index)))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), size=st.integers(1, 3), which=st.integers(0, 5))
    def split(self, index: int, size: int, which: int) -> None:
        old = self.take(index)
        which %= -(-old.shape[0] // size)
        self.put(old.changed(lambda x: x.split(size, 0)[which], lambda x: x.split(size)[which]))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 9), other=st.integers(0, 9))
    def join_rows(self, index: int, other: int) -> None:
        both = [self.take(i).changed(torch.clone, torch.clone) for i in (index, other)]
        length = min(cache.shape[1] for cache in both)
        assume(sum(cache.shape[0] for cache in both) <= 6)
        one, two = (cache.changed(lambda x: x[..., :length, :].clone(), lambda x: x[:, :length]) for cache in both)
        joined = ([tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(a, b, strict=True)]
                  for a, b in ((one.layers, two.layers), (one.dense, two.dense)))  # fmt: skip
        self.put(Cache(*joined, torch.cat((one.valid, two.valid))))

    @precondition(lambda self: len(self.live) > 1)
    @rule(index=st.integers(0, 9))
    def forget(self, index: int) -> None:
        self.live.remove(self.take(index))

    @invariant()
    def every_cache_is_its_list(self) -> None:
        for cache in self.live:
            check(cache)

    @invariant()
    def caches_share_no_timeline(self) -> None:
        """But for handles on one store, which is one log."""
        owner: dict[int, int] = {}
        for cache in self.live:
            for i, (key, value) in enumerate(cache.layers):
                assert key.store is value.store
                assert all(key.store is not other.store for other, _ in cache.layers[:i])
            mine = {id(key.store.timeline) for key, _ in cache.layers}
            assert len(mine) == 1
            stores = hash(tuple(id(key.store) for key, _ in cache.layers))
            assert owner.setdefault(mine.pop(), stores) == stores

    @invariant()
    def bytes_reported_are_bytes_held(self) -> None:
        for cache in self.live:
            assert memory_stats(cache.layers).stored_bytes == sum(held(cache.layers).values())


class LossyCacheMachine(CacheMachine):
    preset = "balanced"


class SegmentedCacheMachine(CacheMachine):
    preset = "seed"


def held(layers: list[Pair]) -> dict[int, int]:
    """Bytes by storage of everything that these handles keep alive."""
    tensors: list[Tensor] = []
    for key, value in layers:
        for store in (key.store, value.store):
            timeline = store.timeline
            tensors += [*store.buffers, *store.pending.values(), *timeline.tensors()]
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


UNHURRIED = [HealthCheck.too_slow, HealthCheck.filter_too_much]
for machine, few, full in ((CacheMachine, 50, 150), (LossyCacheMachine, 20, 60), (SegmentedCacheMachine, 15, 60)):
    machine.TestCase.settings = settings(
        max_examples=examples(few, full), stateful_step_count=12, deadline=None, suppress_health_check=UNHURRIED
    )
TestCache = CacheMachine.TestCase
TestLossyCache = LossyCacheMachine.TestCase
TestSegmentedCache = SegmentedCacheMachine.TestCase


def every_tensor() -> dict[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alive = [x for x in gc.get_objects() if isinstance(x, Tensor) and not isinstance(x, SpectralTensor)]
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in alive}


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_reported_bytes_are_what_the_process_holds(preset: str) -> None:
    layout, chunk = layout_of(preset), randn(2, 50, 0)
    gc.collect()
    before = every_tensor()
    layers = append_in_graph(None, chunk, None, None, layout)
    reported = memory_stats(layers)
    gc.collect()
    new = sum(size for at, size in every_tensor().items() if at not in before)
    assert reported.stored_bytes == new
    assert reported.logical_bytes == 2 * LAYERS * 2 * HEADS * 50 * DIM * 4


def test_bytes_do_not_grow_over_many_reorders() -> None:
    cache = fresh(layout_of("balanced"), 3, 50, 0).layers
    before = memory_stats(cache).stored_bytes
    for _ in range(5):
        order = torch.tensor([2, 0, 0])
        cache = each(cache, lambda x, order=order: x.index_select(0, order))
    gc.collect()
    assert memory_stats(cache).stored_bytes == before


def test_selecting_a_row_keeps_only_its_bytes() -> None:
    cache = fresh(layout_of("balanced"), 3, 50, 0).layers
    row = torch.tensor([1])
    one = each(cache, lambda x: x[row])
    assert memory_stats(one).stored_bytes <= memory_stats(cache).stored_bytes // 3 + 64


def test_a_cropped_copy_takes_no_more_bytes() -> None:
    cache = fresh(layout_of("balanced"), 1, 300, 0).layers
    cropped = each(cache, lambda x: x[..., :20, :].clone())
    assert memory_stats(cropped).stored_bytes <= memory_stats(cache).stored_bytes


def test_decoding_is_an_error_where_strict() -> None:
    key, _ = fresh(layout_of(), 1, 9, 0).layers[0]
    for operation in (lambda: key + 1, lambda: key.float().sum(), lambda: key[0, 0, 0, 0].item(), lambda: key[:, :, 3:]):
        with pytest.raises(RuntimeError, match="strict"):
            operation()


def test_decoding_is_counted_and_warned_of_once() -> None:
    report.clear()
    cache = fresh(layout_of(), 1, 9, 0, strict=False)
    key, dense = cache.layers[0][0], cache.dense[0][0]
    with pytest.warns(SpectralWarning, match="decodes"):
        torch.testing.assert_close(key + 1, dense + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(key * 2, dense * 2)
    assert report.decodes() == 2
    report.clear()
    assert report.decodes() == 0


def test_writing_to_a_compressed_cache_is_an_error_and_not_lost() -> None:
    cache = fresh(layout_of(), 1, 9, 0, strict=False)
    key, dense = cache.layers[0][0], cache.dense[0][0]
    for write in (
        lambda: key.zero_(),
        lambda: key.mul_(2),
        lambda: key.index_fill_(2, torch.tensor([0]), 0.0),
        lambda: key.copy_(dense),
    ):
        with pytest.raises(RuntimeError, match="would write to a compressed cache, which only grows: start with a new cache"):
            write()
    torch.testing.assert_close(dense.clone().copy_(key), dense)


def test_a_handle_says_what_it_is_without_decoding() -> None:
    key, _ = fresh(layout_of(), 1, 9, 0).layers[0]
    assert repr(key) == "SpectralTensor(key, (1, 2, 9, 8), torch.float32, cpu)"
    assert key.dtype == torch.float32 and key.device.type == "cpu" and key.shape[-2] == 9


@pytest.mark.parametrize("preset", ["exact", "balanced", "seed"])
def test_appending_to_a_fork_leaves_the_other_untouched(preset: str) -> None:
    layout = layout_of(preset)
    cache = fresh(layout, 2, 25, 0)
    store = cache.layers[0][0].store
    before = [x.clone() for x in (*store.buffers, *store.timeline.tensors())]
    longer = append_in_graph(cache.layers, randn(2, 9, 1), None, None, layout)
    shorter = [(k[..., :20, :], v[..., :20, :]) for k, v in cache.layers]
    fork = append_in_graph(shorter, randn(2, 9, 2), None, None, layout)
    del shorter
    kept = [x.clone() for x in (*store.buffers, *store.timeline.tensors())]
    assert fork[0][0].store is not longer[0][0].store is store
    both = [{at for at, size in held([layers[0]]).items() if size} for layers in (longer, fork)]
    assert not both[0] & both[1]
    append_in_graph(fork, randn(2, 30, 3), None, None, layout)
    append_eagerly(fork, randn(2, 9, 4))
    for mine, was in zip((*store.buffers, *store.timeline.tensors()), kept, strict=True):
        assert torch.equal(mine, was)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, kept, strict=True))


LAYER_BY_LAYER = {
    "reorder": lambda index: lambda x: x.index_select(0, index),
    "select": lambda index: lambda x: x[index, ...],
    "crop": lambda index: lambda x: x[..., :12, :].clone(),
    "clone": lambda index: torch.clone,
    "repeat": lambda index: lambda x: x.repeat_interleave(2, dim=0),
    "append": lambda index: lambda x: torch.cat((x, torch.ones(2, HEADS, 3, DIM)), 2),
    "append to a crop": lambda index: lambda x: torch.cat((x[..., :12, :], torch.ones(2, HEADS, 3, DIM)), 2),
    "to": lambda index: lambda x: x.to(torch.bfloat16),
}


def timelines(layers: list[Pair]) -> set[int]:
    return {id(tensor.store.timeline) for pair in layers for tensor in pair}


@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_a_cache_changed_layer_by_layer_keeps_one_timeline(name: str) -> None:
    cache = fresh(layout_of(), 2, 25, 0, layers=3).layers
    old = timelines(cache)
    new = each(cache, LAYER_BY_LAYER[name](torch.tensor([1, 0])))
    assert len(old) == len(timelines(new)) == 1
    assert all(key.store is value.store for key, value in new)
    if name != "append":
        assert timelines(cache) == old != timelines(new)


@pytest.mark.parametrize("name", [name for name in LAYER_BY_LAYER if name != "append"])
def test_doing_it_twice_gives_two_caches(name: str) -> None:
    cache = fresh(layout_of(), 2, 25, 0, layers=3).layers
    change = LAYER_BY_LAYER[name](torch.tensor([1, 0]))
    first, second = each(cache, change), each(cache, change)
    assert len(timelines(first)) == len(timelines(second)) == 1
    assert not timelines(first) & timelines(second)
    assert not {id(k.store) for k, _ in first} & {id(k.store) for k, _ in second}


def test_deepcopy_keeps_one_timeline_and_shares_none() -> None:
    cache = fresh(layout_of(), 2, 25, 0, layers=3).layers
    first, second = copy.deepcopy(cache), copy.deepcopy(cache)
    assert len(timelines(first)) == len(timelines(second)) == len(timelines(cache)) == 1
    assert len(timelines(first) | timelines(second) | timelines(cache)) == 3


def test_two_copies_made_side_by_side_do_not_see_each_others_tokens() -> None:
    """Both copies of a layer are taken before the next layer is looked at."""
    layout, cache = layout_of(), fresh(layout_of(), 1, 25, 0)
    first, second = [], []
    for key, value in cache.layers:
        first.append((key.clone(), value.clone()))
        second.append((key.clone(), value.clone()))
    append_in_graph(second, randn(1, 9, 1), torch.arange(25, 34)[None], None, layout)
    check(replace(cache, layers=first))
    third = append_in_graph(first, randn(1, 9, 2), torch.arange(25, 34)[None], None, layout)
    rotated = [(turned(k, torch.arange(25, 34)[None], layout.rotary), v) for k, v in randn(1, 9, 2)]
    check(cache.grown(third, rotated, torch.ones(1, 9, dtype=torch.bool)))


def test_keys_appended_twice_before_values_are_not_lost() -> None:
    cache = fresh(layout_of(), 1, 10, 0, strict=False)
    key, dense = cache.layers[0][0], cache.dense[0][0]
    more = torch.randn(2, 1, HEADS, 3, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        twice = torch.cat((torch.cat((key, more[0]), 2), more[1]), 2)
        twice = twice.dense() if isinstance(twice, SpectralTensor) else twice
    torch.testing.assert_close(twice, torch.cat((dense, *more), 2), atol=1e-4, rtol=1e-4)


def test_eager_append_keeps_what_waits_for_a_basis() -> None:
    """Places of recent tokens are added and coding begins in the same step."""
    layout = layout_of(warmup=200)
    cache = fresh(layout, 1, 10, 0)
    chunk = [(turned(k, torch.arange(10, 260)[None], layout.rotary), v) for k, v in randn(1, 250, 1)]
    check(cache.grown(append_eagerly(cache.layers, chunk), chunk, torch.ones(1, 250, dtype=torch.bool)))


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_another_dtype_changes_only_what_is_in_the_models_dtype(preset: str) -> None:
    cache = fresh(layout_of(preset), 1, 40, 0)
    before = each(cache.layers, lambda x: x.dense())
    moved = each(cache.layers, lambda x: x.to(torch.bfloat16))
    for (key, value), (dense_k, dense_v) in zip(moved, before, strict=True):
        assert key.dtype == value.dtype == key.store.dtype == torch.bfloat16
        assert key.store.buffers.k_affine.dtype == key.store.buffers.moment.dtype == torch.float32
        assert key.store.buffers.k_exact.dtype == torch.bfloat16
        torch.testing.assert_close(value.dense(), dense_v.bfloat16(), atol=0.02, rtol=0.02)
        torch.testing.assert_close(key.dense(), dense_k.bfloat16(), atol=0.05, rtol=0.05)
    check(replace(cache, dense=before))


@pytest.mark.parametrize("preset", ["balanced", "seed"])
def test_cropping_into_the_codes_again_and_again(preset: str) -> None:
    """As a search that backtracks does; every stretch that is coded anew must find room."""
    layout = layout_of(preset, recent=0, warmup=4)
    cache = fresh(layout, 1, 60, 0).layers
    for turn in range(60):
        length = cache[0][0].shape[2]
        cache = each(cache, lambda x, end=length - 3: x[..., :end, :])
        cache = append_in_graph(cache, randn(1, 5, turn), None, None, layout)
    assert cache[0][0].shape[2] == 60 + 60 * 2
    assert all(x.dense().isfinite().all() for pair in cache for x in pair)


def test_no_segment_begins_after_what_a_crop_left() -> None:
    store = fresh(layout_of("seed", recent=0), 2, 60, 0).layers[0][0].store
    fork = store.fork(25)
    coded = fork.timeline.ledger[:, 3:4]
    assert coded.tolist() == [[23], [23]]
    assert ((fork.buffers.starts <= coded) | (fork.buffers.starts == UNUSED)).all()
    assert ((store.buffers.starts > coded) & (store.buffers.starts < UNUSED)).any()


@pytest.mark.parametrize("preset", ["exact", "balanced", "seed"])
@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
def test_token_by_token_gives_what_one_chunk_gives(preset: str, eagerly: bool) -> None:
    """The steps of no columns between the others leave nothing behind."""
    layout, ids = layout_of(preset, block=5), torch.arange(1)[None]
    cache = fresh(layout, 1, 1, 0).layers
    for length in range(1, 40):
        chunk, ids = randn(1, 1, length), torch.tensor([[length]])
        if eagerly:
            cache = append_eagerly(cache, [(turned(k, ids, layout.rotary), v) for k, v in chunk])
        else:
            cache = append_in_graph(cache, chunk, ids, None, layout)
        ready = length + 1 - layout.first_exact - layout.recent
        coded = ready // layout.block * layout.block if ready >= layout.first else 0
        for key, _ in cache:
            assert key.store.timeline.ledger[0, 2:5].tolist() == [length + 1, coded, int(ready < layout.first)]
            starts = key.store.buffers.starts[0]
            assert starts[starts < UNUSED].tolist() == list(range(0, coded, layout.segment or 100)) * (preset != "exact")


def test_the_ledger_is_read_only_when_a_segment_may_be_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row that is mostly padding, which waits long after the other."""
    layout, reads = layout_of("balanced", warmup=30), []
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :25] = 0
    cache = append_in_graph(None, randn(2, 40, 0), None, mask, layout)
    monkeypatch.setattr(Timeline, "catch_up", lambda self, real=Timeline.catch_up: reads.append(self.next_due) or real(self))
    for step in range(40):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
        cache = append_in_graph(cache, randn(2, 1, step), None, mask, layout)
    timeline = cache[0][0].store.timeline
    assert timeline.ledger[:, 4].tolist() == [0, 0]
    assert not timeline.waiting
    assert reads[0] == 0
    assert set(reads[1:20]) == {40 + 30 + 2 + 3 - 15}


def test_a_compressed_cache_is_not_pickled() -> None:
    import pickle

    with pytest.raises(TypeError, match="deepcopy"):
        pickle.dumps(fresh(layout_of(), 1, 9, 0).layers[0][0])
