"""Options, reports, errors, and graphs that must be left as they are."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers import DynamicCache

import spectral_compile as sc
from spectral_compile import backend, config, report
from spectral_compile.backend import records, varying
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec import PRESETS, Preset
from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Mistake
from spectral_compile.kernels.buffers import allocate
from spectral_compile.passes.edges import too_wide
from spectral_compile.report import SpectralWarning
from tests.tiny import GREEDY, GROUPED, WINDOWS, build, tokens

EAGER = {"preset": "exact", "inner": "eager", **WINDOWS}


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preset": "ballanced"}, "unknown preset 'ballanced'; did you mean 'balanced'?"),
        ({"presett": "exact"}, "unknown option 'presett'; did you mean 'preset'?"),
        ({"inner": "inductr"}, "unknown inner compiler 'inductr'; did you mean 'inductor'?"),
        ({"recent": -1}, "recent must be an integer from 0 to 1048576, not -1"),
        ({"block": 0}, "block must be an integer from 1 to 4096, not 0"),
        ({"head_group": 2.0}, "head_group must be an integer from 1 to 256, not 2.0"),
        ({"key_ranks": (1, 2)}, "key_ranks must be three counts"),
        ({"value_ranks": (0, 0, 0)}, "value_ranks must be three counts"),
        ({"recent_bits": 4}, "recent_bits must be 8 or 16, not 4"),
        ({"preset": "exact", "recent_bits": 8}, "recent_bits must be 16, as the preset is lossless, not 8"),
    ],
)
def test_bad_options_give_one_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        SpectralConfig.parse(options)
    assert sentence in str(raised.value)


OWN = [field.name for field in fields(SpectralConfig)]


WRONG = ("yes", b"yes", 2.5, float("nan"), [1], {"a": 1}, object(), -1, 2**70, (None,) * 3)


@pytest.mark.parametrize("name", OWN)
def test_a_value_of_a_wrong_type_is_a_value_error(name: str) -> None:
    wrongs = WRONG if name in ("strict", "cudagraphs") else (*WRONG, True)
    for wrong in wrongs[1:] if name == "dump_graphs" else wrongs:  # any string is a path
        with pytest.raises(ValueError):
            SpectralConfig.parse({name: wrong})


@pytest.mark.parametrize("options", [5, "balanced", [("preset", "exact")], {1: 2}])
def test_options_are_a_dictionary_of_names(options: object) -> None:
    with pytest.raises(ValueError, match=r"options must be a dictionary|unknown option"):
        SpectralConfig.parse(options)


@pytest.mark.parametrize("name", list(config._RANGES))
@pytest.mark.parametrize("preset", ["balanced", replace(PRESETS["balanced"], block=10**9)])
def test_what_is_allocated_ahead_is_bounded(name: str, preset: str | Preset) -> None:
    """``block=10**9`` took gigabytes for a cache of kilobytes."""
    with pytest.raises(ValueError, match=r"must be an integer from \d+ to \d+, not 1000000000"):
        SpectralConfig.parse({"preset": preset, name: 10**9})


def test_every_bound_is_itself_allowed_and_none_of_them_takes_a_gigabyte() -> None:
    for name, (least, most) in config._RANGES.items():
        for count in (least, most):
            assert getattr(SpectralConfig.parse({name: count}), name) == count
    layout = SpectralConfig(first_exact=4096, block=4096, recent=2**20, warmup=2**20).layout(3, 64, None)
    capacity = Timeline(layout, 1, 20, 20, torch.device("cpu"), 2**17).capacity
    assert sum(buffer.nbytes for buffer in allocate(layout, 1, capacity, torch.bfloat16, "meta")) < 2**28


@pytest.mark.parametrize(("name", "nearest"), [("recnt", "; did you mean 'recent'?"), ("zzzz", ""), ("x", "")])
def test_only_a_near_name_is_suggested(name: str, nearest: str) -> None:
    with pytest.raises(ValueError) as raised:
        SpectralConfig.parse({name: 3})
    assert str(raised.value) == f"unknown option {name!r}{nearest}"


@pytest.mark.parametrize("inner", config.INNER)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_autotun", True, "unknown option 'max_autotun'; did you mean 'max_autotune'?"),
        ("max_autotune", "yes", "max_autotune of Inductor must be bool, not 'yes'"),
        ("triton.cudagraphs", 1, "triton.cudagraphs of Inductor must be bool, not 1"),
        ("realize_reads_threshold", 1.5, "realize_reads_threshold of Inductor must be int, not 1.5"),
    ],
)
def test_a_mistyped_option_of_inductor_is_refused_by_every_inner_compiler(
    name: str, value: object, sentence: str, nested: bool, inner: str
) -> None:
    options = {"inductor": {name: value}} if nested else {name: value}
    with pytest.raises(ValueError) as raised:
        SpectralConfig.parse({"inner": inner, **options})
    assert str(raised.value) == sentence


def test_a_mode_that_inductor_does_not_know_is_refused_and_all_others_are_taken() -> None:
    with pytest.raises(ValueError, match=r"unknown mode 'max-autotunes'; did you mean 'max-autotune'\?"):
        SpectralConfig.parse({}, mode="max-autotunes")
    for mode, options in torch._inductor.list_mode_options().items():
        assert dict(SpectralConfig.parse({}, mode=mode).inductor) == options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"key_ranks": (10, 10, 10)}, "key_ranks .* sum to more than head_dim 16: lower them"),
        ({"head_group": 3}, "head_group=3 does not divide the 2 KV heads"),
        ({"value_group": 3}, "value_group=3 does not divide the 2 KV heads"),
    ],
)
def test_options_that_do_not_fit_the_model_say_so(options: dict[str, object], sentence: str) -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EAGER, "preset": "balanced", **options})
    with pytest.raises(BackendCompilerFailed, match=sentence):
        model.generate(tokens(1, 20), max_new_tokens=2, **GREEDY)


def test_options_of_inductor_and_modes_are_handed_on() -> None:
    assert dict(SpectralConfig.parse({"preset": "seed", "max_autotune": True}, mode=None).inductor) == {"max_autotune": True}
    assert dict(SpectralConfig.parse({}, mode="max-autotune-no-cudagraphs").inductor)["max_autotune"] is True


def test_config_is_frozen_and_hashable() -> None:
    assert hash(SpectralConfig.parse({"preset": "seed"})) == hash(SpectralConfig(preset="seed"))
    with pytest.raises(AttributeError):
        SpectralConfig().preset = "seed"  # type: ignore[misc]


def test_float64_runs_densely_and_is_reported() -> None:
    model, prompt = build("llama").double(), tokens(1, 20)
    expected = model.generate(prompt, max_new_tokens=5, **GREEDY)
    model.compile(backend=sc.spectral, options=EAGER)
    with pytest.warns(SpectralWarning, match="keys are float64: load the model in float16, bfloat16 or float32"):
        out = model.generate(prompt, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert all(graph.matched == 0 and graph.kind == "other" for graph in sc.reports())


def test_attention_weights_that_are_asked_for_keep_a_model_dense_and_are_reported() -> None:
    given = {"max_new_tokens": 5, "output_attentions": True, "return_dict_in_generate": True, **GREEDY}
    expected = build("llama-eager").generate(tokens(1, 20), **given)
    model = build("llama-eager")
    model.compile(backend=sc.spectral, options=EAGER)
    with pytest.warns(SpectralWarning, match="its attention weights are used elsewhere too: leave output_attentions out"):
        out = model.generate(tokens(1, 20), **given)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.attentions, expected.attentions)
    assert all(graph.matched == 0 for graph in sc.reports())


class Int8Linear(torch.nn.Module):
    """A linear layer with quantised weights, as loaders of quantised models put in place."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


