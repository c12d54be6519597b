"""``spectral-compile doctor``: what it says of models that are compressed wholly, in part and not at all."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import spectral_compile as sc
from spectral_compile.cli.options import compile_line, parse_options, parse_pairs
from spectral_compile.cli.sizes import pays_from, stored
from tests import shell
from tests.tiny import build, tokens


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


invoke = partial(shell.invoke, "doctor")


def saved(name: str, folder: Path) -> Path:
    build(name).config.save_pretrained(folder)
    return folder


def test_a_model_that_is_compressed_wholly(tmp_path: Path) -> None:
    result = invoke(saved("glm4-partial-interleaved", tmp_path), "--tokens", 4096, "--preset", "compact")
    assert result.exit_code == 0, result.output
    wanted = ("2 of 2 layers", "interleaved, 8 of 16 channels", "causal", "prefill: 2 of 2", 'options={"preset": "compact"}')
    assert all(part in result.stdout for part in wanted)


def test_layers_that_stay_dense_have_a_reason(tmp_path: Path) -> None:
    result = invoke(saved("gemma3", tmp_path))
    assert result.exit_code == 0, result.output
    assert "1 of 2 layers" in result.stdout and "the cache keeps only a window of its tokens" in result.stdout


@pytest.mark.parametrize("name, reason", [("mistral-with-a-window", "a window of its tokens"), ("bloom", "ALiBi")])
def test_nothing_to_compress_is_an_error(name: str, reason: str, tmp_path: Path) -> None:
    result = invoke(saved(name, tmp_path))
    assert result.exit_code == 1
    assert "nothing would be compressed" in result.stderr and reason in result.stderr


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("head_group=3", "head_group=3 does not divide the 2 KV heads"),
        ("key_ranks=(9,9,9)", "key_ranks (9, 9, 9) sum to more than head_dim 16: lower them"),
    ],
)
def test_options_that_no_layer_can_have_are_one_sentence(option: str, sentence: str, tmp_path: Path) -> None:
    result = invoke(saved("llama", tmp_path), "--options", option)
    assert result.exit_code == 2 and result.stderr.strip() == f"error: {sentence}"


@pytest.mark.parametrize("preset", ["exact", "balanced", "seed"])
def test_sizes_of_a_trillion_tokens_take_no_memory(preset: str) -> None:
    layout = sc.SpectralConfig(preset).layout(8, 128, None)
    dense, compressed = stored(layout, 10**12, torch.bfloat16)
    assert dense == 2 * 8 * 128 * 10**12 * 2
    few = stored(layout, 10**6, torch.bfloat16)
    assert compressed / dense == pytest.approx(few[1] / few[0], rel=0.02)


def test_the_command_takes_a_trillion_tokens_and_no_more(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    result = invoke(folder, "--tokens", 10**12)
    assert result.exit_code == 0 and "2 of 2 layers" in result.stdout
    assert invoke(folder, "--tokens", 10**12 + 1).exit_code == 2


@pytest.mark.parametrize("preset", ["exact", "quality", "balanced", "compact", "seed"])
def test_bytes_are_those_that_a_prompt_takes(preset: str) -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={"preset": preset, "strict": True, "inner": "eager"})
    with torch.no_grad():
        cache = model(tokens(1, 1300), use_cache=True).past_key_values
    layer = cache.layers[0].keys
    dense, compressed = stored(layer.kind.layout, 1300, torch.float32)
    assert dense == 2 * layer.numel() * 4
    assert compressed == sum(buffer.nbytes for buffer in layer.store.buffers)


def test_layers_have_plain_names_and_the_whole_cache_a_total(tmp_path: Path) -> None:
    shown = invoke(saved("gemma3", tmp_path), "--tokens", 4096).stdout
    assert "layer 1 of 2, sliding attention" in shown and "layer 2 of 2, full attention" in shown
    assert "self_attn" not in shown
    assert "layer 1 of 2 " in invoke(saved("llama", tmp_path)).stdout
    assert "compression pays from about" in shown


def test_json_has_the_bytes_that_a_real_cache_takes(tmp_path: Path) -> None:
    """The whole cache of a model of which one layer keeps a window and stays dense."""
    result = invoke(saved("gemma3", tmp_path), "--tokens", 1300, "--dtype", "float32", "--preset", "compact", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["options"] == {"preset": "compact"} and [graph["kind"] for graph in facts["graphs"]] == ["prefill", "decode"]
    assert [layer["compressed"] for layer in facts["layers"]] == [False, True]
    assert facts["layers"][0]["module"] == "model.layers.0.self_attn" and facts["layers"][0]["why_not"]
    model = build("gemma3")
    with torch.no_grad():
        dense = sc.memory_stats(model(tokens(1, 1300), use_cache=True))
        model.compile(backend=sc.spectral, options={"preset": "compact", "inner": "eager"})
        held = model(tokens(1, 1300), use_cache=True)
    total = next(total for total in facts["totals"] if total["tokens"] == 1300)
    assert total["dense_bytes"] == dense.logical_bytes
    window = dense.logical_bytes - 2 * held.past_key_values.layers[1].keys.numel() * 4
    books = window + sc.memory_stats(held).layers[1] - total["compressed_bytes"]  # what layers share, such as positions
    assert 0 <= books < 20 * 1300


def test_json_says_why_nothing_is_compressed(tmp_path: Path) -> None:
    result = invoke(saved("mistral-with-a-window", tmp_path), "--json")
    assert result.exit_code == 1 and "nothing would be compressed" in result.stderr
    assert json.loads(result.stdout)["pays_from_tokens"] is None


OPTIONS = [(), ("recent=128", "strict=True"), ("key_ranks=(1, 2, 3)", "preset=compact"), ("max_autotune=False", "inner=eager")]


@pytest.mark.parametrize("pairs", OPTIONS)
def test_the_compile_line_compiles_with_the_given_options(pairs: tuple[str, ...], tmp_path: Path) -> None:
    given = []
    model = SimpleNamespace(compile=lambda backend, options=None: given.append((backend, options)))
    exec(compile_line(parse_pairs(list(pairs))), {"model": model})
    assert [(backend, sc.SpectralConfig.parse(options)) for backend, options in given] == [
        ("spectral", parse_options({}, list(pairs)))
    ]


def test_the_compile_line_is_printed_with_its_options(tmp_path: Path) -> None:
    shown = invoke(saved("llama", tmp_path), "--options", "recent=128", "--options", "inner=eager").stdout
    assert 'model.compile(backend="spectral", options={"recent": 128, "inner": "eager"})' in shown


@pytest.mark.parametrize("preset", ["quality", "balanced", "compact", "seed"])
@pytest.mark.parametrize("headroom", [None, 1024])
def test_compression_pays_from_a_length_on(preset: str, headroom: int | None) -> None:
    layout = sc.SpectralConfig(preset).layout(8, 128, None)
    least = pays_from([layout], torch.bfloat16, headroom)
    assert least is not None and least % 16 == 0
    for length in (least, least + 7, 2 * least, 1243, 1244, 10**5):
        dense, compressed = stored(layout, max(length, least), torch.bfloat16, headroom)
        assert compressed < dense
    dense, compressed = stored(layout, least - 16, torch.bfloat16, headroom)
    assert compressed >= dense


def test_a_lossless_cache_pays_at_no_length(tmp_path: Path) -> None:
    assert pays_from([sc.SpectralConfig("exact").layout(8, 128, None)], torch.bfloat16) is None
    shown = invoke(saved("llama", tmp_path), "--preset", "exact").stdout
    assert re.search("larger than a dense one at any length", shown)
