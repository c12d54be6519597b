"""RoPE: keys are stored before it wherever it is understood, with a reason elsewhere, and never turned by the wrong angles."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.outputs import cache_of
from spectral_compile.passes import rope
from spectral_compile.passes.constants import _Holds
from spectral_compile.passes.lift import lift
from spectral_compile.passes.rope import match_rope
from spectral_compile.passes.trace import fake, is_call
from tests.budget import examples
from tests.passes.harness import HEAD_DIM, KV_HEADS, Attention, hidden, run_passes
from tests.tiny import EXACT, GREEDY, GROUPED, LONG, OLDEST, TEXT, build, tokens

HOW = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
SOON = {**LONG, "original_max_position_embeddings": 64}  # long frequencies begin there; 4096 in Phi-3.5 and Phi-4-mini
THREE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}


def llama(**given: object) -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **given}))


BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "phi3-across-its-border": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**GROUPED, original_max_position_embeddings=64, rope_parameters=SOON)
    ),
    "gemma3n": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **GROUPED,
            head_dim=16,
            vocab_size_per_layer_input=256,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            layer_types=["full_attention"] * 2,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0, 0.0],
        )
    ),
    "qwen3.5": lambda: hf.Qwen3_5ForCausalLM(
        hf.Qwen3_5TextConfig(
            **GROUPED, **LINEAR, head_dim=32, layer_types=["linear_attention", "full_attention"], rope_parameters=THREE
        )
    ),
    "hunyuan": lambda: hf.HunYuanDenseV1ForCausalLM(hf.HunYuanDenseV1Config(**GROUPED, head_dim=16)),
    "qwen3-vl": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config={**GROUPED, "head_dim": 16, "rope_parameters": {**THREE, "partial_rotary_factor": 1.0}},
            vision_config={
                **EYES,
                "temporal_patch_size": 1,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        )
    ),
    "one-layer": lambda: llama(num_hidden_layers=1),
    "dynamic-ntk": lambda: llama(
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=512, vocab_size=256)),
    "falcon-alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, **TEXT)
    ),
}
newest = pytest.mark.skipif(OLDEST, reason="its models break graphs, or are not there, in the oldest transformers")


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def make(name: str, backend: object = None, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = (BUILD[name]() if name in BUILD else build(name)).eval()
    if backend is not None:
        model.compile(backend=backend, options={**EXACT, **options})
    return model


def logits(model: PreTrainedModel, *prompts: int) -> torch.Tensor:
    """Logits of new tokens after prompts of these lengths, [6 a prompt, 1, vocabulary]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cat([torch.stack(model.generate(tokens(1, count), **HOW).logits) for count in prompts])


def assert_equal(ours: torch.Tensor, dense: torch.Tensor) -> None:
    torch.testing.assert_close(ours, dense, atol=1e-4, rtol=1e-4)


def assert_compressed() -> None:
    graphs = [graph for graph in sc.reports() if graph.sites]
    assert graphs and all(graph.matched == graph.sites and not graph.refusals for graph in graphs)
    assert report.decodes() == 0


def notes() -> set[str]:
    return {note.reason for graph in sc.reports() for note in graph.notes}


def frequencies(cache: object) -> torch.Tensor:
    return torch.tensor(cache.layers[-1].keys.kind.layout.rotary.frequencies)


# What is read off the process while tracing holds until somebody changes it.


@newest
@pytest.mark.parametrize("prompts", [(40, 100), (60,)], ids=["beyond", "across"])
def test_frequencies_that_the_graph_changes_equal_dense(prompts: tuple[int, ...]) -> None:
    """LongRoPE takes others for all tokens when the text grows past a border, by a write to its buffer."""
    name = "phi3-across-its-border"
    assert_equal(logits(make(name, sc.spectral), *prompts), logits(make(name), *prompts))
    assert notes() == {"keys are stored after RoPE: the model changes inv_freq while it runs"}
    assert_compressed()