def test_quantised_weights_compress_and_are_right() -> None:
    model, prompt = build("llama"), tokens(1, 40)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    expected = model.generate(prompt, max_new_tokens=20, **GREEDY)
    model.compile(backend=sc.spectral, options={**EAGER, "strict": True})
    assert torch.equal(model.generate(prompt, max_new_tokens=20, **GREEDY), expected)
    assert [(g.kind, g.sites, g.matched, g.notes) for g in sc.reports()] == [("prefill", 2, 2, ()), ("decode", 2, 2, ())]


def test_a_dense_cache_is_left_alone_with_a_reason() -> None:
    model, prompt = build("llama"), tokens(1, 20)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        whole = model(torch.cat((prompt, torch.tensor([[5]])), 1)).logits[:, -1]
        model.compile(backend=sc.spectral, options=EAGER)
        with pytest.warns(SpectralWarning, match="the cache holds dense tensors"):
            step = model(torch.tensor([[5]]), past_key_values=cache, position_ids=torch.tensor([[20]])).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_a_sliding_window_cache_is_left_alone_with_a_reason() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=16)).eval()
    prompt = tokens(1, 30)
    expected = model.generate(prompt, max_new_tokens=5, **GREEDY)
    model.compile(backend=sc.spectral, options=EAGER)
    with pytest.warns(SpectralWarning, match="keeps only a window of its tokens"):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, **GREEDY), expected)


