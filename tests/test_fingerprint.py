"""Profiles that are found by a model's weights, without being asked for."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile.codec import Profile
from spectral_compile.codec.profile import shipped
from spectral_compile.fingerprint import fingerprint, keep, known, path_of
from spectral_compile.report import SpectralWarning
from tests.profiles import profile
from tests.tiny import GREEDY, build, tokens

EAGER = {"strict": True, "inner": "eager", "warmup": 64}


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))
    sc.reset()


def trained(seed: int = 0) -> PreTrainedModel:
    """A tiny model whose norms are not all ones."""
    model, generator = build("llama"), torch.Generator().manual_seed(seed)
    for x in model.parameters():
        if x.ndim == 1:
            x.data += torch.randn(x.shape, generator=generator)
    return model.bfloat16()


def of(model: torch.nn.Module) -> str | None:
    return fingerprint(model.parameters())


def rows(model: PreTrainedModel, **options: object) -> list[int]:
    """Bytes of a coded token in each layer."""
    sc.reset()
    model.compile(backend=sc.spectral, options=EAGER | options)
    out = model.generate(tokens(1, 300), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    assert [(graph.kind, graph.matched) for graph in sc.reports()] == [("prefill", 2), ("decode", 2)]
    layouts = [layer.keys.store.layout for layer in out.past_key_values.layers]
    return [layout.key.row_bytes + layout.value.row_bytes for layout in layouts]


def fit(model: PreTrainedModel, losses: tuple[float, ...] = (1.0, 0.0)) -> Profile:
    config = model.config
    return profile((config.num_key_value_heads, config.head_dim), losses, of(model))


def test_a_model_is_known_by_its_vectors_in_any_dtype_and_order_and_under_adapters() -> None:
    model = trained()
    found = of(model)
    assert found is not None and of(copy.deepcopy(model).float()) == found
    assert fingerprint(reversed(list(model.parameters()))) == found
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data.zero_()  # as a matrix that is quantised may differ
    assert of(changed) == found
    assert of(peft.get_peft_model(changed, peft.LoraConfig(r=4)).eval()) == found
    assert of(trained(seed=1)) != found


def test_what_has_no_values_is_not_known() -> None:
    assert fingerprint([]) is fingerprint([torch.ones(2, 2)]) is None
    assert fingerprint([torch.ones(3, device="meta")]) is None
    assert known(None) is None


@pytest.mark.parametrize("error", [RuntimeError("Could not determine home directory."), PermissionError()])
def test_who_has_no_home_still_has_what_comes_with_the_package(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = shipped()
    whole = Profile.load(name)

    def nowhere() -> Path:
        raise error

    monkeypatch.delenv("SPECTRAL_CACHE")
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()  # of which the backend was not asked anything
    assert known(whole.fingerprint) == whole and known("0" * 32) is None


def test_graphs_say_whose_weights_they_have() -> None:
    model = trained()
    rows(model)
    assert {graph.fingerprint for graph in sc.reports()} == {of(model)}
    assert not any(graph.profiled for graph in sc.reports())


def test_a_profile_that_is_kept_is_used_without_being_asked_for() -> None:
    model = trained()
    assert len(set(rows(model))) == 1
    keep(fit(model))
    first, second = rows(model)
    assert first > second
    prefill, decode = sc.reports()
    assert prefill.profiled and not decode.profiled, "the decode step takes what it is given"
    assert "2 of 2 attention sites compressed, by a profile" in str(prefill)
    assert len(set(rows(model, profile=None))) == len(set(rows(trained(seed=1)))) == 1
    for preset in ("exact", "seed"):  # which have no bytes to divide
        assert len(set(rows(model, preset=preset))) == 1


def test_a_profile_of_other_shapes_is_left_alone() -> None:
    """Untrained models of several shapes have the same norms; nobody asked for the profile, so nothing is refused."""
    model = trained()
    keep(fit(model, (1.0, 0.0, 0.5)))
    assert len(set(rows(model))) == 1


def test_a_file_that_is_no_profile_is_said_and_the_model_runs() -> None:
    model = trained()
    path = keep(fit(model))
    assert path == path_of(of(model) or "")
    path.write_text("no profile")
    with pytest.warns(SpectralWarning, match="all layers get the same bytes: .* is no profile"):
        assert len(set(rows(model))) == 1