@pytest.mark.newest
@pytest.mark.parametrize("prompts", [(40, 100, 40), (60,)], ids=["there-and-back", "across"])
def test_frequencies_that_grow_with_the_text_equal_dense(prompts: tuple[int, ...]) -> None:
    assert_equal(logits(make("dynamic-ntk", sc.spectral), *prompts), logits(make("dynamic-ntk"), *prompts))
    assert_compressed()
    assert notes() == {"keys are stored after RoPE: the graph is given their angles, not their positions"}


def _replace(rope: torch.nn.Module) -> None:
    rope.inv_freq = rope.inv_freq * 0.25


CHANGES: dict[str, Callable[[torch.nn.Module], object]] = {
    "in-place": lambda rope: rope.inv_freq.mul_(0.25),
    "by-data": lambda rope: rope.inv_freq.data.mul_(0.25),
    "by-numpy": lambda rope: rope.inv_freq.numpy().__imul__(0.25),
    "replaced": _replace,
}


@pytest.mark.newest
@pytest.mark.parametrize("how", CHANGES)
def test_frequencies_changed_between_generations_turn_the_next_cache(how: str) -> None:
    ours, dense = make("llama", sc.spectral), make("llama")
    for model in (ours, dense):
        logits(model, 40)
        with torch.no_grad():
            CHANGES[how](model.model.rotary_emb)
    out = ours.generate(tokens(1, 40), **HOW)
    assert_equal(torch.stack(out.logits), logits(dense, 40))
    torch.testing.assert_close(frequencies(out.past_key_values), dense.model.rotary_emb.inv_freq, rtol=1e-5, atol=1e-8)
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode"] * 2
    assert_compressed()


def turns(model: PreTrainedModel, change: Callable[[PreTrainedModel, int], None]) -> torch.Tensor:
    """Logits of a prompt, two steps, another turn and a step, with ``change(model, i)`` before the i-th of them."""
    out, text, cache = [], tokens(1, 40, seed=3), None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, part in enumerate(text[:, :32].split((20, 1, 1, 9, 1), 1)):
            change(model, i)
            made = model(part, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            out.append(made.logits[0])
    return torch.cat(out)


@pytest.mark.newest
@pytest.mark.parametrize("at", [1, 3])
def test_keys_keep_the_rotation_that_they_were_cached_with(at: int) -> None:
    """As in the dense cache: the layer then decodes, which is counted, or an error where strict."""

    def change(model: PreTrainedModel, i: int) -> None:
        if i == at:
            model.model.rotary_emb.inv_freq.mul_(0.25)

    assert_equal(turns(make("one-layer", sc.spectral, strict=False), change), turns(make("one-layer"), change))
    assert report.decodes() > 0
    reasons = {refusal.reason for graph in sc.reports() for refusal in graph.refusals}
    assert "its keys are rotated in another way than those in the cache" in reasons
    with pytest.raises(Exception, match=r"strict.*rotated in another way"):
        turns(make("one-layer", sc.spectral), change)


@pytest.mark.newest
def test_models_that_share_code_do_not_share_frequencies() -> None:
    for base in (1e4, 1e2, 1e4):
        ours, dense = (llama(rope_parameters={"rope_type": "default", "rope_theta": base}).eval() for _ in range(2))
        dense.load_state_dict(ours.state_dict())
        ours.compile(backend=sc.spectral, options=EXACT)
        assert_equal(logits(ours, 40), logits(dense, 40))
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode"] * 2
    assert_compressed()


@pytest.mark.newest
def test_frequencies_that_keep_changing_are_no_constants() -> None:
    """Each change would be another graph, of which Dynamo makes few."""
    ours, dense = make("one-layer", sc.spectral), make("one-layer")
    for _ in range(4):
        for model in (ours, dense):
            model.model.rotary_emb.inv_freq.mul_(0.8)
        assert_equal(logits(ours, 40), logits(dense, 40))
    assert [graph.kind for graph in sc.reports()] == ["prefill", "decode"] * 3
    assert notes() == {"keys are stored after RoPE: inv_freq has changed between calls"}
    assert_compressed()


BUFFERS = ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]
PARAMETERS = ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight"]
Edit = tuple[int, str, float, bool]  # before which call, what, times what, and whether by ``data``


