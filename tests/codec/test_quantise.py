"""Properties of the codec: bytes and bounds, not fidelity on a model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_compile.codec import (
    PRESETS,
    Layout,
    Rotary,
    Tiers,
    decode,
    dequantise,
    encode,
    fit,
    key_weight,
    latent,
    norm_code,
    norm_value,
    pack,
    presets,
    quantise,
    recent_code,
    recent_value,
    residual,
    search_step,
    synthesis,
    token_scale,
    unpack,
)
from tests.budget import examples

counts = st.integers(0, 17)
tiers_strategy = st.builds(Tiers, counts, counts, counts)
BALANCED = Tiers(2, 10, 24)


def correlated(*shape: int, seed: int = 0) -> torch.Tensor:
    """Vectors whose spectrum falls off like that of keys, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(*shape, generator=generator) @ mix + torch.randn(width, generator=generator)


def coded(x: torch.Tensor, tiers: Tiers, weight: torch.Tensor | None = None) -> torch.Tensor:
    basis, affine = fit(x, torch.ones(x.shape[-1]) if weight is None else weight, tiers)
    return decode(encode(x, basis, affine, tiers), basis, affine, tiers)


def relative_error(x: torch.Tensor, tiers: Tiers) -> float:
    return ((coded(x, tiers) - x).norm() / x.norm()).item()


@given(tiers_strategy, st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**31))
def test_unpack_undoes_pack(tiers: Tiers, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_tier = ((tiers.bits8, 256), (tiers.bits4, 16), (tiers.bits2, 4))
    codes = torch.cat([torch.randint(levels, (*shape, count), generator=generator) for count, levels in per_tier], dim=-1)
    packed = pack(codes, tiers)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, tiers.row_bytes)
    assert torch.equal(unpack(packed, tiers).long(), codes)


def test_byte_order() -> None:
    packed = pack(torch.tensor([200, 0x1, 0xA, 0xF, 3, 0, 1, 2, 1]), Tiers(1, 3, 5))
    assert packed.tolist() == [200, 0xA1, 0x0F, 0b10_01_00_11, 0b01, 0, 0, 0]


@given(tiers_strategy.filter(lambda tiers: tiers.rank > 0), st.integers(1, 9), st.integers(0, 2**31))
def test_quantiser_is_within_half_a_step_unless_it_clips(tiers: Tiers, n: int, seed: int) -> None:
    coefficients = torch.randn(2, n, tiers.rank, generator=torch.Generator().manual_seed(seed))
    step = search_step(coefficients, tiers)
    half = torch.tensor([128.0] * tiers.bits8 + [8.0] * tiers.bits4 + [2.0] * tiers.bits2)
    reach = (half * step)[..., None, :]
    values = dequantise(quantise(coefficients, step, tiers), step, tiers)
    inside = coefficients.clamp(-reach, reach)
    assert (step > 0).all()
    assert ((values - inside).abs() <= step[..., None, :] * 0.5001).all()


def test_step_search_ignores_rows_of_zeros() -> None:
    coefficients = torch.randn(1, 64, BALANCED.rank)
    padded = torch.cat([torch.zeros(1, 200, BALANCED.rank), coefficients], dim=1)
    torch.testing.assert_close(search_step(padded, BALANCED), search_step(coefficients, BALANCED))


@pytest.mark.parametrize("width", [32, 64, 192, 512])
def test_eight_bits_on_all_channels_are_nearly_exact(width: int) -> None:
    # Gaussian channels get a step of 1.25 * 0.031 RMS, whose error is that over sqrt(12): 1.1 %.
    assert relative_error(correlated(1, 600, width), Tiers(width, 0, 0)) < 0.013


def test_more_bits_mean_less_error() -> None:
    x = correlated(1, 500, 64)
    rising = [Tiers(0, 0, 16), Tiers(0, 2, 20), Tiers(1, 5, 20), Tiers(2, 16, 24), Tiers(16, 32, 16), Tiers(64, 0, 0)]
    errors = [relative_error(x, tiers) for tiers in rising]
    assert errors == sorted(errors, reverse=True)


