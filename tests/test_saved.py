"""A cache that was saved goes on as the one that was not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

import spectral_compile as sc
from spectral_compile import load_cache, memory_stats, reports, save_cache
from spectral_compile.errors import Mistake
from spectral_compile.outputs import cache_argument, cache_of
from spectral_compile.tensor import SpectralTensor, store_of
from tests.tiny import WINDOWS, build, tokens

OPTIONS = {"inner": "eager", "strict": True, **WINDOWS}


def compiled(kind: str = "llama", **options: Any) -> PreTrainedModel:
    sc.reset()
    model = build(kind)
    model.compile(backend=sc.spectral, options={**OPTIONS, "strict": kind == "llama", **options})
    return model


@torch.no_grad()
def filled(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> Cache:
    cache = DynamicCache(config=model.config)
    model(ids, use_cache=True, **cache_argument(cache), **inputs)
    return cache


@torch.no_grad()
def goes_on(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of some tokens at once, and of eight steps."""
    out = [model(ids, use_cache=True, **cache_argument(cache), **inputs).logits[:, -1:]]
    for _ in range(8):
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        out.append(model(out[-1].argmax(-1), use_cache=True, **cache_argument(cache), **inputs).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("preset", ["balanced", "seed", "exact"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_was_saved_goes_on_bit_for_bit(kind: str, preset: str, tmp_path: Path) -> None:
    model = compiled(kind, preset=preset)
    cache = filled(model, tokens(1, 60))
    save_cache(cache, tmp_path / "cache")
    held = memory_stats(cache)
    again = load_cache(tmp_path / "cache", model)
    assert memory_stats(again).stored_bytes <= held.stored_bytes
    assert any(isinstance(layer.keys, SpectralTensor) for layer in again.layers)
    assert torch.equal(goes_on(model, again, tokens(1, 5)), goes_on(model, cache, tokens(1, 5)))
    assert [graph.matched for graph in reports()] == [graph.matched for graph in reports()][:1] * len(reports())


@pytest.mark.parametrize("short", [True, False])
def test_rows_with_padding_before_and_after_their_first_basis(short: bool, tmp_path: Path) -> None:
    model = compiled()
    count = 6 if short else 70
    mask = torch.ones(2, count, dtype=torch.int64)
    mask[1, : count // 3] = 0
    cache = filled(model, tokens(2, count), attention_mask=mask)
    save_cache(cache, tmp_path / "cache")
    again = load_cache(tmp_path / "cache", model)
    longer = torch.cat((mask, mask.new_ones(2, 9)), 1)
    one, other = (goes_on(model, x, tokens(2, 9), attention_mask=longer) for x in (cache, again))
    assert torch.equal(one, other)


def test_a_fork_a_crop_and_a_batch_of_what_was_loaded(tmp_path: Path) -> None:
    model = compiled()
    cache = filled(model, tokens(1, 64))
    save_cache(cache, tmp_path / "cache")
    for change in (copy.deepcopy, lambda x: x.crop(-7), lambda x: x.batch_repeat_interleave(3)):
        ours, theirs = load_cache(tmp_path / "cache", model), copy.deepcopy(cache)
        ours, theirs = (change(x) or x for x in (ours, theirs))
        ids = tokens(len(ours.layers[0].keys), 5)
        assert torch.equal(goes_on(model, ours, ids), goes_on(model, theirs, ids))


def test_saving_changes_nothing_and_loading_does_not_change_the_file(tmp_path: Path) -> None:
    model = compiled()
    cache, other = filled(model, tokens(1, 64)), filled(model, tokens(1, 64))
    save_cache(cache, tmp_path / "cache")
    content = (tmp_path / "cache").read_bytes()
    assert torch.equal(goes_on(model, cache, tokens(1, 5)), goes_on(model, other, tokens(1, 5)))
    goes_on(model, load_cache(tmp_path / "cache", model), tokens(1, 40))
    assert (tmp_path / "cache").read_bytes() == content


def test_another_process_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
from spectral_compile import load_cache, save_cache
from tests.test_saved import OPTIONS, filled, goes_on
from tests.tiny import tokens
model = AutoModelForCausalLM.from_pretrained({str(tiny_folder)!r}).eval()
model.compile(backend="spectral", options=OPTIONS)
if sys.argv[1] == "save":
    cache = filled(model, tokens(1, 64) % 128)
    save_cache(cache, {str(tmp_path / "cache")!r})
else:
    cache = load_cache({str(tmp_path / "cache")!r}, model)
torch.save(goes_on(model, cache, tokens(1, 3) % 128), {str(tmp_path)!r} + "/" + sys.argv[1])
"""
    for what in ("save", "load"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", program, what], check=True, cwd=Path(__file__).parents[1])
    assert torch.equal(torch.load(tmp_path / "save"), torch.load(tmp_path / "load"))


def test_no_room_to_spare_is_saved(tmp_path: Path) -> None:
    model = compiled(headroom=4096)
    cache = filled(model, tokens(1, 200))
    save_cache(cache, tmp_path / "cache")
    held = store_of(cache.layers[0].keys).buffers.k_codes
    assert held.shape[2] > 4096
    again = store_of(load_cache(tmp_path / "cache", model).layers[0].keys).buffers.k_codes
    assert again.shape[2] < 256 and torch.equal(again, held[:, :, : again.shape[2]])
    assert os.path.getsize(tmp_path / "cache") < memory_stats(cache).stored_bytes / 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model, path = compiled(), tmp_path_factory.mktemp("saved") / "cache"
    save_cache(filled(model, tokens(1, 64)), path)
    return model, path


@pytest.mark.parametrize("at", [0, 9, 300, 2000, -100, -1])
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_file_that_was_cut_or_changed_is_refused(
    how: str, at: int, saved: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, path = saved
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:at]
    else:
        content[at] ^= 1
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(Mistake, match=r"cut short|was changed|no cache that was saved|of version"):
        load_cache(tmp_path / "cache", model)


def test_what_is_no_cache_of_this_model_is_refused(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = saved
    with pytest.raises(Mistake, match=r"cannot read .*: No such file"):
        load_cache(tmp_path / "none", model)
    other = copy.deepcopy(build("llama"))
    torch.nn.init.normal_(other.model.norm.weight)
    with pytest.raises(Mistake, match="is the cache of another model"):
        load_cache(path, other)
    with pytest.raises(Mistake, match=r"was made by this model in torch\.float32, and it is in torch\.bfloat16"):
        load_cache(path, copy.deepcopy(build("llama")).bfloat16())
    with pytest.raises(Mistake, match="only a DynamicCache"):
        save_cache(None, tmp_path / "cache")
    with pytest.raises(Mistake, match="nothing in this cache is compressed"):
        save_cache(DynamicCache(config=model.config), tmp_path / "cache")
    with pytest.raises(Mistake, match="cannot write to"):
        save_cache(DynamicCache(config=model.config), tmp_path / "folder" / "cache")


def test_a_save_that_fails_leaves_what_was_there(
    saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, path = saved
    target = tmp_path / "cache"
    target.write_bytes(path.read_bytes())

    def fails(tensors: Any, scratch: Path, header: Any) -> None:
        scratch.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spectral_compile.saved.save_file", fails)
    with pytest.raises(Mistake, match="No space left"):
        save_cache(load_cache(path, model), target)
    assert target.read_bytes() == path.read_bytes() and os.listdir(tmp_path) == ["cache"]


def test_an_output_is_saved_by_its_cache(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, _ = saved
    with torch.no_grad():
        out = model(tokens(1, 64), use_cache=True)
    save_cache(out, tmp_path / "cache")
    assert isinstance(cache_of(out).layers[0].keys, SpectralTensor)
    load_cache(tmp_path / "cache", model)