def edits(names: list[str]) -> st.SearchStrategy[Edit]:
    return st.tuples(st.integers(1, 4), st.sampled_from(names), st.sampled_from([0.5, -1.0, 1.25]), st.booleans())


@pytest.mark.newest
@settings(max_examples=examples(3, 20))
@given(edits(BUFFERS[:1]), st.lists(edits(BUFFERS + PARAMETERS), max_size=2))
def test_whatever_is_changed_between_calls_equals_dense(first: Edit, others: list[Edit]) -> None:
    sc.reset()

    def change(model: PreTrainedModel, i: int) -> None:
        for at, name, factor, by_data in (first, *others):
            if at == i:
                tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
                (tensor.data if by_data else tensor).mul_(factor)

    assert_equal(turns(make("one-layer", sc.spectral, strict=False), change), turns(make("one-layer"), change))


def test_a_step_on_a_gpu_trusts_versions_and_compares_what_has_none() -> None:
    """Here for a CPU's tensor: other tensors, other memory and other versions are compared, and nothing else is."""
    x = torch.ones(4)
    holds = _Holds(x.clone(), trusts=True)
    holds.trusts = True
    assert holds(x) and holds(x) and holds(x.clone())
    assert holds(x)
    x.data.mul_(2)
    assert holds(x)  # this one leaves no trace
    x.add_(0)
    assert not holds(x) and not holds(x)
    with torch.inference_mode():
        y = torch.ones(4)
        assert holds(y)
        y.mul_(2)
        assert not holds(y)
    assert not holds(torch.ones(5)) and not holds(torch.ones(4, dtype=torch.int64)) and not holds(None)


class Stretched(torch.nn.Module):
    """RoPE by other frequencies for all tokens when one is past a border, with no buffer written to."""

    def __init__(self, border: int) -> None:
        super().__init__()
        self.border, self.near = border, torch.nn.Buffer(1e-2 ** (torch.arange(8) / 8))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequency = torch.where(position_ids.max() >= self.border, self.near / 2, self.near)
        angle = position_ids[..., None].float() * frequency
        return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


@pytest.mark.parametrize("border", [50, 1 << 20])
def test_angles_that_depend_on_how_far_other_tokens_are_are_no_rotation(border: int) -> None:
    ours, dense = make("llama", sc.spectral), make("llama")
    ours.model.rotary_emb, dense.model.rotary_emb = Stretched(border), Stretched(border)
    assert_equal(logits(ours, 46), logits(dense, 46))
    reasons = {note.reason for note in sc.reports()[0].notes}
    assert reasons == {"keys are stored after RoPE: what is done to the keys is no rotation"}
    assert_compressed()


