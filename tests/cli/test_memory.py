"""Whether a model and a prompt fit into some memory: ``doctor --memory`` and the example that relies on it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

import spectral_compile as sc
from spectral_compile.cli.memory import CHUNKS, Fit, Shape, parse_bytes
from spectral_compile.errors import Mistake
from tests import shell
from tests.examples import example

invoke = partial(shell.invoke, "doctor")
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of Llama-3-8B and no weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**LLAMA).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "text, size", [("8GiB", 2**33), ("8", 2**33), ("8 gib", 2**33), ("24GB", 24 * 10**9), ("1.5MiB", 3 * 2**19), ("7b", 7)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "8 GBit"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(Mistake, match="no size of memory"):
        parse_bytes(text)


def test_bytes_of_weights_are_those_of_the_model(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    shape = Shape.of(str(tiny_folder), torch.float32, None)
    assert shape.weights == sum(x.nbytes for x in model.parameters()) and shape.unpacked == 0


def test_weights_in_4_bits_are_as_bitsandbytes_has_them(llama: str) -> None:
    linear = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    others = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
    assert Shape.of(llama, torch.bfloat16, 4).weights == linear // 2 + linear // 16 + 2 * others
    assert Shape.of(llama, torch.bfloat16, None).weights == 2 * (linear + others)


def test_a_checkpoint_says_itself_how_its_weights_are_packed(tmp_path: Path, llama: str) -> None:
    config = LlamaConfig(**LLAMA)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    weights = {bits: Shape.of(str(tmp_path), torch.bfloat16, bits).weights for bits in (None, 4, 8, 16)}
    assert weights[None] == weights[4] < weights[8] < weights[16] == Shape.of(llama, torch.bfloat16, None).weights


def test_what_a_prompt_works_with_is_near_what_was_measured(llama: str) -> None:
    """On an H200, of four layers, beyond weights and cache; bytes in MiB."""
    shape = Shape.of(llama, torch.bfloat16, None)
    measured = {(32768, 32768): 1002, (32768, 8192): 633, (32768, 4096): 395, (32768, 2048): 269, (131072, 131072): 3657,
                (131072, 8192): 636, (131072, 4096): 376}  # fmt: skip
    for (tokens, chunk), mib in measured.items():
        assert 0.95 * mib < shape.working(tokens, chunk) / 2**20 < 1.6 * mib, (tokens, chunk)


@given(st.integers(2**20, 2**36), st.integers(1, 2**18))
def test_the_largest_chunk_that_fits_is_chosen(memory: int, tokens: int) -> None:
    shape = Shape(2**30, 2, 2048, 8192, 2048, 512, 32000, 0)
    fit = Fit.of(shape, memory, tokens, 2**20, 2**23)
    assert fit.fits == (fit.weights + fit.cache + fit.working <= memory)
    larger = [chunk for chunk in (tokens, *CHUNKS) if fit.chunk < chunk <= tokens]
    assert all(shape.weights + 2**20 + shape.working(tokens, chunk) > memory for chunk in larger)


def test_the_doctor_says_in_which_chunks_a_prompt_fits(tiny_folder: Path) -> None:
    asked = ("--tokens", 100000, "--dtype", "float32")
    done = invoke(tiny_folder, *asked, "--memory", "1GiB")
    assert done.exit_code == 0 and "100000 tokens fit into 1.00 GiB in one piece" in done.stdout
    done = invoke(tiny_folder, *asked, "--memory", "20MiB")
    assert done.exit_code == 0 and "fit into 20.0 MiB with prefill_chunk_size=4096" in done.stdout, done.output
    done = invoke(tiny_folder, *asked, "--memory", "7MiB")
    assert done.exit_code == 1 and "do not fit into 7.0 MiB" in done.output and "fewer tokens" in done.output
    fit = json.loads(invoke(tiny_folder, *asked, "--memory", "20MiB", "--json").stdout)["fit"]
    assert fit["fits"] and fit["chunk"] in CHUNKS


def test_the_headline_fits_by_what_is_counted(llama: str) -> None:
    """128K tokens of an 8B model in 4 bits on a card of 8 GiB: 5.6 GiB of weights, and 1.2 of cache."""
    shape = Shape.of(llama, torch.bfloat16, 4)
    assert Fit.of(shape, 2**33, 131072, int(1.25 * 2**30), 2**34).fits


@pytest.mark.parametrize("made_up", [[], ["--random"], ["--random", "--bits", "4"]])
def test_the_example_reads_a_prompt_in_chunks(
    made_up: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--memory", "2MiB", "--tokens", "3000", "--new-tokens", "12", "--bits", "16", "--inner", "eager", *made_up]
    example("long_context_on_8_gb").main([str(tiny_folder), *given])
    said = capsys.readouterr().out
    assert "3000 tokens fit into 2.0 MiB with prefill_chunk_size=1024" in said and "smaller than a dense one" in said
    assert {report.kind for report in sc.reports()} == {"prefill", "extend", "decode"}
    assert all(report.matched == report.sites == 2 for report in sc.reports())


def test_made_up_weights_are_those_of_the_model(tiny_folder: Path) -> None:
    made = example("long_context_on_8_gb").made_up(str(tiny_folder), torch.device("cpu"), 16)
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert {name: x.shape for name, x in made.named_parameters()} == {name: x.shape for name, x in whole.named_parameters()}
    assert not any(x.is_meta for x in (*made.parameters(), *made.buffers()))
    packed = example("long_context_on_8_gb").made_up(str(tiny_folder), torch.device("cpu"), 4)
    names = {type(module).__name__ for name, module in packed.named_modules() if name.endswith("_proj")}
    assert names == {"Linear4bit"} and type(packed.lm_head) is torch.nn.Linear


def test_the_example_says_what_does_not_fit(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("long_context_on_8_gb").main([str(tiny_folder), "--memory", "1MiB", "--tokens", "3000", "--inner", "eager"])
    assert "do not fit" in capsys.readouterr().out
