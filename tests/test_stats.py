"""Bytes of caches of every kind that transformers has: layers with states, encoder-decoders, outputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, PreTrainedModel

import spectral_compile as sc
from spectral_compile.outputs import cache_argument, cache_of
from spectral_compile.stats import tensors
from tests.hybrids import HYBRIDS
from tests.tiny import GREEDY, OLDEST, WINDOWS, build, tokens
from tests.tiny import TEXT as IDS

SEQ2SEQ: dict[str, Callable[[], PreTrainedModel]] = {
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **IDS | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None},
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def generated(make: Callable[[], PreTrainedModel], **options: Any) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    if options:
        model.compile(backend=sc.spectral, options={"inner": "eager", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.SpectralWarning)  # of T5, which stays dense
        return model.generate(tokens(1, 40), max_new_tokens=1, return_dict_in_generate=True, **GREEDY)


def adds_up(stats: sc.MemoryStats) -> bool:
    return stats.stored_bytes == sum(stats.parts.values()) == sum(stats.layers)


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_of_linear_attention_are_a_part_of_their_own(name: str) -> None:
    dense, ours = (sc.memory_stats(generated(HYBRIDS[name], **options)) for options in ({}, WINDOWS))
    assert adds_up(dense) and adds_up(ours)
    assert dense.logical_bytes == ours.logical_bytes
    assert dense.parts["states"] == ours.parts["states"] > 0
    assert dense.parts["dense"] > 0 == ours.parts["dense"] < ours.parts["codes"]
    assert dense.logical_bytes == dense.parts["states"] + dense.parts["dense"]
    assert len(ours.layers) == len(dense.layers) and min(ours.layers[:2]) > 0


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_what_a_decoder_keeps_of_its_encoder_counts_too(name: str) -> None:
    out = generated(SEQ2SEQ[name])
    dense, ours = sc.memory_stats(out), sc.memory_stats(generated(SEQ2SEQ[name], **WINDOWS))
    caches = cache_of(out).self_attention_cache, cache_of(out).cross_attention_cache
    held = sum(x.nbytes for cache in caches for layer in cache.layers for x in (layer.keys, layer.values))
    assert adds_up(dense) and adds_up(ours)
    assert dense.logical_bytes == ours.logical_bytes == held == dense.parts["dense"]
    assert len(dense.layers) == len(ours.layers) == 2
    assert (ours.parts["recent"] > 0) == (name == "bart") and ours.parts["dense"] > 0


def test_a_static_layer_and_an_empty_one_count_what_they_hold() -> None:
    empty = sc.memory_stats(DynamicCache(config=build("llama").config))
    assert (empty.stored_bytes, empty.ratio, empty.layers) == (0, 1.0, (0, 0))
    cache = hf.StaticCache(config=build("llama").config, max_cache_len=64)
    with torch.no_grad():
        build("llama")(tokens(1, 8), **cache_argument(cache))
    stats = sc.memory_stats(cache)
    assert adds_up(stats) and stats.parts["dense"] == 2 * 2 * 2 * 64 * 16 * 4


def test_tensors_are_found_in_whatever_holds_them() -> None:
    base = torch.zeros(3)
    assert [x.data_ptr() for x in tensors({"a": [base, (base, None)]}, 5, "base")] == [base.data_ptr()] * 2


class Heard(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What transformers logs; deprecated names of outputs are logged once a process, other ones are warnings."""
    handler, logger = Heard(), logging.getLogger("transformers")
    logger.addHandler(handler)
    verbosity = hf.logging.get_verbosity()
    hf.logging.set_verbosity_warning()  # the command line, whose tests may have run here, turns it down
    hf.logging.get_logger("transformers").warning_once.__func__.cache_clear()
    yield handler.said
    hf.logging.set_verbosity(verbosity)
    logger.removeHandler(handler)


def test_no_deprecated_name_of_the_cache_is_used(heard: list[str]) -> None:
    """transformers 5.24 renames ``past_key_values``, and 5.40 takes the old name away."""
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "decode: 2 of 2" in sc.explain(model, input_ids=tokens(1, 20))
        out = generated(lambda: build("llama"), **WINDOWS)
        assert sc.memory_stats(out) == sc.memory_stats(cache_of(out))
        with torch.no_grad():
            again = model(tokens(1, 1), **cache_argument(cache_of(model(tokens(1, 20)))))
    assert cache_of(again).get_seq_length() == 21
    assert not [said for said in heard if "deprecated" in said]


@pytest.mark.skipif(OLDEST, reason="there the old name is the only one")
def test_the_deprecated_name_of_the_cache_would_be_heard(heard: list[str]) -> None:
    with torch.no_grad():
        out = build("llama")(tokens(1, 20))
    assert out.past_key_values is not None and any("deprecated" in said for said in heard)


def test_an_output_without_a_cache_says_what_to_do() -> None:
    with torch.no_grad():
        out = build("llama")(tokens(1, 20), use_cache=False)
    with pytest.raises(TypeError, match="use_cache=True"):
        sc.memory_stats(out)
