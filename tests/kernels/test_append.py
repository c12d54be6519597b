"""The Triton kernels that write to a store do what the reference does, in the interpreter where there is no GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_compile import codec
from spectral_compile.codec import PRESETS, Layout, Rotary, Tiers
from spectral_compile.kernels import dense, padding
from spectral_compile.kernels.advance import reference as advancing
from spectral_compile.kernels.append import reference as appending
from spectral_compile.kernels.buffers import UNUSED, Buffers, Capacity, allocate
from spectral_compile.kernels.ledger import columns_of, on_host, rows_of
from spectral_compile.kernels.values import Chunk
from tests.budget import FULL, examples
from tests.kernels.test_attend import Real, smollm2_tokens
from tests.tiny import DEVICE

pytest.importorskip("triton")

from spectral_compile.kernels.advance import kernel as advance_kernel
from spectral_compile.kernels.append import device, fit, later, together
from spectral_compile.kernels.append import kernel as append_kernel
from spectral_compile.kernels.append.basis import Fitted
from spectral_compile.kernels.append.kept import Judged
from spectral_compile.kernels.append.kernel import ChunkWriter
from spectral_compile.kernels.append.later import KeptPrompt
from spectral_compile.kernels.append.steps import Sampled, search
from spectral_compile.kernels.arguments import Geometry
from spectral_compile.kernels.importance.kernel import token_weights
from spectral_compile.kernels.importance.weights import sample

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton was imported without its interpreter", allow_module_level=True)

# KV heads, those whose keys and whose values are coded together, and channels
HEADS = [
    (1, (1, 1), 64),
    (2, (1, 1), 16),
    (2, (2, 2), 16),
    (2, (1, 2), 16),
    (2, (2, 1), 16),
    (3, (3, 3), 16),
    (2, (2, 2), 80),
    (3, (3, 3), 64),
    (4, (2, 4), 16),
]
BASES = ("quality", "balanced", "compact", "seed")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@dataclass
class Case:
    layout: Layout
    dtype: torch.dtype
    batch: int
    groups: int
    counts: list[int]
    padded: bool
    numbered: bool
    token_weighted: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn, presets: tuple[str, ...] = tuple(PRESETS), most: int = 70) -> Case:
    name = draw(st.sampled_from(presets))
    heads, joint, dim = draw(st.sampled_from(HEADS))
    block = draw(st.sampled_from([7, 32, 40]))  # of one token alone, coefficients are whole numbers of steps
    layout = replace(
        PRESETS[name],
        key_group=joint[0],
        value_group=joint[1],
        first_exact=draw(st.integers(0, 4)),
        recent=draw(st.sampled_from([0, 5])),
        block=block,
        warmup=draw(st.sampled_from([1, 20])),
        segment=block if name == "seed" else 0,
        recent_bits=16 if name == "exact" else draw(st.sampled_from([8, 16])),
    ).layout(heads, dim, draw(st.sampled_from([None, Rotary(tuple(100.0 ** (-i / (dim // 2)) for i in range(dim // 2)))])))
    if not layout.lossless and draw(st.booleans()):
        few = st.builds(Tiers, st.integers(0, 2), st.integers(1, 5), st.integers(0, 9))
        layout = replace(layout, key=draw(few), value=draw(few))
    rest = draw(st.lists(st.sampled_from([1, 1, 1, 5, 33]), max_size=3))
    return Case(
        layout=layout,
        dtype=draw(DTYPES),
        batch=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 3])),
        counts=[draw(st.sampled_from([1, 5, most])), *rest],
        padded=draw(st.booleans()),
        numbered=draw(st.booleans()),
        token_weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


class Store:
    def __init__(self, case: Case) -> None:
        layout, columns = case.layout, sum(case.counts)
        segments = columns // layout.segment + 2 if layout.segment else 3
        capacity = Capacity(columns + layout.block, layout.recent + layout.first, segments)
        self.layout = layout
        self.ledger = torch.tensor([[0, 0, 0, 0, 1, 0]], device=DEVICE).repeat(case.batch, 1)
        self.positions = torch.zeros(case.batch, columns + 1, dtype=torch.int32, device=DEVICE)
        self.buffers = allocate(layout, case.batch, capacity, case.dtype, DEVICE)


@dataclass
class Step:
    query: Tensor
    key: Tensor
    value: Tensor
    ids: Tensor | None
    valid: Tensor | None


def steps(case: Case) -> list[Step]:
    generator = torch.Generator().manual_seed(case.seed)
    layout, at, result = case.layout, 0, []
    spectrum = torch.logspace(0, -1.5, layout.head_dim, device=DEVICE, dtype=case.dtype)

    def randn(heads: int, count: int) -> Tensor:
        # as a model lays them out: tokens before heads
        x = torch.randn(case.batch, count, heads, layout.head_dim, generator=generator)
        return x.to(DEVICE, case.dtype).transpose(1, 2)

    for count in case.counts:
        if case.seed % 2:  # another spectrum in every chunk
            spectrum = spectrum[torch.randperm(layout.head_dim, generator=generator).to(DEVICE)]
        chunk = Step(
            query=randn(layout.kv_heads * case.groups, count),
            key=randn(layout.kv_heads, count) * spectrum,
            value=randn(layout.kv_heads, count),
            ids=torch.arange(at + 3, at + 3 + count, device=DEVICE)[None] if case.numbered else None,
            valid=(torch.rand(case.batch, count, generator=generator) < 0.7).to(DEVICE) if case.padded else None,
        )
        at += count
        result.append(chunk)
        if count == 1:
            result.append(Step(*(x[:, :, :0] for x in (chunk.query, chunk.key, chunk.value)), None, None))
    return result


def unpack(packed: Tensor, tiers: Tiers) -> Tensor:
    return codec.unpack(packed, tiers).int()


def chunk_of(step: Step) -> Chunk:
    return Chunk(step.query, step.key, step.value, step.valid)


def copied(store: Store) -> Buffers:
    return Buffers(*(buffer.clone() for buffer in store.buffers))


@settings(max_examples=examples(15, full=40))
@given(cases())
def test_ledgers(case: Case) -> None:
    ours, truth = Store(case), Store(case)
    for step in steps(case):
        advance_kernel.advance(ours.ledger, ours.positions, step.ids, step.valid, step.key, case.layout)
        advancing.advance(truth.ledger, truth.positions, step.ids, step.valid, step.key, case.layout)
        assert torch.equal(ours.ledger, truth.ledger)
        assert torch.equal(ours.positions[:, :-1], truth.positions[:, :-1])  # the last one is scratch


@settings(max_examples=examples(8, full=20))
@given(cases(presets=("exact",)))
def test_lossless_store(case: Case) -> None:
    ours, truth = Store(case), Store(case)
    for step in steps(case):
        advance_kernel.advance(ours.ledger, ours.positions, step.ids, step.valid, step.key, case.layout)
        device.append(chunk_of(step), ours.ledger, ours.buffers, case.layout)
        appending.append(chunk_of(step), ours.ledger, truth.buffers, case.layout)
        for name, a, b in zip(Buffers._fields, ours.buffers, truth.buffers, strict=True):
            if name == "moment":
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b), name


@settings(max_examples=examples(15, full=40))
@given(cases(presets=BASES, most=45))
def test_coded_store(case: Case) -> None:
    """Both begin the same segments; bases lose as little, and with the same bases the codes are the same."""
    layout, store = case.layout, Store(case)
    generator = torch.Generator().manual_seed(case.seed)
    # products of a GPU in bfloat16 are of numbers cut to eleven bits
    rounded = 2**-10 if DEVICE == "cuda" and case.dtype != torch.float32 else 0.0
    flips = fields = 0
    for step in steps(case):
        advance_kernel.advance(store.ledger, store.positions, step.ids, step.valid, step.key, layout)
        expected, again, ours = copied(store), copied(store), store.buffers
        token_weight = None
        if case.token_weighted and int(columns_of(store.ledger).before.max()) == 0:
            token_weight = torch.rand(case.batch, layout.groups, step.key.shape[2], generator=generator).square().to(DEVICE)
        device.append(chunk_of(step), store.ledger, ours, layout, token_weight)
        appending.append(chunk_of(step), store.ledger, expected, layout, token_weight)
        for name in ("k_exact", "v_exact", "starts"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        for side in "kv":  # sizes are rounded logarithms, which differ by one where two libraries' logarithms do
            a, b = (codec.recent_value(*(getattr(x, f"{side}_{n}") for n in ("recent", "sizes"))) for x in (ours, expected))
            assert ((a - b).abs() <= 0.01 * b.abs().amax(-1, keepdim=True)).all()
        torch.testing.assert_close(ours.moment, expected.moment, rtol=1e-5, atol=1e-5)

        for name in ("k_basis", "v_basis", "k_affine", "v_affine", "starts"):
            getattr(again, name).copy_(getattr(ours, name))
        for coded in code(step, store.ledger, again, layout):
            assert lost(coded, ours) <= 1.1 * lost(coded, expected) + 0.01
            a, b = (getattr(x, f"{coded.side}_codes")[coded.row][:, coded.slots] for x in (ours, again))
            steps_apart = (unpack(a, coded.tiers) - unpack(b, coded.tiers)).abs()
            if coded.side == "v" and layout.normalised:
                apart = ours.v_norms[coded.row][:, coded.slots].int() - again.v_norms[coded.row][:, coded.slots].int()
                assert apart.abs().max() <= 1
                steps_apart = steps_apart * (apart == 0)[..., None]
            affine = getattr(ours, f"{coded.side}_affine")[coded.row][:, coded.segment, None]
            size = (coded.x * affine[..., 2 * coded.tiers.rank :]).norm(dim=-1, keepdim=True)
            noise = rounded * size / affine[..., : coded.tiers.rank]  # of more directions than tokens some have tiny steps
            assert (steps_apart <= 1 + noise).all()
            flips += int((steps_apart > noise).sum())
            getattr(again, f"{coded.side}_codes")[coded.row][:, coded.slots] = a
        assert torch.equal(ours.k_codes, again.k_codes) and torch.equal(ours.v_codes, again.v_codes)  # no other was written
        rows = columns_of(store.ledger)
        fields += int((rows.coded_after - rows.coded).sum()) * layout.groups * (layout.key.rank + layout.value.rank)
    assert flips <= max(2, (0.02 if rounded else 0.005) * fields)


@pytest.mark.parametrize("preset", ["balanced", "seed"])
def test_long_prefill_some_at_a_time(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases are computed for some segments at a time, and steps are searched on a sample."""
    monkeypatch.setattr(fit, "_AT_ONCE", 1000)
    layout = replace(PRESETS[preset], key_group=1, value_group=1, warmup=500, recent=16).layout(1, 16)
    case = Case(layout, torch.float32, 1, 1, [3000], preset == "balanced", False, False, 0)
    store, (step,) = Store(case), steps(case)
    advance_kernel.advance(store.ledger, store.positions, None, step.valid, step.key, layout)
    expected = copied(store)
    device.append(chunk_of(step), store.ledger, store.buffers, layout)
    appending.append(chunk_of(step), store.ledger, expected, layout)
    assert torch.equal(store.buffers.starts, expected.starts)
    for side in "kv":  # the values have no spectrum: of eigenvectors that are all alike some are missed
        parts = [coded for coded in code(step, store.ledger, copied(store), layout) if coded.side == side]
        ours, truth = (sum(lost(coded, buffers) for coded in parts) for buffers in (store.buffers, expected))
        assert ours <= 1.02 * truth + 1e-4


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (2, True)])
def test_a_kept_prompt_is_stored_as_each_layer_alone(batch: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on one ledger, bases of two at once, among them one of another layout, of another dtype, and without codes."""
    first = replace(PRESETS["balanced"], key_group=1, value_group=1, warmup=20, recent=5, block=7).layout(2, 16)
    case = Case(first, torch.float32, batch, 2, [60], padded, False, True, 1)
    (step,) = steps(case)
    lossless = replace(PRESETS["exact"], recent=5, block=7, first_exact=first.first_exact).layout(2, 16)
    joint, half = replace(first, key_group=2, value_group=2), replace(case, dtype=torch.float16)
    exact = replace(case, layout=lossless)
    layers = [Store(x) for x in (case, replace(case, layout=joint), half, exact, case, case)]
    ledger = layers[0].ledger
    advance_kernel.advance(ledger, layers[0].positions, None, step.valid, step.key, first)
    monkeypatch.setattr(together, "multiprocessors", lambda device: 2 * (2 * batch * 2))
    monkeypatch.setattr(later, "_way", lambda device: together.enter)
    prompt, expected = KeptPrompt([store.buffers for store in layers]), [copied(store) for store in layers]
    for i, (store, buffers) in enumerate(zip(layers, expected, strict=True)):
        given = [x.to(store.buffers.k_exact.dtype) for x in (step.query + i, step.key.roll(i, -1), step.value * (i + 1))]
        chunk, seen = Chunk(*(x.clone() for x in given), step.valid), given[1].roll(1, 2)
        by = weights = None
        if not store.layout.lossless:
            by = Judged(sample(chunk.query, 4 // store.layout.groups, step.valid), seen, 0.25)
            weights = token_weights(*by.sampled, seen.clone(), step.valid, 0.25, store.layout.heads)
        writer = ChunkWriter(Chunk(*given, step.valid), ledger, buffers, store.layout)
        writer.add_moment(True)
        moment = store.buffers.moment.clone()  # a compiler may hand copies to operations, and write back what they become
        assert prompt.keep(chunk, ledger, moment, i, store.layout, by)
        store.buffers.moment.copy_(moment)
        torch.testing.assert_close(moment, buffers.moment)
        buffers.moment.copy_(moment)  # sums in another order make a few other codes
        device.enter(writer, on_host(ledger), weights)
        for x in (*chunk[:3], seen):
            x.fill_(float("nan"))  # a compiled graph uses their memory for something else
    assert all((store.buffers.starts == UNUSED).all() for store in layers)
    ledger.zero_()  # the next step advances it
    prompt.store()
    for store, buffers in zip(layers, expected, strict=True):
        for name, a, b in zip(Buffers._fields, store.buffers, buffers, strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-2, atol=5e-3, msg=name)
            else:  # sums over other spans of tokens are rounded otherwise
                assert (a != b).sum() <= 0.01 * a.numel(), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 12, 29] if FULL else [12])
def test_real_keys_and_values_lose_what_they_lose_with_eigh(smollm2: Real, number: int) -> None:
    seen = smollm2_tokens(smollm2, 1100, number)
    frequencies = tuple(smollm2[0].config.rope_parameters["rope_theta"] ** (-2 * i / 64) for i in range(32))
    layout = replace(PRESETS["balanced"], warmup=256).layout(3, 64, Rotary(frequencies))
    store = Store(Case(layout, torch.float32, 1, 3, [1100], False, False, True, 0))
    step = Step(*(x.to(DEVICE) for x in (seen.query, seen.key, seen.value)), None, None)
    advance_kernel.advance(store.ledger, store.positions, None, None, step.key, layout)
    expected, asking = copied(store), sample(step.query, step.query.shape[1] // layout.groups, None)
    weights = token_weights(*asking, step.key, None, 0.125, layout.heads)
    device.append(chunk_of(step), store.ledger, store.buffers, layout, weights)
    appending.append(chunk_of(step), store.ledger, expected, layout, weights)
    for coded in code(step, store.ledger, copied(store), layout):
        assert lost(coded, store.buffers) <= 1.02 * lost(coded, expected)


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch that a GPU would run kernels for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_of_a_prompt_is_at_most_ten_launches(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 350 on a GPU, by a host that takes longer for them than a small model's layers do."""
    layout = replace(PRESETS["balanced"], warmup=20, recent=5).layout(2, 16)
    case = Case(layout, torch.float32, 1, 2, [60], False, False, True, 1)
    store, (step,) = Store(case), steps(case)
    step.valid = torch.ones(1, 60, dtype=torch.bool, device=DEVICE)  # as ``generate`` passes it where nothing is padded
    advance_kernel.advance(store.ledger, store.positions, None, step.valid, step.key, layout)
    on_host(store.ledger)
    kernels: list[str] = []
    run = lambda self, *args, **kwargs: kernels.append(self.fn.__name__)  # noqa: E731
    monkeypatch.setattr(type(append_kernel._append_kernel), "run", run)
    sample(step.query, step.query.shape[1] // layout.groups, None).copied()  # another layer has asked in which columns
    with padding.unpadded(not padded), Operations() as operations:
        valid = padding.asked(step.valid)
        asking = sample(step.query, step.query.shape[1] // layout.groups, valid)
        weights = token_weights(*asking, step.key, valid, 0.1, layout.heads)
        device.append(chunk_of(step)._replace(valid=valid), store.ledger, store.buffers, layout, weights)
    launched = kernels + [name for name in operations.names if name != "_local_scalar_dense"]
    assert len(kernels) == 8, kernels
    assert (len(launched) <= 10) == (not padded), launched
    kernels.clear()
    with later.keeping([store.buffers]), padding.unpadded(not padded), Operations() as operations:
        chunk = chunk_of(step)._replace(valid=valid)
        judged = later.judged(chunk, store.ledger, layout, step.key, 0.1)
        assert later.kept(chunk, store.ledger, store.buffers.moment, 0, layout, judged)
    waiting = [name for name in operations.names if name not in ("_local_scalar_dense", "clone")]  # what all layers share
    assert not kernels and (waiting == ["_foreach_copy_", "linalg_vector_norm", "pow_", "gather"]) == (not padded)


def test_other_tokens_begin_a_segment() -> None:
    """Only where the old basis no longer serves, row by row."""
    layout = replace(PRESETS["compact"], key_group=1, value_group=1, first_exact=1, recent=3, block=4, warmup=40).layout(1, 16)
    case = Case(layout, torch.float32, 2, 1, [200, 200], False, False, False, 0)
    store, both = Store(case), steps(case)
    both[1].key[1] = both[1].key[1].flip(-1)
    for step in both:
        advance_kernel.advance(store.ledger, store.positions, None, None, step.key, layout)
        expected = copied(store)
        device.append(chunk_of(step), store.ledger, store.buffers, layout)
        appending.append(chunk_of(step), store.ledger, expected, layout)
        assert torch.equal(store.buffers.starts, expected.starts)
    assert (store.buffers.starts < UNUSED).sum(1).tolist() == [1, 2]


class Coded(NamedTuple):
    """What a segment of a row got in one step: tokens float32 [G, n, W] as they were before coding."""

    row: int
    side: str
    segment: int
    slots: Tensor
    x: Tensor
    tiers: Tiers


def code(step: Step, ledger: Tensor, buffers: Buffers, layout: Layout) -> list[Coded]:
    """Code what the step codes, with the codec and in the segments that are there."""
    result = []
    for row, (before, coded, _, coded_after, *_) in enumerate(rows_of(ledger)):
        first = max(before - layout.first_exact, 0)
        starts = [s for s in buffers.starts[row].tolist() if s < coded_after]
        for segment, (a, b) in enumerate(pairwise([*starts, coded_after])):
            slots = torch.arange(max(a, coded), max(b, coded), device=ledger.device)
            for side, new, how in (("k", step.key[row], layout.k), ("v", step.value[row], layout.v)):
                if not len(slots):
                    continue
                if step.valid is not None:
                    new = new[:, step.valid[row]]
                names = ("codes", "basis", "affine")
                codes, basis, affine = (getattr(buffers, f"{side}_{name}")[row] for name in names)
                basis = basis.mT
                held, fresh = slots[slots < first], slots[slots >= first]
                kept = dense.recent(row, side, held, buffers, layout)
                x = torch.cat((kept, new[:, fresh + layout.first_exact - before]), 1)
                x = dense.group(x, how).float()
                if side == "v" and layout.normalised:
                    buffers.v_norms[row, :, slots] = codec.norm_code(x)
                    x = x / codec.norm_value(codec.norm_code(x))[..., None]
                codes[:, slots] = codec.encode(x, basis[:, segment], affine[:, segment], how.tiers)
                result.append(Coded(row, side, segment, slots, x, how.tiers))
    return result


def lost(coded: Coded, buffers: Buffers) -> float:
    """The share of the weighted energy that is lost in codes."""
    packed, basis, affine = (getattr(buffers, f"{coded.side}_{x}")[coded.row] for x in ("codes", "basis", "affine"))
    basis = basis.mT
    held = codec.decode(packed[:, coded.slots], basis[:, coded.segment], affine[:, coded.segment], coded.tiers)
    weight = affine[:, coded.segment, None, 2 * coded.tiers.rank :]
    return float(((held - coded.x) * weight).square().sum() / (coded.x * weight).square().sum())


@given(st.integers(1, 200), st.sampled_from([(1, 5, 9), (0, 2, 30), (3, 0, 0), (0, 16, 2)]), st.integers(0, 2**31))
@settings(max_examples=examples(8, full=15), deadline=None)
def test_steps_are_those_of_the_codec(count: int, bits: tuple[int, int, int], seed: int) -> None:
    tiers, generator = Tiers(*bits), torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, count, tiers.rank, generator=generator) * torch.logspace(1, -3, tiers.rank)
    x[0, :, count // 2 :] = 0
    layout = replace(PRESETS["balanced"].layout(2, tiers.rank), key=tiers, value=tiers, key_group=1, value_group=1)
    fitted = Fitted.blank(allocate(layout, 1, Capacity(1, 1, 1), torch.float32, DEVICE), 1, 1)
    sampled = Sampled(x.to(DEVICE), (x != 0).any(-1).to(DEVICE, torch.uint8), 1)
    search(sampled, fitted, Geometry.of(layout, 2), 1.5)
    steps = torch.stack([affine[0, :, 0, : tiers.rank] for affine in fitted.tensors[2:]]).cpu() / 1.5
    expected = codec.search_step(x, tiers)
    torch.testing.assert_close(steps, expected, rtol=1e-5, atol=0)
