"""Bytes spent where they matter: for the same sum, with no more loss."""

from __future__ import annotations

import errno
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_compile as sc
from spectral_compile.codec import Layout, Profile
from spectral_compile.codec.profile import GRADES, shipped
from spectral_compile.config import SpectralConfig
from spectral_compile.report import SpectralWarning
from tests.profiles import profile
from tests.tiny import GREEDY, build, tokens

LOSSES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
GOOD = {"kv_heads": 1, "head_dim": 2, "loss": [1], "coarse_loss": [1], "fingerprint": None}
WITH_PROFILE = ("quality", "balanced", "compact")


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def held(layout: Layout) -> float:
    """Bytes a token and group, with a share of the bases."""
    sides = (layout.k, layout.v)
    return sum(side.groups * (side.tiers.row_bytes + side.width * side.tiers.rank / 4096) for side in sides)


@settings(max_examples=30)
@given(LOSSES, st.sampled_from(WITH_PROFILE), st.sampled_from([(3, 64), (8, 128), (1, 256), (2, 80)]))
def test_no_more_bytes_and_few_kinds_of_layers(losses: list[float], preset: str, geometry: tuple[int, int]) -> None:
    uniform = SpectralConfig(preset).layout(*geometry, None)
    layouts = [
        SpectralConfig(preset, profile=profile(geometry, losses)).layout(*geometry, None, layer) for layer in range(len(losses))
    ]
    assert sum(map(held, layouts)) <= held(uniform) * len(losses) + 1e-6
    assert len(set(layouts)) <= 4
    assert all(layout.recent == uniform.recent and layout.rotary == uniform.rotary for layout in layouts)


@settings(max_examples=30)
@given(LOSSES.filter(lambda x: len(set(x)) > 1))
def test_what_suffers_more_gets_no_less(losses: list[float]) -> None:
    layouts = [SpectralConfig(profile=profile((3, 64), losses)).layout(3, 64, None, layer) for layer in range(len(losses))]
    for a, x in zip(losses, layouts, strict=True):
        for b, y in zip(losses, layouts, strict=True):
            assert a <= b or held(x) >= held(y)


def test_grades_cost_more_and_lose_less() -> None:
    for a, b in pairwise(GRADES):
        assert a.loss > b.loss
        assert sum(a.key) <= sum(b.key) and sum(a.value) <= sum(b.value)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    known = profile((2, 16), (0.5, 1e-9))
    known.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == known
    assert SpectralConfig(profile=str(tmp_path / "p.json")).profile == known


@pytest.mark.parametrize(
    "content",
    [
        "no",
        "[]",
        '{"loss": [1]}',
        json.dumps(GOOD | {"coarse_loss": []}),
        json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD | {"fingerprint": 1}),
        json.dumps(GOOD | {"kv_heads": True}),
        json.dumps(GOOD | {"head_dim": 2.0}),
        json.dumps(GOOD | {"kv_heads": 0}),
        json.dumps(GOOD | {"loss": [True]}),
        json.dumps(GOOD | {"loss": [None]}),
        json.dumps(GOOD | {"loss": [[1]]}),
        json.dumps(GOOD | {"loss": ["1"]}),
        json.dumps(GOOD | {"loss": "1"}),
        json.dumps(GOOD | {"loss": 1}),
        json.dumps(GOOD | {"loss": [float("inf")]}),
        json.dumps(GOOD | {"loss": [float("nan")]}),
        json.dumps(GOOD | {"loss": [-1]}),
        json.dumps(GOOD | {"loss": [10**400]}),
        json.dumps(GOOD).replace("[1]", "[1e999]"),
        json.dumps(GOOD).replace("[1]", f"[{'1' * 5000}]"),
        "[" * 10**5,
        '{"loss": ' * 10**5,
        b"\x80\x04binary\xff\x00",
        b"\xff\xfe",
        b"",
        json.dumps(GOOD) + " " * 2**20,
    ],
    ids=lambda content: str(content)[:40],
)
def test_what_is_no_profile_is_said(content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="profile") as raised:
        SpectralConfig(profile=tmp_path / "p.json")
    assert len(str(raised.value).splitlines()) == 1


def test_a_dictionary_is_a_profile_or_is_not() -> None:
    assert SpectralConfig(profile=GOOD).profile == Profile(1, 2, (1,), (1,))
    with pytest.raises(ValueError, match="this dictionary is no profile"):
        SpectralConfig(profile={1: 2})


def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ValueError, match="/dev/zero is no profile"):
        Profile.load("/dev/zero")


def test_a_profile_that_comes_with_the_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = shipped()
    known = SpectralConfig.parse({"profile": name}).profile
    assert (known.kv_heads, known.head_dim, len(known.loss)) == (3, 64, 30)
    monkeypatch.chdir(tmp_path)
    other = profile((2, 16), (0.5,))
    other.save(name)
    assert SpectralConfig.parse({"profile": name}).profile == other


def test_a_profile_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    profile((2, 16), (0.5,)).save(path)
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write to .*: No space left on device"):
        profile((2, 16), (0.25,)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_profile_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match=r"cannot read the profile nowhere\.json: No such file"):
        SpectralConfig(profile="nowhere.json")


@pytest.mark.parametrize("options", [{"preset": "exact"}, {"preset": "seed"}, {"key_ranks": (1, 2, 3)}])
def test_a_profile_goes_with_presets_that_have_bytes_to_divide(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a profile divides the bytes"):
        SpectralConfig(profile=profile((2, 16), (1.0,)), **options)


def test_layers_of_one_model_have_the_tiers_of_their_grade() -> None:
    model = build("llama")
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    known = profile((heads, dim), (1.0, 0.0))
    model.compile(backend=sc.spectral, options={"strict": True, "inner": "eager", "warmup": 64, "profile": known})
    out = model.generate(tokens(2, 300), max_new_tokens=40, return_dict_in_generate=True, **GREEDY)
    first, second = (layer.keys.store.layout for layer in out.past_key_values.layers)
    assert held(first) > held(second)
    assert [(graph.kind, graph.matched) for graph in sc.reports()] == [("prefill", 2), ("decode", 2)]


def test_a_profile_of_another_model_is_refused_and_the_model_runs() -> None:
    model, other = build("llama"), profile((1, 7), (1.0,) * 5)
    expected = model.generate(tokens(1, 20), max_new_tokens=5, **GREEDY)
    model.compile(backend=sc.spectral, options={"inner": "eager", "profile": other})
    with pytest.warns(SpectralWarning, match="the profile is of another model, with 5 layers of 1 KV heads"):
        assert torch.equal(model.generate(tokens(1, 20), max_new_tokens=5, **GREEDY), expected)


def test_a_layer_that_suffers_from_the_cheapest_grade_does_not_get_it() -> None:
    """What little a layer loses under fine codes says nothing of what it loses where nearly all is dropped."""
    fine, coarse = (1e-5,) * 4 + (1e-3,) * 2, (1e-1,) + (4e-5,) * 3 + (5e-3,) * 2
    known = Profile(3, 64, fine, coarse)
    layouts = [SpectralConfig("compact", profile=known).layout(3, 64, None, layer) for layer in range(6)]
    assert held(layouts[0]) > held(layouts[1]) == held(layouts[2])
