"""Attention in Triton against the reference, for random stores, in the interpreter or on the GPU that is there."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile.codec import PRESETS, Layout, Rotary, Tiers
from spectral_compile.errors import Mistake
from spectral_compile.kernels.attend import coded, kernel, plan
from spectral_compile.kernels.attend.plan import AttendPlan
from spectral_compile.kernels.buffers import Buffers, Capacity, allocate
from spectral_compile.kernels.digits import HALFWORDS, INTERPRETED, row_fields
from spectral_compile.kernels.ledger import columns_of
from spectral_compile.kernels.rotary import TILE
from spectral_compile.kernels.values import NOTHING_HIDDEN, Hidden, Scoring
from spectral_compile.models import prompt as real_text
from spectral_compile.passes.edges import too_wide
from tests.budget import combinations, examples
from tests.stores import Case, PlainStore, Step, by_kernels, cases, filled, moved, tokens_of
from tests.tiny import DEVICE

Real = tuple[PreTrainedModel, PreTrainedTokenizerBase]
FEW = settings(max_examples=examples(5, full=9), deadline=None)  # the interpreter is slow


def stays_dense(layout: Layout) -> str | None:
    """Why a layer in float32 stays dense on the GPU that is there, if so."""
    if DEVICE == "cpu":
        return None
    return too_wide(layout, torch.float32, torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin)


attended = cases(most=examples(2, full=3), chunks=examples(3, full=6)).filter(lambda case: stays_dense(case.layout) is None)


def assert_same(got: Tensor, expected: Tensor, step: Step) -> None:
    for row in range(len(got)):
        keep = tokens_of(step, row)
        torch.testing.assert_close(got[row][:, keep], expected[row][:, keep], atol=2e-4, rtol=2e-4)


@FEW
@given(attended)
def test_attend_equals_the_reference(case: Case) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    for step in case.chunks:
        store.advance(step)
        assert_same(by_kernels(store, step, case.scale), store.attend(step, case.scale), step)
        store.append(step)


@FEW
@given(attended, st.sampled_from([0.0, 0.3, 30.0]), st.booleans())
def test_capped_scores_and_sinks_equal_the_reference(case: Case, softcap: float, sinks: bool) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    sink_score = torch.linspace(-2.0, 3.0, case.layout.kv_heads * case.groups) if sinks else None
    for step in case.chunks:
        store.advance(step)
        expected = store.attend(step, case.scale, softcap=softcap, sink_score=sink_score)
        got = by_kernels(store, step, case.scale, softcap=softcap, sink_score=sink_score)
        assert_same(got, expected, step)
        store.append(step)


@FEW
@given(attended, st.integers(1, 30))
def test_windows_hide_the_same_tokens(case: Case, window: int) -> None:
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    for step in case.chunks:
        store.advance(step)
        expected = store.attend(step, case.scale, sliding_window=window)
        assert_same(by_kernels(store, step, case.scale, sliding_window=window), expected, step)
        store.append(step)


@FEW
@given(attended, st.integers(0, 2**31))
def test_masks_hide_the_same_tokens(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = PlainStore.blank(case.layout, case.batch, case.columns)
    held = torch.zeros(case.batch, case.columns, dtype=torch.bool)
    at = 0
    for step in case.chunks:
        count = step.key.shape[2]
        rows = case.batch if seed % 2 else 1
        room = seed % 3 * 17  # that a static cache has for what is to come
        mask = torch.rand(rows, 1, count, at + room + count, generator=generator) < 0.6
        store.advance(step)
        hidden = Hidden(mask, held)
        assert_same(by_kernels(store, step, case.scale, hidden), store.attend(step, case.scale, hidden), step)
        store.append(step)
        held[:, at : at + count] = True if step.valid is None else step.valid
        at += count


def keep_one_basis(store: PlainStore) -> None:
    """Take the room for other bases than the first away, as a store has it that needs no more."""
    assert store.buffers.starts.shape[1] > 1
    one = Capacity(store.buffers.k_codes.shape[2], store.buffers.recent_slots(store.layout), 1)
    fewer = allocate(store.layout, store.ledger.shape[0], one, torch.float32, "cpu")
    smaller = (x[tuple(map(slice, y.shape))] for x, y in zip(store.buffers, fewer, strict=True))
    store.buffers = Buffers(*(x.contiguous() for x in smaller))


@pytest.mark.parametrize(("preset", "dim"), combinations(list(PRESETS), [64, 80, 96, 128, 256]))
def test_every_head_dim_and_preset(preset: str, dim: int) -> None:
    store, step = filled(preset, dim, past=190, new=1)
    if why := stays_dense(store.layout):
        pytest.skip(f"such a layer stays dense: {why}")
    assert_same(by_kernels(store, step, 0.1), store.attend(step, 0.1), step)


@pytest.mark.parametrize("new", [1, 3, 40])
def test_positions_with_gaps(new: int) -> None:
    """The table of rotations knows distances within a tile: a jump inside of one is none of them."""
    ids = torch.arange(200 + new)
    ids[100:] += 10**5
    ids[150:] -= 3 * TILE
    store, step = filled("balanced", 64, past=200, new=new, ids=ids)
    assert columns_of(store.ledger).gaps[0] >= 2
    assert_same(by_kernels(store, step, 0.1), store.attend(step, 0.1), step)


@pytest.mark.parametrize(
    ("preset", "turned", "masked", "new"), combinations(["balanced", "seed"], [0, 32, 64], [False, True], [1, 3])
)
def test_masks_and_channels_that_rope_leaves_alone(preset: str, turned: int, masked: bool, new: int) -> None:
    store, step = filled(preset, 64, past=190, new=new, turned=turned)
    hidden = NOTHING_HIDDEN
    if masked:
        mask = torch.rand(1, 1, new, 190 + new, generator=torch.Generator().manual_seed(0)) < 0.6
        hidden = Hidden(mask, torch.ones(1, 190, dtype=torch.bool))
    assert_same(by_kernels(store, step, 0.1, hidden), store.attend(step, 0.1, hidden), step)


def test_every_split_finds_its_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts of segments are compared some at a time: in the interpreter so few that there are more of them."""
    if INTERPRETED:
        monkeypatch.setattr(coded, "_SEGMENTS_AT_ONCE", tl.constexpr(2))
    store, step = filled("seed", 64, past=450, new=1)
    assert int((store.buffers.starts < columns_of(store.ledger).coded[0]).sum()) == 7
    assert_same(by_kernels(store, step, 0.1), store.attend(step, 0.1), step)