def test_training_graphs_go_to_the_inner_compiler_as_they_came() -> None:
    model, prompt = build("llama"), tokens(1, 20)
    model(prompt, labels=prompt).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.compile(backend=sc.spectral, options={**EAGER, "inner": "aot_eager"})
    with pytest.warns(SpectralWarning, match="gradients"):
        model(prompt, labels=prompt).loss.backward()
    for got, want in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_graph_without_attention_is_handed_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_compile import backend

    seen = []
    monkeypatch.setattr(backend, "compile_inner", lambda gm, *_, **__: (seen.append(gm), gm.forward)[1])
    given = []

    def spy(gm, examples):
        given.append((gm, gm.code))
        return sc.spectral(gm, examples, options=EAGER)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(torch.nn.Linear(4, 4), backend=spy)(torch.ones(2, 4))
    assert seen == [given[0][0]] and seen[0].code == given[0][1]


def test_reports_carry_kind_sites_and_seconds() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options=EAGER)
    model.generate(tokens(1, 20), max_new_tokens=3, **GREEDY)
    prefill, decode = sc.reports()
    assert (prefill.kind, decode.kind) == ("prefill", "decode")
    assert prefill.seconds["passes"] > 0 and prefill.seconds["inner"] >= 0
    assert "2 of 2 attention sites compressed" in str(prefill)
    sc.reset()
    assert sc.reports() == []


def test_explain_tells_of_both_graphs_and_leaves_the_model_alone() -> None:
    model = build("llama")
    text = sc.explain(model, input_ids=tokens(1, 20))
    assert text.count("2 of 2 attention sites compressed") == 2
    assert model._compiled_call_impl is None


def test_explain_takes_the_options_of_the_backend() -> None:
    with pytest.raises(BackendCompilerFailed, match="head_group=3 does not divide"):
        sc.explain(build("llama"), input_ids=tokens(1, 20), options={"head_group": 3})


def test_memory_stats_without_a_cache_says_what_to_do() -> None:
    with pytest.raises(TypeError, match="use_cache=True"):
        sc.memory_stats(None)


def test_memory_stats_of_a_dense_cache() -> None:
    with torch.no_grad():
        cache = build("llama")(tokens(1, 20), use_cache=True).past_key_values
    stats = sc.memory_stats(cache)
    assert stats.logical_bytes == 2 * 2 * 2 * 20 * 16 * 4
    assert stats.parts["dense"] == stats.stored_bytes >= stats.logical_bytes


def test_strict_refuses_to_decode_silently() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EAGER, "strict": True})
    with torch.no_grad():
        keys = model(tokens(1, 30), use_cache=True).past_key_values.layers[0].keys
    with pytest.raises(RuntimeError, match=r"strict: .* would decode"):
        keys + 1