class InPlace(torch.nn.Module):
    """Angles [1, n, 16] of which the later half of the frequencies is written over the first."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].float() * torch.arange(1.0, 9.0)
        angle[..., :4] = angle[..., 4:] / 3
        angle.mul_(0.1)
        return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def test_angles_that_are_written_in_place_are_read_as_they_end() -> None:
    ours, dense = make("llama", sc.spectral), make("llama")
    ours.model.rotary_emb, dense.model.rotary_emb = InPlace(), InPlace()
    assert_equal(logits(ours, 40), logits(dense, 40))
    out = ours.generate(tokens(1, 40), **HOW)
    wanted = 0.1 * torch.cat((torch.arange(5.0, 9.0) / 3, torch.arange(5.0, 9.0)))
    torch.testing.assert_close(frequencies(out.past_key_values), wanted)
    assert not notes()
    assert_compressed()


def test_a_piece_of_a_graph_runs_what_is_written_on_its_way_and_nothing_later() -> None:
    captured = []

    def keep(gm: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., object]:
        captured.append(gm)
        return gm.forward

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 1
        y[1:] = 7
        y.view(-1)[0].add_(1)
        z = y + 0
        y.zero_()
        return z, y

    torch.compile(function, backend=keep)(torch.zeros(3))
    (gm,) = captured
    (x, *_), result = gm.graph.nodes, next(n for n in gm.graph.nodes if n.op == "output").args[0][0]
    given_ = torch.zeros(3)
    assert lift(gm, [x], result)(given_).tolist() == [1, 7, 7] and given_.tolist() == [0, 0, 0]


# Forms of RoPE: matched by what they do, or a note says why not.

FORMS = [("gpt-j", 4), ("gemma3n", 8), ("gemma4-proportional", 16), ("qwen3.5", 8), ("qwen3-vl", 8)]


@newest
@pytest.mark.parametrize("name, pairs", FORMS)
def test_keys_are_stored_before_rope_of_every_form(name: str, pairs: int) -> None:
    """Keys [B, T, H, D], a table of angles, channels that stand still, and three positions that are one."""
    ours = make(name, sc.spectral)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = ours.generate(tokens(1, 40), **HOW)
    assert_equal(torch.stack(out.logits), logits(make(name), 40))
    assert len(frequencies(out.past_key_values)) == pairs
    assert not notes()
    assert_compressed()


@newest
@pytest.mark.parametrize("count", [2, 4])
def test_a_prompt_of_as_many_tokens_as_heads_leaves_no_doubt(count: int) -> None:
    """[B, T, H, D] and [B, H, T, D] then look the same."""
    assert_equal(logits(make("gpt-j", sc.spectral), count), logits(make("gpt-j"), count))
    assert_equal(logits(make("llama", sc.spectral), count), logits(make("llama"), count))
    assert not notes()
    assert_compressed()


WHY = {
    "hunyuan": "parameters are applied to them after it",
    "phi3-across-its-border": "the model changes inv_freq while it runs",
}


@newest
@pytest.mark.parametrize("name", WHY)
def test_a_note_says_why_keys_are_stored_after_rope(name: str) -> None:
    assert_equal(logits(make(name, sc.spectral), 40), logits(make(name), 40))
    assert notes() == {f"keys are stored after RoPE: {WHY[name]}"}
    assert all(len(graph.notes) == graph.sites for graph in sc.reports())
    assert_compressed()


@newest
@pytest.mark.parametrize("alike_first", [True, False])
def test_positions_in_time_height_and_width_are_one_while_they_are_equal(alike_first: bool) -> None:
    """As those of a text are; those of an image differ, and Dynamo then asks for a graph that stores keys after RoPE."""
    model, dense, prompt = make("qwen3-vl", sc.spectral), make("qwen3-vl"), tokens(1, 40)
    alike = torch.arange(40).expand(3, 1, 40).contiguous()
    apart = alike.clone()
    apart[1:, :, 9:25] -= torch.arange(16) // 2
    for positions in (alike, apart) if alike_first else (apart, alike):
        with torch.no_grad():
            got, want = (m(input_ids=prompt, position_ids=positions, use_cache=True) for m in (model, dense))
        assert_equal(got.logits, want.logits)
        rotary = cache_of(got).layers[0].keys.kind.layout.rotary
        if alike_first or positions is apart:  # what is stored after RoPE may be turned by any positions
            assert (rotary is None) == (positions is apart)
        assert_equal(cache_of(got).layers[0].keys.dense(), cache_of(want).layers[0].keys)
    assert report.decodes() == 0


@pytest.mark.parametrize("name", ["gpt2", "opt", "smollm3-without-rope"])
def test_keys_that_are_not_rotated_have_no_note(name: str) -> None:
    logits(make(name, sc.spectral), 40)
    assert not notes()
    assert_compressed()


# Refusals that name what the caller can do something about.


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_alibi_is_named(name: str) -> None:
    assert_equal(logits(make(name, sc.spectral, strict=False), 40), logits(make(name), 40))
    assert {refusal.reason for graph in sc.reports() for refusal in graph.refusals} == {
        "its attention adds a bias to its scores (ALiBi), which attention to a compressed cache does not"
    }
    assert report.decodes() == 0


GIVEN = [
    ("llama", {"use_cache": False}, "the model is called with use_cache=False"),
    ("llama-eager", {"use_cache": False}, "the model is called with use_cache=False"),
    ("llama", {"output_attentions": True}, "output_attentions=True breaks the graph"),
    ("llama-eager", {"output_attentions": True}, "leave output_attentions out"),
]


@pytest.mark.parametrize("name, given_, reason", GIVEN, ids=["sdpa-uncached", "uncached", "sdpa-weights", "weights"])
def test_what_the_call_asks_for_is_the_reason(name: str, given_: dict[str, bool], reason: str) -> None:
    with torch.no_grad(), pytest.warns(report.SpectralWarning, match=reason):
        make(name, sc.spectral, strict=False)(tokens(1, 12), **given_)
    assert any(reason in refusal.reason for graph in sc.reports() for refusal in graph.refusals)


def test_guards_of_constants_are_asked_at_every_call() -> None:
    """From Python 3.12 on Dynamo skips guards of a module's tensors while its dictionaries are the same."""
    sc.reset()
    model = build("llama")
    model.compile(backend=sc.spectral, options=EXACT)
    model.generate(tokens(1, 20), max_new_tokens=2, **GREEDY)
    entries = _debug_get_cache_entry_list(type(model).forward.__code__)
    assert len(entries) == 2
    for entry in entries:
        entry.guard_manager.find_tag_safe_roots()
        lines = str(entry.guard_manager).splitlines()
        (at,) = (i for i, line in enumerate(lines) if "['inv_freq'] holds what was read" in line)
        depth = lines[at].index("+-")
        for line in reversed(lines[:at]):
            if "+-" in line and line.index("+-") < depth:
                depth = line.index("+-")
                assert "tag_safe=(True" not in line