@given(st.integers(1, 80), st.sampled_from([32, 48, 80]), st.integers(0, 2**31))
@settings(max_examples=examples(10, full=30))
def test_decode_is_latent_times_synthesis(n: int, width: int, seed: int) -> None:
    x = correlated(2, n, width, seed=seed)
    tiers = Tiers(1, 6, width // 2)
    basis, affine = fit(x, torch.linspace(0.1, 3, width), tiers)
    packed = encode(x, basis, affine, tiers)
    values, matrix = latent(packed, affine, tiers), synthesis(basis, affine)
    assert (basis.dtype, basis.shape) == (torch.int8, (2, width, tiers.rank))
    assert (affine.dtype, affine.shape) == (torch.float32, (2, 2 * tiers.rank + width))
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, n, tiers.row_bytes))
    assert (values.shape, matrix.shape) == ((2, n, tiers.rank), (2, tiers.rank, width))
    torch.testing.assert_close(decode(packed, basis, affine, tiers), values @ matrix)


@pytest.mark.parametrize("width", [32, 192, 512])
def test_coefficients_are_the_least_squares_ones(width: int) -> None:
    tiers = Tiers(width // 2, 0, 0)
    x = correlated(1, 700, width)
    basis, affine = fit(x, torch.ones(width), tiers)
    best = torch.linalg.lstsq(synthesis(basis, affine).mT.double(), x.mT.double()).solution.mT
    distance = (latent(encode(x, basis, affine, tiers), affine, tiers) - best).abs() / affine[..., None, : tiers.rank]
    assert distance.quantile(0.99) < 0.51


def test_a_batch_is_coded_as_its_members_are() -> None:
    x = torch.stack([torch.stack([correlated(90, 48, seed=3 * row + group) for group in range(3)]) for row in range(2)])
    weight = torch.rand(2, 3, 48) + 0.1
    basis, affine = fit(x, weight, BALANCED)
    out = decode(encode(x, basis, affine, BALANCED), basis, affine, BALANCED)
    for index in [(row, group) for row in range(2) for group in range(3)]:
        alone = coded(x[index], BALANCED, weight[index])
        torch.testing.assert_close(out[index], alone, atol=0.02 * x.abs().max().item(), rtol=0)
        torch.testing.assert_close(residual(x, basis, affine)[index], residual(x[index], basis[index], affine[index]))


@pytest.mark.parametrize("n", [1, 2, 35])
def test_fewer_tokens_than_channels(n: int) -> None:
    x = correlated(2, n, 64)
    basis, affine = fit(x, torch.ones(64), BALANCED)
    rank = BALANCED.rank
    matrix = basis * affine[..., None, rank : 2 * rank]
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(rank).expand(2, -1, -1), atol=0.05, rtol=0)
    assert (residual(x, basis, affine) < 1e-3).all()
    assert torch.isfinite(coded(x, BALANCED)).all()


def test_one_token_comes_back() -> None:
    assert relative_error(correlated(1, 1, 64), BALANCED) < 0.02


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-4, 1e4])
def test_any_scale_stays_finite(scale: float) -> None:
    x = scale * correlated(2, 40, 64)
    basis, affine = fit(x, torch.ones(64), BALANCED)
    out = decode(encode(x, basis, affine, BALANCED), basis, affine, BALANCED)
    assert torch.isfinite(affine).all()
    assert torch.isfinite(residual(x, basis, affine)).all()
    assert (out - x).norm() <= x.norm() + 1e-6


def test_a_zero_token_among_others_and_zero_weights() -> None:
    x = correlated(1, 40, 64)
    x[:, 7] = 0
    assert torch.isfinite(coded(x, BALANCED, torch.zeros(64))).all()
    assert torch.isfinite(coded(x, BALANCED, torch.eye(64)[0])).all()


def test_weights_pay_in_the_weighted_norm() -> None:
    x, weight = correlated(1, 400, 64), torch.logspace(-1, 1, 64)
    weighted, plain = (((coded(x, BALANCED, w) - x) * weight).norm() for w in (weight, torch.ones(64)))
    assert weighted < 0.8 * plain


