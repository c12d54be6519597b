"""What absorbing RoPE into the query leaves out, and the digits that it meets: in float64, without kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_compile.codec import PRESETS, Rotary, Tiers
from spectral_compile.codec.quantise import unpack
from spectral_compile.kernels.attend.latent.expansion import (
    CUT_OFF,
    EIGHT,
    RUN,
    STRETCH,
    TERMS,
    Expansion,
    Steps,
    coefficients,
    cut_off,
    tables,
)
from spectral_compile.kernels.attend.latent.registers import (
    constant_at,
    key_digits,
    key_sources,
    value_groups,
    value_registers,
    value_table,
)
from spectral_compile.kernels.digits import row_fields
from tests.budget import examples
from tests.stores import rotaries

LLAMA3 = tuple(5e5 ** (-i / 64) for i in range(64))
CPU = torch.device("cpu")
MANY = settings(max_examples=examples(20, full=200), deadline=None)


@MANY
@given(st.floats(0.0, 1.5))
def test_what_the_expansion_leaves_out_is_bounded(z: float) -> None:
    x = np.linspace(-1, 1, 201)
    a, b, c, d = coefficients(z)
    bound = cut_off(z) * 1.02 + 1e-12  # the terms after the first that is left out are hardly anything
    assert np.abs(a + c * x**2 - np.cos(z * x)).max() <= bound
    assert np.abs(b * x + d * x**3 - np.sin(z * x)).max() <= bound


@MANY
@given(st.sampled_from([64, 80, 96, 128, 256]).flatmap(lambda dim: st.tuples(st.just(dim), rotaries(dim))))
def test_every_channel_has_its_place_and_no_pair_is_cut_off_too_early(given_: tuple[int, Rotary | None]) -> None:
    dim, rotary = given_
    expansion = Expansion.of(rotary, dim)
    channels = [c for first, second, _ in expansion.pairs for c in (first, second) if c >= 0]
    assert sorted(channels) == list(range(dim))
    assert expansion.fast % EIGHT == expansion.medium % EIGHT == expansion.slow % EIGHT == 0
    turned = expansion.fast + expansion.medium
    for i, (first, second, frequency) in enumerate(expansion.pairs):
        if frequency:
            assert (first, second, frequency) in pairs_of(rotary)
        if i >= expansion.fast:
            assert cut_off(abs(frequency) * STRETCH / 2) <= CUT_OFF
        if i >= turned:
            assert cut_off(abs(frequency) * RUN / 2) <= CUT_OFF


def pairs_of(rotary: Rotary | None) -> set[tuple[int, int, float]]:
    assert rotary is not None
    count = len(rotary.frequencies)
    at = (lambda i: (2 * i, 2 * i + 1)) if rotary.interleaved else (lambda i: (i, i + count))
    return {(*at(i), frequency) for i, frequency in enumerate(rotary.frequencies)}


def error_of(frequencies: tuple[float, ...], fast: int, step: int, boost: float) -> float:
    """The largest error of a log-sum-exp over 512 random keys, of queries whose scores spread as ``boost`` says."""
    generator = np.random.default_rng(5)
    w = np.array(frequencies)
    worst = 0.0
    for _ in range(8):
        query, keys = generator.normal(size=(2, len(w))), generator.normal(size=(512, 2, len(w)))
        at = np.arange(512)
        distance = (at % step - step / 2)[:, None]
        middle = (at // step * step + step / 2)[:, None] * w
        q1, q2 = query[0] * np.cos(middle) + query[1] * np.sin(middle), query[1] * np.cos(middle) - query[0] * np.sin(middle)
        even, odd = q1 * keys[:, 0] + q2 * keys[:, 1], q2 * keys[:, 0] - q1 * keys[:, 1]
        exact = np.cos(w * distance) * even + np.sin(w * distance) * odd
        c = np.array([coefficients(x * step / 2) for x in w])
        x = distance / (step / 2)
        near = np.where(
            np.arange(len(w)) < fast, exact, (c[:, 0] + c[:, 2] * x**2) * even + (c[:, 1] * x + c[:, 3] * x**3) * odd
        )
        scale = boost / math.sqrt(2 * len(w))
        both = [torch.logsumexp(torch.from_numpy(s.sum(1) * scale), 0).item() for s in (near, exact)]
        worst = max(worst, abs(both[0] - both[1]))
    return worst


def test_the_truncation_is_chosen_and_not_hoped_for() -> None:
    """Of 16 fast pairs and tiles of 64 tokens, which Llama-3's frequencies once were given, what is left out shows."""
    expansion = Expansion.of(Rotary(LLAMA3), 128)
    for boost in (1.0, 3.0, 5.0):
        assert error_of(LLAMA3, expansion.fast, STRETCH, boost) < 1e-3 * boost**2 / 5
    assert cut_off(LLAMA3[16] * 64 / 2) > CUT_OFF
    assert error_of(LLAMA3, 16, 64, 5.0) > 4e-3


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
def test_powers_over_a_run_become_powers_over_a_stretch(base: float) -> None:
    rotary = Rotary(tuple(base ** (-i / 64) for i in range(64)))
    expansion = Expansion.of(rotary, 128)
    at = Steps.of(expansion.fast // EIGHT, expansion.medium // EIGHT)
    table = tables(rotary, 128, CPU).steps[at.first :].view(-1, at.words)[:, : at.turned].reshape(-1, 3, 4).numpy()
    generator = np.random.default_rng(0)
    by_run = generator.normal(size=TERMS)
    for stretch in range(RUN // STRETCH):
        pairs = table[stretch].copy().view(np.float16).reshape(3, 4, 2).astype(np.float64)
        m = np.zeros((TERMS, TERMS))
        for e in range(2):
            m[e, :2], m[2 + e, :2], m[e, 2:], m[2 + e, 2:] = pairs[e]
        assert not table[stretch, 2].any()
        x = np.linspace(-1, 1, 9)
        at = (STRETCH * stretch + STRETCH / 2 + x * STRETCH / 2 - RUN / 2) / (RUN / 2)
        near = sum((m @ by_run)[t] * x**t for t in range(TERMS))
        np.testing.assert_allclose(near, sum(by_run[t] * at**t for t in range(TERMS)), atol=4e-3)


tiers = st.builds(Tiers, st.integers(0, 9), st.integers(0, 21), st.integers(0, 40)).filter(lambda tiers: tiers.rank > 0)
of_presets = st.sampled_from(
    [PRESETS[name].layout(2, dim) for name in PRESETS if name != "exact" for dim in (64, 80, 96, 128, 256)]
)


def codes_of(rows: np.ndarray, tiers: Tiers) -> np.ndarray:
    """The codes [n, rank] of rows of bytes, less the middle of their range."""
    middles = np.repeat([127.5, 7.5, 1.5], [tiers.bits8, tiers.bits4, tiers.bits2])
    return unpack(torch.from_numpy(rows.astype(np.uint8)), tiers).numpy() - middles


def digits_of(rows: np.ndarray, tiers: Tiers) -> np.ndarray:
    """What a kernel's registers come to of keys' rows of codes [n, bytes], but for the constant."""
    out = []
    for source in key_sources(tiers):
        for mask, centre in zip(source.masks, source.centres, strict=True):
            for c in range(4):
                for i, word in enumerate((source.low, source.high)):
                    digit = rows[:, 4 * word + c] & (mask >> 16 * i & 0xFFFF)
                    out.append(digit - (centre >> 16 * i & 0x7FFF))
    return np.stack(out, 1)


@MANY
@given(tiers | of_presets.map(lambda layout: layout.key))
def test_digits_of_keys_stand_for_their_codes(tiers: Tiers) -> None:
    rows = np.random.default_rng(1).integers(0, 256, (7, tiers.row_bytes))
    digits = list(key_digits(tiers))
    assert len(digits) == EIGHT * sum(len(source.masks) for source in key_sources(tiers))
    assert digits[constant_at(tiers)].code == digits[constant_at(tiers) + 2].code == -1
    came_to = np.zeros((7, tiers.rank))
    for digit, column in zip(digits, digits_of(rows, tiers).T, strict=True):
        if digit.code >= 0:
            came_to[:, digit.code] += (column - digit.middle) / 2**digit.shift
    np.testing.assert_allclose(came_to, codes_of(rows, tiers))


@MANY
@given(tiers | of_presets.map(lambda layout: layout.value))
def test_digits_of_values_stand_for_their_codes(tiers: Tiers) -> None:
    rows = np.random.default_rng(1).integers(0, 256, (7, tiers.row_bytes + 16))  # of what lies past a row nothing counts
    table, came_to, at = value_table(tiers, CPU), np.zeros((7, tiers.rank)), 0
    held: dict[int, int] = {}
    for group in value_groups(tiers):
        bits = min(group.bits, 4)
        for register in group.registers:
            for r in range(8):
                first = group.byte + 2 * (r % group.held)
                halfword = (rows[:, first] | rows[:, first + 1] << 8) >> (bits * (r // group.held) if group.held < 8 else 0)
                digit = (halfword >> register.shift & register.mask & 0xFFFF) >> register.at
                if (code := int(table.codes[at])) >= 0:
                    came_to[:, code] += (digit - (1.5 if bits == 2 else 7.5)) * float(table.places[at])
                at += 1
            assert register.mask & 0x0000FF80 == 0, "bfloat16 has seven bits below its exponent"
        for field in range(group.fields):
            for r in range(8):
                place = group.place + field * group.stride + r
                held[place] = held.get(place, 0) + 1
    assert at == 8 * value_registers(tiers)
    np.testing.assert_allclose(came_to, codes_of(rows[:, : tiers.row_bytes], tiers))
    # every place that the merge reads is written once
    assert held == dict.fromkeys(range(sum(field.digits for field in row_fields(tiers))), 1)
