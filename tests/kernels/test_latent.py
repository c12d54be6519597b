"""Attention to coded tokens in a warp's registers against the reference, and beside rebuilt keys on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_compile.codec import PRESETS, Rotary
from spectral_compile.errors import Mistake
from spectral_compile.kernels.attend import kernel, plan
from spectral_compile.kernels.attend.latent import plan as latent
from spectral_compile.kernels.attend.latent.expansion import RUN
from spectral_compile.kernels.attend.plan import AttendPlan, ProgramSize, multiprocessors
from spectral_compile.kernels.values import NOTHING_HIDDEN, Chunk, Hidden, Past, Scoring
from tests.budget import FULL, combinations, examples
from tests.kernels.test_attend import Real, real_store
from tests.stores import PlainStore, Step, filled, moved
from tests.tiny import DEVICE

# of the whole output, beside the present form's error on the same inputs
WORSE = 1.5
ROUNDED = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # what rounding of the output alone may come to
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # the interpreter has no products of bfloat16
in_half = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Overrides of plans, of few splits: in the interpreter each takes seconds."""
    values: dict[str, int] = {"splits": 2, "exact_splits": 1} if DEVICE == "cpu" else {}
    monkeypatch.setattr(plan, "_overrides", values)
    yield values


def errors(
    store: PlainStore, step: Step, scale: float, dtype: torch.dtype, planned: dict[str, int],
    hidden: Hidden = NOTHING_HIDDEN, **how: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of each query the relative error of keys that are rebuilt, then of scores in the latent."""
    step = Step(*(x.to(dtype).float() for x in (step.query, step.key, step.value)), step.ids, step.valid)
    store.buffers = store.buffers.cast(dtype, store.layout).cast(torch.float32, store.layout)
    expected = store.attend(step, scale, hidden, **how)
    chunk = Chunk(*(x.to(dtype) for x in (step.query, step.key, step.value)), step.valid)
    past = Past(store.ledger, store.positions, store.buffers.cast(dtype, store.layout), store.layout)
    out = []
    for form in (0, 1):
        planned["latent"] = form
        kernel.taken.clear()
        given = (moved(x, DEVICE) for x in (chunk, past, Scoring(scale, **how), hidden))
        got = kernel.attend(*given).float().cpu()
        assert kernel.taken == {("rebuilt", "latent")[form]: 1}
        out.append((got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-3))
    planned.pop("latent")
    return out[0], out[1]


def assert_near(store: PlainStore, step: Step, scale: float, dtype: torch.dtype, planned: dict[str, int], **how: Any) -> None:
    chunk = Chunk(step.query.to(dtype), step.key, step.value)
    planned["latent"] = 0
    assert kernel.latent_of(store.past, chunk) is None
    planned["latent"] = 1
    assert kernel.latent_of(store.past, chunk) is not None, "else both sides are the same form"
    assert store.ledger[:, 1].min() > 0, "of tokens that are not coded there is nothing to compare"
    assert_no_worse(*errors(store, step, scale, dtype, planned, **how), dtype)


def assert_no_worse(rebuilt: Tensor, scored: Tensor, dtype: torch.dtype) -> None:
    assert scored.square().mean().sqrt() <= max(WORSE * rebuilt.square().mean().sqrt(), ROUNDED[dtype])
    assert scored.max() <= 2 * max(rebuilt.max(), ROUNDED[dtype])  # of one query chance has a part


STORES = {
    "one basis": ("balanced", 64, 1, {"head_group": 1}),
    "joint heads": ("compact", 64, 1, {"head_group": 2}),
    "joint values": ("compact", 64, 1, {"head_group": 1, "value_group": 2}),
    "joint keys": ("balanced", 64, 1, {"head_group": 2, "value_group": 1}),
    "joint values, a basis a segment": ("seed", 64, 1, {"head_group": 1, "value_group": 2}),
    "a basis a segment": ("seed", 64, 1, {}),
    "few queries": ("quality", 64, 3, {"head_group": 1}),
    "no RoPE": ("balanced", 64, 1, {"turned": 0}),
    "partial RoPE, wide": ("balanced", 128, 1, {"turned": 40, "head_group": 1}),
    "bytes beside": ("balanced", 80, 2, {"recent_bits": 8}),
    "rows": ("compact", 64, 1, {"batch": 2, "turned": 24, "head_group": 2}),
    "interleaved": ("compact", 64, 1, {"head_group": 1, "interleaved": True}),
    "many queries of a head": ("compact", 96, 4, {"head_group": 1}),
}


@in_half
@pytest.mark.parametrize("name", STORES)
def test_it_is_as_near_as_rebuilt_keys(name: str, dtype: torch.dtype, planned: dict[str, int]) -> None:
    preset, dim, new, how = STORES[name]
    store, step = filled(preset, dim, past=152 - new, new=new, **how)
    assert_near(store, step, 0.1, dtype, planned)


@in_half
def test_wide_heads(dtype: torch.dtype, planned: dict[str, int]) -> None:
    """Of 192 channels, the most whose basis has room."""
    store, step = filled("compact", 192, past=150, new=2, turned=128, head_group=1)
    assert_near(store, step, 0.1, dtype, planned)


@pytest.mark.parametrize(("preset", "dim"), [("compact", 256), ("balanced", 192), ("quality", 512)])
def test_heads_whose_basis_has_no_room_rebuild_their_keys(preset: str, dim: int, planned: dict[str, int]) -> None:
    store, step = filled(preset, dim, past=151, new=1, turned=64, head_group=1)
    assert kernel.latent_of(store.past, Chunk(step.query.half(), step.key, step.value)) is None


@in_half
def test_what_triton_has_in_shared_memory_begins_where_hopper_wants_it(dtype: torch.dtype, planned: dict[str, int]) -> None:
    """Products of 64 exact tokens were wrong on a GPU: they began 464 bytes off, behind a room of 41200."""
    store, step = filled("balanced", 128, past=151, new=1, head_group=1)
    assert latent.plan_of(store.past, Chunk(step.query.to(dtype), step.key, step.value), 4, 3).room.bytes % latent.ALIGNED == 0
    planned["exact_tile"] = 64
    assert_near(store, step, 0.1, dtype, planned)


@pytest.mark.parametrize(("preset", "new", "takes"), [("balanced", 4, True), ("balanced", 5, False), ("seed", 1, False)])
def test_it_is_taken_unasked_where_it_is_faster(preset: str, new: int, takes: bool, planned: dict[str, int]) -> None:
    store, step = filled(preset, 64, past=151, new=new)
    chunk = Chunk(step.query.half(), step.key, step.value)
    assert (kernel.latent_of(store.past, chunk) is not None) == takes
    planned["latent"] = 0
    assert kernel.latent_of(store.past, chunk) is None


def hiding(hides: str, columns: int, window: int) -> dict[str, Any]:
    """What ``assert_near`` is told to hide of so many tokens, three of them new."""
    generator = torch.Generator().manual_seed(1)
    if hides == "a window":
        return {"sliding_window": window, "softcap": 2.0}
    if hides == "padding":
        return {"hidden": Hidden(visible=(torch.rand(1, columns + 1, generator=generator) < 0.6).to(torch.uint8))}
    mask = torch.rand(1, 1, 3, columns, generator=generator) < 0.6
    return {"hidden": Hidden(mask, torch.ones(1, columns, dtype=torch.bool))}


@in_half
@pytest.mark.parametrize("hides", ["a window", "padding", "a mask"])
def test_it_sees_the_same_tokens(hides: str, dtype: torch.dtype, planned: dict[str, int]) -> None:
    store, step = filled("balanced", 64, past=149, new=3, head_group=1)
    assert_near(store, step, 0.1, dtype, planned, **hiding(hides, 152, window=50))


@in_half
def test_a_store_of_several_bases_and_joint_heads(dtype: torch.dtype, planned: dict[str, int]) -> None:
    """Halfwords of values that belong to no group's codes were counted twice where a segment ends."""
    store, step = filled("seed", 64, past=203, new=1, head_group=2)
    assert store.buffers.starts.shape[1] > 1
    assert_near(store, step, 0.1, dtype, planned)


@in_half
@pytest.mark.parametrize("boost", [1.0, 3.0, 5.0])
def test_large_queries_are_no_worse(boost: float, dtype: torch.dtype, planned: dict[str, int]) -> None:
    """Of eight queries the quotient of errors is .6 to 1.5, by chance; of 24 it is .9 to 1.1."""
    store, step = random_store(200, boost)
    size, found = step.query.square().mean().sqrt(), []
    for seed in range(3):
        step.query = size * torch.randn(step.query.shape, generator=torch.Generator().manual_seed(seed))
        found.append(errors(store, step, 128**-0.5, dtype, planned))
    assert_no_worse(*(torch.cat(x) for x in zip(*found, strict=True)), dtype)


@in_half
def test_a_segment_begins_at_any_token(dtype: torch.dtype, planned: dict[str, int]) -> None:
    """After a crop one may; codes are copied from each 32nd token on, by 16 bytes."""
    store, step = filled("seed", 80, past=191, new=1, block=33)
    assert store.buffers.starts[0, 1] * store.layout.key.row_bytes % 16
    assert_near(store, step, 0.1, dtype, planned)


@pytest.mark.slow
@in_half
@pytest.mark.parametrize("boost", [1.0, 3.0, 5.0] if FULL else [5.0])
def test_real_keys_and_large_queries(smollm2: Real, boost: float, dtype: torch.dtype, planned: dict[str, int]) -> None:
    store, step = real_store(smollm2, "balanced", 12, past=703, count=1)
    step.query *= boost
    planned |= {"splits": 1} if DEVICE == "cpu" else {}
    assert_near(store, step, 0.125, dtype, planned)


@in_half
def test_scores_far_from_any_reference(dtype: torch.dtype, planned: dict[str, int]) -> None:
    """Weights that leave float32 are computed again from the largest score."""
    store, step = random_store(120, 1.0)
    step.query[:, ::2] *= 200
    rebuilt, scored = errors(store, step, 0.3, dtype, planned)
    assert scored.isfinite().all()
    assert scored.max() <= max(2 * WORSE * rebuilt.max(), ROUNDED[dtype])


@pytest.mark.parametrize("score", [-55.3, 39.5, 55.3])
@in_half
def test_many_tokens_far_from_their_reference(score: float, dtype: torch.dtype, planned: dict[str, int]) -> None:
    """Weights of 2**55 are finite, and not the sum of 600 of them where they count from 2**64 on."""
    planned["splits"] = 1
    generator = torch.Generator().manual_seed(4)
    layout = PRESETS["balanced"].layout(1, 64)
    layout = layout.__class__(**vars(layout) | {"recent": 16, "block": 32, "warmup": 64})
    store = PlainStore.blank(layout, 1, 700)
    key = torch.randn(64, generator=generator)
    query = key * (score * math.log(2) / key.square().sum())
    for count in (699, 1):
        value = torch.randn(1, 1, count, 64, generator=generator)
        step = Step(query.expand(1, 4, count, 64), key.expand(1, 1, count, 64), value, None, None)
        store.advance(step)
        if count > 1:
            store.append(step)
    rebuilt, scored = errors(store, step, 1.0, dtype, planned)
    assert scored.isfinite().all()
    assert scored.max() <= max(2 * WORSE * rebuilt.max(), ROUNDED[dtype])


@pytest.mark.slow
@in_half
def test_a_run_longer_than_its_tables(dtype: torch.dtype, planned: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest pairs are absorbed once a run: a split of more tokens takes several."""
    store, step = random_store(4 * RUN + 100, 1.0, heads=1)
    if DEVICE == "cpu":
        planned["splits"] = 1
    assert_near(store, step, 128**-0.5, dtype, planned)


GAPS = {
    "every token": torch.arange(152) * 3 - 2 * torch.arange(152).clamp(min=12, max=110),
    "one": torch.arange(152) + 5000 * (torch.arange(152) >= 77),
    "back to the beginning": torch.cat((torch.arange(90), torch.arange(62))),
    "the same for an image": torch.cat((torch.arange(70), torch.full((9,), 70), torch.arange(71, 144))),
}


@pytest.mark.parametrize("ids", GAPS.values(), ids=GAPS)
@in_half
def test_positions_with_gaps_are_right(ids: torch.Tensor, dtype: torch.dtype, planned: dict[str, int]) -> None:
    """An expansion holds where positions run on: the device sees where they do not, and begins another there."""
    store, step = filled("balanced", 64, past=151, new=1, ids=ids, head_group=1)
    assert_near(store, step, 0.1, dtype, planned)


def random_store(past: int, boost: float, heads: int = 2) -> tuple[PlainStore, Step]:
    """Llama-3's RoPE over keys of a decaying spectrum, and a query ``boost`` times as large as theirs."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0] * torch.logspace(0.3, -1.2, 128)[:, None]
    layout = PRESETS["balanced"].layout(heads, 128, Rotary(tuple(5e5 ** (-i / 64) for i in range(64))))
    layout = layout.__class__(**vars(layout) | {"recent": 16, "block": 32, "warmup": 64})

    def some(count: int) -> Step:
        key, value = (torch.randn(1, heads, count, 128, generator=generator) @ basis for _ in range(2))
        return Step(boost * torch.randn(1, 4 * heads, count, 128, generator=generator), key, value, None, None)

    store = PlainStore.blank(layout, 1, past)
    for step in (some(past), some(1)):
        store.advance(step)
        if step.key.shape[2] > 1:
            store.append(step)
    return store, step


def test_a_step_that_is_asked_for_it_and_cannot_says_so(planned: dict[str, int]) -> None:
    """Figures of the other form, under this one's name, would be believed."""
    store, step = filled("balanced", 64, past=151, new=1)
    planned["latent"] = 1
    with pytest.raises(Mistake, match="has no form for this step: it takes float16 or bfloat16"):
        kernel.attend(*(moved(x, DEVICE) for x in (step.chunk, store.past)), Scoring(0.1))


@pytest.mark.parametrize(
    ("preset", "columns", "dtype"), combinations(["exact", "balanced"], [1, 9], [torch.float32, torch.float16])
)
def test_other_steps_are_left_alone(preset: str, columns: int, dtype: torch.dtype, planned: dict[str, int]) -> None:
    planned["latent"] = 1
    store, step = filled(preset, 64, past=152 - columns, new=columns)
    chunk = Chunk(step.query.to(dtype), step.key, step.value)
    found = latent.plan_of(store.past, chunk, 4, 3)
    assert (found is not None) == (preset == "balanced" and columns == 1 and dtype == torch.float16)


@settings(max_examples=examples(50, full=500), deadline=None)
@given(
    st.sampled_from([1, 2, 8, 32, 300]), st.sampled_from([4, 8, 16]), st.integers(0, 300_000), st.integers(1, 1000),
    st.integers(1, 6), st.integers(1, 8), st.booleans(),
)  # fmt: skip
def test_every_token_has_a_program(
    batch: int, rows: int, coded: int, exact: int, each: int, resident: int, apart: bool
) -> None:
    layout = PRESETS["balanced"].layout(8, 128)
    size = ProgramSize(resident, each, quick=True, apart=apart)
    made = AttendPlan.of(layout, batch, rows, coded, exact, torch.device("cpu"), size)
    assert (made.splits > 0) == (coded > 0)
    assert made.exact_splits > 0 and made.exact_parts >= 1 + apart
    assert made.programs >= max(made.splits, made.exact_splits)
    running = batch * layout.groups * (made.programs + made.splits * (each - 1))
    enough = resident * multiprocessors(torch.device("cpu"))
    assert running <= max(enough, batch * layout.groups * each), "else the last ones wait for the first to end"