def test_a_weight_counts_up_to_a_factor() -> None:
    x, weight = correlated(1, 100, 48), torch.rand(48) + 0.1
    assert torch.equal(fit(x, weight, BALANCED)[0], fit(x, 4 * weight, BALANCED)[0])


def test_residual_tells_strangers_from_relatives() -> None:
    x = correlated(1, 500, 64)
    basis, affine = fit(x[:, :250], torch.ones(64), BALANCED)
    assert residual(x[:, 250:], basis, affine).item() < 0.02
    assert residual(torch.randn(1, 250, 64), basis, affine).item() > 0.2


def test_fit_is_deterministic() -> None:
    x = correlated(2, 300, 96)
    first, second = (fit(x, torch.ones(96), BALANCED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(st.floats(-15, 15), st.integers(1, 64))
def test_norm_code_is_within_half_its_step(exponent: float, width: int) -> None:
    x = torch.full((3, width), 2.0**exponent)
    ratio = norm_value(norm_code(x)) / 2.0**exponent
    assert ratio.shape == (3,)
    assert (ratio.log2().abs() <= 1 / 16 + 1e-5).all()


def test_norm_of_zero_is_safe() -> None:
    code = norm_code(torch.zeros(2, 5, 64))
    assert (code.dtype, code.tolist()) == (torch.uint8, [[0] * 5] * 2)
    assert (norm_value(code) > 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_key_weight_is_the_rms_of_a_pair(interleaved: bool) -> None:
    moment = torch.tensor([[1.0, 4.0, 9.0, 16.0, 25.0]])
    rotary = Rotary((1.0, 0.1), interleaved=interleaved)
    expected = [2.5, 2.5, 12.5, 12.5, 25.0] if interleaved else [5.0, 10.0, 5.0, 10.0, 25.0]
    torch.testing.assert_close(key_weight(moment, rotary), torch.tensor([expected]).sqrt())


def test_key_weight_without_rope_or_queries() -> None:
    assert torch.equal(key_weight(torch.tensor([[4.0, 9.0]]), None), torch.tensor([[2.0, 3.0]]))
    assert torch.equal(key_weight(torch.zeros(2, 3, 4), Rotary((1.0,))), torch.ones(2, 3, 4))


def test_loudness_is_the_fourth_root_within_bounds() -> None:
    expected = torch.tensor([[16 / 5, 1 / 5, 0.1, 3 / 5]]) ** 0.25
    torch.testing.assert_close(token_scale(torch.tensor([[16.0, 1.0, 0.0, 3.0]])), expected)
    one_of_many = token_scale(torch.tensor([[1e9] + 99 * [1.0]]))
    torch.testing.assert_close(one_of_many, torch.tensor([[50.0] + 99 * [0.1]]) ** 0.25)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_loud_token_is_coded_better(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) * torch.logspace(0, -spread, 32)
    x[:8] = torch.randn(8, 32, generator=generator)
    heard = torch.ones(400)
    heard[:8] = 3.0
    tiers = Tiers(0, 4, 8)

    def lost(token_scale: torch.Tensor | None) -> torch.Tensor:
        basis, affine = fit(x, torch.ones(32), tiers, token_scale=token_scale)
        return (decode(encode(x, basis, affine, tiers), basis, affine, tiers) - x).square().sum(1)

    assert lost(heard)[:8].mean() < 0.8 * lost(None)[:8].mean()


def nominal_bytes(layout: Layout, tokens: int) -> int:
    """One group's bytes for a stretch of tokens under one basis: codes, token norms, int8 bases and their affine rows."""
    rows = layout.key.row_bytes + layout.value.row_bytes + layout.normalised
    ranks = layout.key.rank + layout.value.rank
    return tokens * rows + layout.k.width * ranks + 4 * (2 * ranks + 2 * layout.k.width)


@pytest.mark.parametrize(
    ("name", "key", "value", "row", "ratio"),
    [
        ("quality", Tiers(12, 40, 64), Tiers(0, 24, 128), 48 + 44, 7.2),
        ("balanced", Tiers(6, 20, 48), Tiers(0, 16, 96), 28 + 32, 10.9),
        ("compact", Tiers(6, 12, 32), Tiers(0, 8, 48), 20 + 16, 18.0),
    ],
)
def test_presets_at_three_heads_of_64(name: str, key: Tiers, value: Tiers, row: int, ratio: float) -> None:
    layout = PRESETS[name].layout(kv_heads=3, head_dim=64)
    assert layout.k[:3] == layout.v[:3] == (3, 1, 192)
    assert (layout.key, layout.value) == (key, value)
    assert layout.key.row_bytes + layout.value.row_bytes == row
    assert 4096 * 192 * 2 * 2 / nominal_bytes(layout, 4096) == pytest.approx(ratio, abs=0.1)


@pytest.mark.parametrize("name", ["quality", "balanced", "compact"])
def test_heads_of_128_channels_have_the_bytes_of_three_of_64(name: str) -> None:
    """Rows are whole words, and keys of 128 channels were rounded down: ``balanced`` lost twice as much as it does now."""

    def bytes_a_channel(layout: Layout) -> float:
        return sum(side.tiers.row_bytes / side.width for side in (layout.k, layout.v))

    joint, single = PRESETS[name].layout(kv_heads=3, head_dim=64), PRESETS[name].layout(kv_heads=8, head_dim=128)
    assert single.key_group == single.value_group == 1
    assert bytes_a_channel(joint) <= bytes_a_channel(single) <= 1.05 * bytes_a_channel(joint)


@given(st.tuples(*[st.integers(0, 10)] * 3), st.integers(16, 512))
def test_most_is_the_nearest_number_of_words_or_one_more(in_32ths: tuple[int, int, int], width: int) -> None:
    nearest, most = presets.tiers(in_32ths, width), presets.tiers(in_32ths, width, most=True)
    assert nearest.row_bytes <= most.row_bytes <= nearest.row_bytes + 4


def test_seed_and_exact() -> None:
    seed = PRESETS["seed"].layout(kv_heads=3, head_dim=64)
    assert (seed.key, seed.value, seed.groups) == (Tiers(16, 0, 0), Tiers(32, 0, 0), 3)
    assert (seed.block, seed.segment, seed.warmup, seed.recent) == (512, 512, 512, 64)
    assert (seed.query_weighted, seed.normalised) == (False, False)
    assert 512 * 64 * 2 * 2 / nominal_bytes(seed, 512) == pytest.approx(4.6, abs=0.1)
    exact = PRESETS["exact"].layout(kv_heads=3, head_dim=64)
    assert exact.lossless
    assert (exact.key.rank, exact.value.rank) == (0, 0)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 16), st.integers(1, 300))
def test_any_preset_fits_any_shape(name: str, kv_heads: int, head_dim: int) -> None:
    layout = PRESETS[name].layout(kv_heads, head_dim, Rotary((1.0,)))
    for heads, groups, width, tiers in (layout.k, layout.v):
        assert (heads * groups, width) == (kv_heads, heads * head_dim)
        assert width <= max(192, head_dim)
        assert min(vars(tiers).values()) >= 0
        assert tiers.rank <= width
    assert Layout.parse(layout.spec()) == layout
    assert copy.deepcopy(layout) is layout  # or guards of Dynamo, which keep copies, compare all of it at every step


@pytest.mark.parametrize(("kv_heads", "head_dim", "group"), [(8, 128, 1), (3, 64, 3), (5, 64, 1), (4, 64, 2), (2, 320, 1)])
def test_joint_heads_fill_192_channels(kv_heads: int, head_dim: int, group: int) -> None:
    layout = PRESETS["balanced"].layout(kv_heads, head_dim)
    assert layout.key_group == layout.value_group == group


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 0.01, 1.0, 300.0]))
def test_a_window_of_bytes_rounds_to_a_part_of_the_largest_channel(seed: int, scale: float) -> None:
    x = scale * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 0
    codes, size = recent_code(x)
    assert codes.dtype == torch.int8 and size.dtype == torch.uint8 and codes.int().abs().max() <= 127
    back = recent_value(codes, size)
    assert ((back - x).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 2**0.125 * 0.501 + 2**-24).all()
