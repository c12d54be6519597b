"""``spectral-compile doctor``: what it says of models that are compressed wholly, in part and not at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import spectral_compile as sc
from spectral_compile.cli.doctor import stored
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
