"""Models that other libraries have patched or quantised: compressed where the model is one graph, else dense with a reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.passes.patched import refuse_patched
from spectral_compile.report import UNSLOTH, SpectralWarning
from tests.passes.harness import Attention, counts, hidden, run_passes
from tests.patching import assert_compressed, generated, in_four_bits
from tests.tiny import DEVICE, EXACT, build, rope_embedding


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def test_weights_of_four_bits_are_compressed_and_right(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path)
    assert_compressed(model, generated(model))


def test_a_hook_around_the_whole_model_leaves_it_compressed() -> None:
    model = build("llama").to(DEVICE)
    expected = generated(model)
    add_hook_to_module(model, AlignDevicesHook(execution_device=DEVICE, io_same_device=True, skip_keys="past_key_values"))
    assert_compressed(model, expected)


@pytest.mark.newest
def test_hooks_within_a_model_keep_it_dense_with_a_reason() -> None:
    model = build("llama")
    expected = generated(model)
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0", "model.layers.1"]
    model = accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    with pytest.warns(SpectralWarning, match=r"accelerate's hooks \(device_map over several devices.* load it onto one device"):
        assert torch.equal(generated(model), expected)
    assert not any(graph.matched for graph in sc.reports())
    assert report.decodes() == 0


ATTENTION = """
def attention(x, cache, layer, rope):
    key, value = cache.update(rope(x), x, layer)
    return sdpa(x, key, value, is_causal=x.shape[2] > 1)
"""
HANDED_ON = """
def attention(*args):
    return original(*args)
"""


def attention_in(file: str, source: str = ATTENTION, **names: Any) -> Any:
    """Attention to a cache whose source is said to stand in ``file``."""
    exec(compile(source, file, "exec"), names)
    return names["attention"]


@pytest.mark.parametrize(
    ("file", "rope", "patched"),
    [
        ("/site-packages/unsloth_zoo/temporary_patches/gpt_oss.py", torch.clone, True),
        ("/site-packages/unsloth/models/llama.py", torch.clone, True),
        ("/work/unsloth_compiled_cache/unsloth_compiled_module_llama.py", torch.clone, True),
        ("/work/model.py", rope_embedding, True),
        ("/home/unsloth/.venv/site-packages/model.py", torch.clone, False),
    ],
)
def test_what_unsloth_has_patched_stays_dense_with_a_reason(file: str, rope: Any, patched: bool) -> None:
    own = attention_in(file, sdpa=sdpa)
    attention = attention_in("/site-packages/unsloth_zoo/temporary_patches/misc.py", HANDED_ON, original=own)

    def model(x: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        return attention(attention(x, cache, 0, rope), cache, 1, rope)

    compiled = torch.compile(model, backend=sc.spectral, options={**EXACT, "strict": not patched})
    dense, cache = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for count in (9, 1, 1):
            x = torch.randn(1, 2, count, 16, generator=torch.Generator().manual_seed(count))
            torch.testing.assert_close(compiled(x, cache), model(x, dense))
    refusals = {refusal.reason for graph in sc.reports() for refusal in graph.refusals}
    if patched:
        assert len(refusals) == 1 and "compile spectral_compile.unsloth.standard_forward(model) instead" in refusals.pop()
    assert any(graph.matched for graph in sc.reports()) is not patched


def test_a_graph_of_unsloth_without_attention_says_so_too() -> None:
    compiled = torch.compile(lambda x: rope_embedding(x) + 1, backend=sc.spectral, options={**EXACT, "strict": False})
    with torch.no_grad(), pytest.warns(SpectralWarning, match="compile spectral_compile.unsloth.standard_forward"):
        compiled(torch.ones(2))


def test_where_unsloth_is_loaded_it_is_the_likely_cause_of_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.why_no_graph() is None
    monkeypatch.setitem(sys.modules, "unsloth", None)
    assert "standard_forward" in report.why_no_graph()


def test_every_site_of_a_graph_that_unsloth_wrote_parts_of_is_refused() -> None:
    module = Attention()
    trace = run_passes(lambda hidden, positions: module(rope_embedding(hidden), positions), refuse_patched, **hidden(2, 9))
    assert [site.refusal for site in trace.sites] == [UNSLOTH]
    assert counts(trace)["scaled_dot_product_attention"] == 1
    assert run_passes(module, refuse_patched, **hidden(2, 9)).matched
