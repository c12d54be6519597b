"""Every architecture, through transformers' own code and ``generate``: compressed in each graph, and right."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.explain import examine
from tests.budget import FULL
from tests.tiny import EXACT, GREEDY, MODELS, OLDEST, OTHERS, WINDOWS, build, tokens

ROTATED = set(MODELS) - {"gpt2", "gpt2-eager", "opt", "smollm3-without-rope", "phi3-long-rope"}
# masks, or positions of padded tokens, that are not made as Llama's; the others are padded with the oldest transformers
OWN_MASKS = ["llama", "gpt-neox", "gpt2", "falcon", "opt", "phi3-long-rope", "smollm3-without-rope"]
OWN_MASKS += ["llama-eager", "gpt2-eager", "gemma2-softcapping", "gpt-oss-sinks"]
TABLE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def compiled(name: str, preset: str = "exact", inner: str = "eager", **options: object):
    model = build(name)
    model.compile(backend=sc.spectral, options={"preset": preset, "strict": True, "inner": inner, **WINDOWS, **options})
    return model


def assert_all_matched(*kinds: str) -> None:
    assert [(graph.kind, graph.matched) for graph in sc.reports()] == [
        (kind, graph.sites) for kind, graph in zip(kinds, sc.reports(), strict=True)
    ]
    assert all(graph.sites == 2 and not graph.refusals for graph in sc.reports())
    assert report.decodes() == 0


def line(name: str) -> str:
    """Of the table of models, as the graphs that were compiled say."""
    made = sc.reports()
    matched, sites = max((graph.matched, graph.sites) for graph in made)
    reasons = sorted({re.sub(r"^graph: |^.*self_attn: ", "", str(refusal)) for graph in made for refusal in graph.refusals})
    return f"| `{name}` | {matched} of {max(sites, 2)} | {'; '.join(reasons) or '-'} |"


def assert_in_table(name: str) -> None:
    if not OLDEST:  # the table is of the newest transformers
        assert line(name) in TABLE.read_text().splitlines()


@pytest.mark.newest
@pytest.mark.parametrize("name", MODELS)
def test_two_turns_on_one_cache_equal_dense(name: str) -> None:
    """Three graphs in all; keys are stored before RoPE."""
    model, dense, prompt = compiled(name), build(name), tokens(1, 40)
    first = model.generate(prompt, max_new_tokens=20, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(first.sequences, dense.generate(prompt, max_new_tokens=20, **GREEDY)), "first turn"
    assert_all_matched("prefill", "decode")
    assert_in_table(name)
    if name in ROTATED:
        rotary = first.past_key_values.layers[0].keys.kind.layout.rotary
        assert rotary is not None
        assert rotary.interleaved == ("interleaved" in name or name == "gpt-j")
        assert not any(graph.notes for graph in sc.reports())

    prompt = torch.cat((first.sequences, tokens(1, 23, seed=1)), 1)
    everything = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, **GREEDY}
    second = model.generate(prompt, past_key_values=first.past_key_values, **everything)
    assert torch.equal(second, dense.generate(prompt, **everything)), "second turn"
    assert_all_matched("prefill", "decode", "extend")


@pytest.mark.parametrize("name", ["gpt2-eager", "gemma2-softcapping", "gpt-oss-sinks"])
def test_logits_of_attention_that_is_written_out_equal_dense(name: str) -> None:
    """Tokens hardly tell whether scores were capped."""
    prompt = tokens(1, 40)
    given = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    expected, ours = build(name).generate(prompt, **given), compiled(name).generate(prompt, **given)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert_all_matched("prefill", "decode")


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_stay_dense_do_no_harm(name: str) -> None:
    """With a reason, and the same tokens as without the backend; what else can be is compressed."""
    prompt, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, **GREEDY}
    expected = build(name).generate(prompt, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", report.SpectralWarning)
        assert torch.equal(compiled(name, strict=False).generate(prompt, **given), expected)
    assert report.decodes() == 0
    assert all(graph.refusals for graph in sc.reports())
    assert_in_table(name)


@pytest.mark.newest
def test_the_table_is_of_these_models() -> None:
    _, table = TABLE.read_text().split("| model in `tests/tiny.py` |")
    assert re.findall(r"^\| `(.*?)` \|", table.split("\n\n")[0], re.MULTILINE) == [*MODELS, *OTHERS]


@pytest.mark.newest
@pytest.mark.parametrize("name", [*MODELS, *OTHERS] if FULL else ["gpt2", "gemma3"])
def test_examining_a_model_tells_what_the_table_tells(name: str) -> None:
    examine(build(name), options={**EXACT, "strict": False}, input_ids=tokens(1, 30))
    assert_in_table(name)


@pytest.mark.parametrize("name", MODELS if FULL or OLDEST else OWN_MASKS)
def test_left_padded_batch_equals_dense(name: str) -> None:
    prompt, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[0, :7], mask[2, :37] = 0, 0
    expected = build(name).generate(prompt, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert torch.equal(compiled(name).generate(prompt, attention_mask=mask, max_new_tokens=20, **GREEDY), expected)
    assert_all_matched("prefill", "decode")


@pytest.mark.parametrize("preset", ["seed", "quality", "balanced", "compact"])
def test_lossy_presets_compress_every_site(preset: str) -> None:
    out = compiled("llama", preset, key_ranks=None).generate(
        tokens(2, 200), max_new_tokens=40, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    assert_all_matched("prefill", "decode")
    assert all(torch.isfinite(step).all() for step in out.logits)
    stats = sc.memory_stats(out.past_key_values)
    assert stats.parts["codes"] > 0 and stats.parts["bases"] > 0 and stats.parts["dense"] == 0


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"] if FULL else ["aot_eager"])  # SmolLM2 has the other
def test_inner_compilers_give_the_same_tokens(inner: str) -> None:
    prompt = tokens(1, 40)
    expected = build("llama").generate(prompt, max_new_tokens=20, **GREEDY)
    assert torch.equal(compiled("llama", inner=inner).generate(prompt, max_new_tokens=20, **GREEDY), expected)
    assert_all_matched("prefill", "decode")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_compress(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    model.compile(backend=sc.spectral, options=EXACT)
    out = model.generate(tokens(1, 40), max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values.layers[0].keys.dtype == dtype
    assert not any(graph.notes for graph in sc.reports())
    assert_all_matched("prefill", "decode")


def test_prompts_of_other_lengths_leave_no_state_behind() -> None:
    model, dense = compiled("llama"), build("llama")
    for length in (30, 90, 30, 5):
        prompt = tokens(1, length, seed=length)
        assert torch.equal(
            model.generate(prompt, max_new_tokens=12, **GREEDY), dense.generate(prompt, max_new_tokens=12, **GREEDY)
        )
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode", "prefill"]


def test_beam_search_reorders_codes() -> None:
    options = {"num_beams": 3, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    expected = build("llama").generate(tokens(2, 30), **options)
    assert torch.equal(compiled("llama").generate(tokens(2, 30), **options), expected)
    assert_all_matched("prefill", "decode")


def test_a_cached_prefix_is_shared_by_continuations() -> None:
    import copy

    model, dense = compiled("llama"), build("llama")
    prefix = tokens(1, 40)
    with torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
    for seed in (1, 2):
        prompt = torch.cat((prefix, tokens(1, 9, seed=seed)), 1)
        own = copy.deepcopy(cache)
        assert torch.equal(
            model.generate(prompt, past_key_values=own, max_new_tokens=10, **GREEDY),
            dense.generate(prompt, max_new_tokens=10, **GREEDY),
        )
    assert cache.get_seq_length() == 40
    assert report.decodes() == 0