def test_a_decode_is_counted_and_warned_of_once() -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options=EAGER)
    with torch.no_grad():
        keys = model(tokens(1, 30), use_cache=True).past_key_values.layers[0].keys
    with pytest.warns(SpectralWarning, match="decodes the compressed cache"):
        total = keys.sum()
    torch.testing.assert_close(total, keys.dense().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys.sum()
    assert report.decodes() == 2


ASSIGNMENTS = """
import torch, transformers
from transformers import LlamaForCausalLM, cache_utils
from transformers.integrations import sdpa_attention
from tests.tiny import GREEDY, WINDOWS, build, tokens

owners = [torch.Tensor, torch.nn.Module, torch.nn.functional, cache_utils.DynamicCache, cache_utils.DynamicLayer,
          LlamaForCausalLM, sdpa_attention]

def run(**compile):
    model = build("llama")
    model.compile(**compile)
    model.generate(tokens(1, 60), max_new_tokens=5, **GREEDY)
    return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]

before = run(backend="eager")  # Dynamo and transformers set a few attributes of their own
import spectral_compile as sc
after = run(backend=sc.spectral, options={"inner": "eager", **WINDOWS})
assert [report.matched for report in sc.reports()] == [2, 2]
assert before == after
"""


def test_nothing_of_torch_or_transformers_is_assigned_to() -> None:
    subprocess.run([sys.executable, "-c", ASSIGNMENTS], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("cudagraphs", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_decode_on_a_gpu_is_recorded_unless_options_say_otherwise(kind: str, device: str, cudagraphs: bool) -> None:
    plan = SimpleNamespace(kind=kind, sites=[SimpleNamespace(device=torch.device(device))])
    wanted = (kind, device, cudagraphs) == ("decode", "cuda", True)
    assert records(plan, SpectralConfig(cudagraphs=cudagraphs)) == wanted
    assert records(plan, SpectralConfig.parse({"triton.cudagraphs": cudagraphs})) == wanted
    assert not records(plan, SpectralConfig(cudagraphs=cudagraphs, inner="eager"))


def test_a_graph_whose_inputs_vary_in_size_cannot_be_recorded() -> None:
    varies = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mask = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.zeros(3, 4), symbolic_context=varies)
    for example in (mask, mask.shape[0]):
        assert "inputs whose sizes vary" in varying([torch.zeros(2), example])
        assert varying([torch.zeros(2), example], mask.shape[0]) is None  # a batch has few sizes
    assert varying([torch.zeros(2), 7]) is None


def test_a_decode_step_by_hand_takes_no_integer_that_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``position_ids`` a model counts on from its cache's length, and a graph of integers is recorded for each anew."""
    given = []
    monkeypatch.setattr(backend, "compile_inner", lambda gm, examples, *rest: given.append(examples) or gm.forward)
    model, prompt, logits = build("llama"), tokens(1, 40), []
    with torch.no_grad():
        for options in (None, EAGER | {"strict": True}):
            if options:
                model.compile(backend=sc.spectral, options=options)
            cache = DynamicCache(config=model.config)
            parts = [prompt[:, :30], *prompt[:, 30:].split(1, 1)]
            logits.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], 1))
    torch.testing.assert_close(*logits)
    assert [(graph.kind, graph.matched) for graph in sc.reports()] == [("prefill", 2), ("decode", 2)]
    assert varying(given[-1]) is None


def test_keys_and_values_have_groups_of_their_own() -> None:
    def groups(**options: int) -> tuple[int, int]:
        layout = SpectralConfig(**options).layout(12, 64, None)
        return layout.key_group, layout.value_group

    assert groups() == (3, 3)
    assert groups(head_group=2) == (2, 2)
    assert groups(key_group=1) == (1, 3)
    assert groups(head_group=2, value_group=4) == (2, 4)
    with pytest.raises(Mistake, match="of key_group=2 and value_group=3 one must divide the other"):
        groups(key_group=2, value_group=3)


def test_groups_too_wide_for_a_gpu_are_refused() -> None:
    hopper, consumer = 227 * 1024, 99 * 1024  # bytes of shared memory that a block can have
    for heads, dim, group in ((8, 128, 2), (4, 256, 1), (8, 64, 4)):
        layout = SpectralConfig(head_group=group).layout(heads, dim, None)
        assert too_wide(layout, torch.bfloat16, hopper) is None
    assert "set head_group=2" in too_wide(SpectralConfig(head_group=4).layout(8, 128, None), torch.bfloat16, hopper)
    assert "at most 256" in too_wide(SpectralConfig().layout(2, 512, None), torch.float16, hopper)
    assert too_wide(SpectralConfig("exact").layout(2, 512, None), torch.float32, consumer) is None
    assert too_wide(SpectralConfig().layout(8, 128, None), torch.float16, consumer) is None
    assert "set head_group=1" in too_wide(SpectralConfig().layout(3, 64, None), torch.bfloat16, consumer)
    assert "at most 128" in too_wide(SpectralConfig().layout(4, 256, None), torch.bfloat16, consumer)


def test_float32_that_does_not_fit_a_gpu_is_refused() -> None:
    """Attention in float32 to heads of 96 channels and more once ended in an error of Triton's on a GPU."""
    hopper = 227 * 1024
    assert too_wide(SpectralConfig().layout(1, 64, None), torch.float32, hopper) is None
    assert "set head_group=1" in too_wide(SpectralConfig().layout(3, 64, None), torch.float32, hopper)
    assert "bfloat16" in too_wide(SpectralConfig().layout(8, 128, None), torch.float32, hopper)