def test_many_queries_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    store, step = filled("balanced", 64, past=150, new=50, batch=2)
    monkeypatch.setattr(plan, "_SCRATCH", 1)
    assert_same(by_kernels(store, step, 0.1), store.attend(step, 0.1), step)


@pytest.mark.parametrize(
    "preset, count, latent_out", [("balanced", 1, False), ("balanced", 1, True), ("seed", 1, False), ("balanced", 3, False)]
)
def test_many_splits_are_merged_in_turns(preset: str, count: int, latent_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few KV heads a long past has hundreds of splits: all at once they took 5 KB of stack in each thread."""
    store, step = filled(preset, 64, past=500, new=count)
    if latent_out:
        keep_one_basis(store)
    launched: list[dict[str, Any]] = []
    merge_kernel = kernel.merge_kernel

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **constants: launched.append(constants) or merge_kernel[grid](*given, **constants)

    monkeypatch.setattr(kernel, "merge_kernel", Watched())
    monkeypatch.setattr(plan, "_MERGED", 64)
    assert_same(by_kernels(store, step, 0.1), store.attend(step, 0.1), step)
    (constants,) = launched
    assert constants["P"].AT_ONCE < constants["P"].SPLITS and constants["F"].latent_out == latent_out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, of what is done again
@pytest.mark.parametrize("scale", [3.0, 40.0])
@pytest.mark.parametrize("preset", ["seed", "balanced"])
def test_scores_far_from_any_reference(preset: str, scale: float) -> None:
    """Exponentials count from a reference that is not the maximum: one that is too far off must be found and replaced."""
    store, step = filled(preset, 64, past=190, new=3)
    assert_same(by_kernels(store, step, scale), store.attend(step, scale), step)


def attends_and_enters(store: PlainStore, step: Step) -> None:
    expected = store.attend(step, 0.1)
    step_there, past = moved(step.chunk, DEVICE), moved(store.past, DEVICE)
    got = kernel.attend(step_there, past, Scoring(0.1), enters=True)
    assert_same(got.cpu(), expected, step)
    store.append(step)
    for name, mine, theirs in zip(Buffers._fields, past.buffers, store.buffers, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, msg=name)


@pytest.mark.parametrize(("preset", "past"), combinations([*PRESETS, "balanced in bytes"], [190, 211, 214, 216]))
def test_a_step_of_one_column_attends_and_enters(preset: str, past: int) -> None:
    preset, recent_bits = preset.split()[0], 8 if "bytes" in preset else 16
    attends_and_enters(*filled(preset, 64, past=past, new=1, batch=2, recent_bits=recent_bits))


@pytest.mark.parametrize(("preset", "coders"), combinations(["exact", "quality", "balanced", "compact"], [1, 2, 3]))
def test_a_step_that_codes_attends_and_enters(preset: str, coders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no longer recent is coded beside the attention; with ``seed`` it never is, since steps begin segments there."""
    recent_bits = 8 if preset == "balanced" else 16
    store, step = filled(preset, 64, past=PRESETS[preset].first_exact + 211, new=1, batch=2, recent_bits=recent_bits)
    before = columns_of(store.ledger).coded.clone()
    exact = 2 * coders  # programs for one tile of keys and one of values
    monkeypatch.setattr(plan, "_overrides", {"exact_splits": exact, "coders": 1 if preset == "exact" else coders})
    attends_and_enters(store, step)
    assert bool((columns_of(store.ledger).coded_after == before + 32).all())


@pytest.mark.parametrize(("preset", "past"), [("balanced", 215), ("seed", 190)])  # the first step codes
def test_programs_that_take_coded_tokens_and_exact_ones(preset: str, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large batches programs for what is exact alone would leave a GPU's multiprocessors idle."""
    made, plans = AttendPlan.of, []
    monkeypatch.setattr(AttendPlan, "of", lambda *how: plans.append(made(*how)) or plans[-1])
    monkeypatch.setattr(plan, "multiprocessors", lambda device: 2)
    for tiles in (10**6, 0):
        monkeypatch.setattr(plan, "_PASS", tiles)
        attends_and_enters(*filled(preset, 64, past=past, new=1, recent_bits=8))
    apart, together = plans
    assert apart.programs == apart.splits + apart.exact_splits
    assert together.programs == together.splits > apart.splits and together.exact_splits > 1


PLANS: list[dict[str, Any]] = [
    {"splits": 1, "exact_splits": 5},
    {"splits": 7, "exact_splits": 2, "programs": 7, "exact_tile": 32},
    {"tile": 32, "exact_tile": 16},
    {"tile": 64, "stages": 1, "coders": 2},
]


@pytest.mark.parametrize(("preset", "values"), combinations(["balanced", "seed", "exact"], PLANS))
def test_any_plan_gives_the_same(preset: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_overrides", {})
    plan.override(values)
    attends_and_enters(*filled(preset, 64, past=190, new=1))
    step = filled(preset, 64, past=190, new=3)
    assert_same(by_kernels(*step, 0.1), step[0].attend(step[1], 0.1), step[1])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split": 3}, "--plan knows no 'split': it has tile, splits"),
        ({"splits": 0}, "--plan splits must be an integer of at least 1, not 0"),
        ({"latent": 2}, "--plan latent must be 0 or 1, not 2"),
        ({"tile": 24}, "--plan tile must be 16, 32 or 64, not 24"),
        ({"warps": 3}, "--plan warps must be 1, 2, 4, 8 or 16, not 3"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(values: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_overrides", {})
    with pytest.raises(Mistake, match=said):
        plan.override(values)
    assert not plan._overrides


def test_a_plan_of_too_few_programs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_overrides", {"splits": 4, "exact_splits": 1, "programs": 2})
    with pytest.raises(Mistake, match="--plan programs must be at least 4, not 2"):
        by_kernels(*filled("balanced", 64, past=190, new=1), 0.1)


def test_a_step_with_one_basis_for_all_tokens_leaves_its_product_for_the_end() -> None:
    store, step = filled("balanced", 64, past=190, new=1, batch=2)
    keep_one_basis(store)
    assert_same(by_kernels(store, step, 0.1), store.attend(step, 0.1), step)


TIERS = [Tiers(3, 5, 9), Tiers(0, 0, 7), Tiers(1, 0, 0), Tiers(0, 16, 0), Tiers(16, 30, 18), Tiers(4, 24, 48), Tiers(0, 8, 80)]


@pytest.mark.parametrize("tiers", TIERS)
def test_row_fields_cover_every_halfword_once(tiers: Tiers) -> None:
    fields = row_fields(tiers)
    covered = [halfword for first, count, _, _ in fields for halfword in range(first, first + count)]
    assert covered == list(range(tiers.row_bytes // 2))
    for first, count, padded, bits in fields:
        assert HALFWORDS <= padded >= count
        assert padded & (padded - 1) == 0
        assert padded * 16 // bits >= 16
        assert bits == 2 or 2 * (first + count) <= tiers.bits8 + -(-tiers.bits4 // 2) or not tiers.bits2
        assert (bits == 8) == (tiers.bits4 == tiers.bits2 == 0)


def close_in(dtype: torch.dtype, bound: float, store: PlainStore, step: Step, scale: float) -> None:
    """The relative error of attention in ``dtype`` is under ``bound``, against the reference in single on what it is given."""
    rounded = store.buffers.cast(dtype, store.layout)
    store.buffers = rounded.cast(torch.float32, store.layout)
    half = Step(*(x.to(dtype) for x in (step.query, step.key, step.value)), None, None)
    expected = store.attend(Step(*(x.float() for x in (half.query, half.key, half.value)), None, None), scale)
    store.buffers = rounded
    got = by_kernels(store, half, scale).float()
    assert (got - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize(("preset", "count", "size"), combinations(["seed", "balanced"], [1, 3], [1e-5, 1.0, 1.2e4]))
def test_keys_of_any_size_fit_float16(preset: str, count: int, size: float) -> None:
    """Coded keys are computed in float16, in which those of some models would overflow and others be nothing."""
    store, step = filled(preset, 64, past=190, new=count, key_size=size)
    close_in(torch.float16, 2e-3, store, step, 0.1 / size)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
in_half = pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "f16"])


@pytest.mark.gpu
@on_gpu
@in_half
@pytest.mark.parametrize("count, dim", [(1, 64), (1, 128), (40, 64), (40, 256)])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_half_precision_is_near_the_reference_in_single(
    preset: str, count: int, dim: int, dtype: torch.dtype, bound: float
) -> None:
    close_in(dtype, bound, *filled(preset, dim, past=500, new=count, batch=2), 0.1)


@pytest.mark.gpu
@on_gpu
@in_half
@pytest.mark.parametrize("count, dim", [(1, 64), (1, 128), (40, 128), (40, 256)])
def test_half_precision_with_recent_tokens_in_bytes(count: int, dim: int, dtype: torch.dtype, bound: float) -> None:
    close_in(dtype, bound, *filled("balanced", dim, past=500, new=count, batch=2, recent_bits=8), 0.1)


@pytest.mark.gpu
@on_gpu
@in_half
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dim, head_group", [(80, 1), (80, 2), (96, 1), (96, 2), (128, 1), (128, 2), (256, 1)])
def test_half_precision_of_other_head_dims(dim: int, count: int, head_group: int, dtype: torch.dtype, bound: float) -> None:
    close_in(dtype, bound, *filled("balanced", dim, past=500, new=count, head_group=head_group), 0.1)


@functools.cache
def smollm2_tokens(smollm2: Real, count: int, number: int) -> Step:
    """What attention in layer ``number`` is given of ``count`` tokens of text, before RoPE."""
    model, tokenizer = smollm2
    ids = real_text(tokenizer, count)[:, :count]
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[number].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return Step(
        *(seen[name].float().unflatten(-1, (-1, 64)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")), None, None
    )


def real_store(
    smollm2: Real, preset: str, number: int, past: int, count: int, head_group: int | None = None
) -> tuple[PlainStore, Step]:
    """A store of SmolLM2's keys and values, and a step that follows."""
    step = smollm2_tokens(smollm2, past + count, number)
    frequencies = tuple(smollm2[0].config.rope_parameters["rope_theta"] ** (-2 * i / 64) for i in range(32))
    chosen = PRESETS[preset] if head_group is None else replace(PRESETS[preset], key_group=head_group, value_group=head_group)
    layout = replace(chosen.layout(3, 64, Rotary(frequencies)), warmup=256, segment=0)
    store = PlainStore.blank(layout, 1, past + count)
    first, second = (
        Step(*(x[:, :, part].contiguous() for x in (step.query, step.key, step.value)), None, None)
        for part in (slice(past), slice(past, None))
    )
    store.advance(first)
    store.append(first)
    store.advance(second)
    return store, second


@pytest.mark.parametrize(("preset", "head_group"), combinations(["balanced", "seed"], [3, 1]))
def test_a_step_over_a_real_cache(smollm2: Real, preset: str, head_group: int) -> None:
    store, step = real_store(smollm2, preset, 12, past=700, count=1, head_group=head_group)
    if why := stays_dense(store.layout):
        pytest.skip(f"such a layer stays dense: {why}")
    assert_same(by_kernels(store, step, 0.125), store.attend(step, 0.125), step)


@pytest.mark.gpu
@on_gpu
@in_half
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("number", [0, 12, 29])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_half_precision_over_a_real_cache(
    smollm2: Real, preset: str, number: int, count: int, dtype: torch.dtype, bound: float
) -> None:
    close_in(dtype, bound, *real_store(smollm2, preset, number, past=2000, count=count), 0.125)