@pytest.mark.parametrize("cached", [0, 40])
def test_a_rotated_key_is_stored_as_it_was_before(cached: int) -> None:
    module = Attention()
    trace = run_passes(module, match_rope, cached=cached, **hidden(2, 41))
    (site,) = trace.matched
    assert is_call(site.stored_key, "transpose") and tuple(fake(site.stored_key).shape[1::2]) == (KV_HEADS, HEAD_DIM)
    assert site.positions.op == "placeholder" and site.note is None
    assert site.rotary == site.layout.rotary and not site.rotary.interleaved and site.rotary.scaling == 1
    assert site.rotary.frequencies == pytest.approx(module.inv_freq.tolist())


def test_a_key_that_is_not_rotated_is_stored_as_attention_sees_it() -> None:
    (site,) = run_passes(Attention(rope=False), match_rope, **hidden(2, 40)).matched
    assert (site.stored_key, site.rotary, site.layout.rotary, site.note) == (site.edge.new[0], None, None, None)


def test_a_key_that_is_changed_by_its_position_in_another_way_is_stored_so_with_a_note() -> None:
    class Scaled(Attention):
        def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return x * (1 + positions[:, None, :, None] * self.inv_freq[0])

    (site,) = run_passes(Scaled(), match_rope, **hidden(2, 40)).matched
    assert (site.stored_key, site.rotary) == (site.edge.new[0], None)
    assert site.note == "keys are stored after RoPE: the rotated channels are not the first ones"


def test_layers_that_view_the_same_angles_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of one token is run once for each channel: for each of 16 layers that took five of its six seconds."""
    probed = []
    probe = rope._probe
    monkeypatch.setattr(rope, "_probe", lambda turn, dim: probed.append(dim) or probe(turn, dim))
    torch.manual_seed(0)
    model = llama(num_hidden_layers=4).eval()
    model.compile(backend="spectral", options=EXACT)
    model.generate(tokens(1, 40), **HOW)
    assert [graph.matched for graph in report.reports()] == [4, 4]
    assert probed == [16, 16], "once for the prefill, once for the decode"
