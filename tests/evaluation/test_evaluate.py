"""The evaluation: its figures on a tiny random model, and that it refuses what it cannot vouch for."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectral_compile import models
from spectral_compile.cli.eval import table
from spectral_compile.codec import PRESETS as CODECS
from spectral_compile.codec import Profile
from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Mistake, Refused
from spectral_compile.evaluation import calibrate as calibration
from spectral_compile.evaluation import contenders, once, simulated, tasks
from spectral_compile.evaluation import texts as built_in
from spectral_compile.evaluation.branches import Branch, branched
from spectral_compile.evaluation.calibrate import calibrate
from spectral_compile.evaluation.contenders import Contender, contender, options_of, require_matched, split
from spectral_compile.evaluation.measure import Agreement, Result, Trial, compare, read
from spectral_compile.evaluation.once import calibrate_once
from spectral_compile.evaluation.size import weigh
from spectral_compile.evaluation.trace import Step, show, trace
from spectral_compile.fingerprint import fingerprint, keep, known
from spectral_compile.report import GraphReport, SpectralWarning, reports
from spectral_compile.stats import storage_bytes
from tests.budget import FULL
from tests.hybrids import HYBRIDS
from tests.shell import invoke
from tests.tiny import GROUPED, WINDOWS, build, tokens

pytestmark = pytest.mark.xdist_group("evaluate")  # its fixtures read long texts, once

PROMPT, SCORED, DECODED = 1124, 40, 24  # the window is exactly full after the prompt, and codes no block while decoding if
WINDOW = {"recent": 64, "block": 32}
PRESETS = ("exact", "quality", "balanced", "compact", "seed")
TEXTS = {name: tokens(1, PROMPT + SCORED + 1, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A tiny Llama whose attention is sharp enough to depend on its cache, with heads wide enough to tell presets apart."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, head_dim=32)).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            projection.weight.data *= 10
    return model


@pytest.fixture(scope="module")
def results(llama: PreTrainedModel) -> dict[str, Result]:
    options = {json.dumps({"preset": name, **WINDOW}): name for name in ("quality", "balanced", "compact")}
    rivals = ("kivi-4", "turbo-2", *(() if contenders.obstacle("fp8", llama.config) else ("fp8",)))
    made = compare(llama, None, ("exact", *options, "seed", *rivals), Trial(TEXTS, PROMPT, DECODED))
    named = (replace(result, name=options.get(result.name, result.name)) for result in made)
    return {result.name: result for result in named}


def test_the_dense_cache_agrees_with_itself(results: dict[str, Result]) -> None:
    dense = results["dense"]
    assert dense.ratio == 1 and dense.size.coded_ratio is None
    for which in ("span", "extended", "decoded"):
        mean = dense.mean(which)
        assert (mean.change, mean.top1) == (0, 1) and abs(mean.kl) < 1e-9


def test_texts_read_together_give_what_they_give_alone(results: dict[str, Result], llama: PreTrainedModel) -> None:
    names = ("seed", "kivi-4", *(["exact"] if FULL else []))
    for found in compare(llama, None, names, Trial(TEXTS, PROMPT, DECODED, batch=2)):
        alone = results[found.name]
        assert found.dense_bytes == alone.dense_bytes
        assert found.size.stored_bytes == pytest.approx(alone.size.stored_bytes, rel=1e-3)
        for name, score in found.scores.items():
            for which in ("span", "extended", "decoded"):
                one, other = getattr(score, which), getattr(alone.scores[name], which)
                assert (one.nll, one.kl) == (pytest.approx(other.nll, rel=1e-4), pytest.approx(other.kl, rel=0.02, abs=1e-6))


def test_the_exact_preset_loses_nothing(results: dict[str, Result]) -> None:
    for which in ("span", "extended", "decoded"):
        mean = results["exact"].mean(which)
        assert abs(mean.kl) < 1e-6 and mean.top1 == 1 and abs(mean.change) < 1e-2


def test_the_smaller_the_cache_the_larger_the_loss(results: dict[str, Result]) -> None:
    by_loss = sorted(PRESETS, key=lambda name: results[name].mean().kl)
    assert by_loss[:2] == ["exact", "quality"]
    assert results["quality"].ratio < results["balanced"].ratio < results["compact"].ratio
    assert results["seed"].mean().kl > 1e-3


@pytest.mark.parametrize("name", ["dense", *PRESETS])
def test_decoding_predicts_what_extending_predicts(results: dict[str, Result], name: str) -> None:
    for score in results[name].scores.values():
        assert score.extended.tokens == score.decoded.tokens == DECODED
        assert math.isclose(score.extended.kl, score.decoded.kl, rel_tol=1e-2, abs_tol=1e-6)
        assert math.isclose(score.extended.nll, score.decoded.nll, rel_tol=1e-4)


def test_bytes_are_those_that_are_held(results: dict[str, Result], llama: PreTrainedModel) -> None:
    keys = llama.config.num_key_value_heads * llama.config.head_dim
    assert results["dense"].size.stored_bytes == llama.config.num_hidden_layers * 2 * keys * PROMPT * 4
    for name in PRESETS:
        size = results[name].size
        assert size.stored_bytes == sum(size.parts.values())
        assert size.parts["codes"] > 0 and size.coded_ratio > 0
    assert results["balanced"].size.coded_ratio > results["balanced"].ratio > 2


def test_storages_are_counted_once_and_whole() -> None:
    base = torch.zeros(10, dtype=torch.int16)
    assert storage_bytes({"a": (base[:2], [base[3:]]), "b": 7, "c": torch.zeros(3)}) == 20 + 12


def dense_cache(llama: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=llama.config)
    contender(llama, "dense").feed(cache, tokens(1, 8))
    return cache


def test_a_dense_cache_weighs_what_its_tensors_do(llama: PreTrainedModel) -> None:
    cache = dense_cache(llama)
    assert weigh(cache).parts == {"dense": sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))}


def test_a_rival_runs_through_its_own_code(results: dict[str, Result]) -> None:
    if "fp8" not in results:
        pytest.skip("this transformers has no fp8 cache")
    fp8 = results["fp8"]
    assert 3.9 < fp8.ratio <= 4  # of float32, with two scales a layer
    assert fp8.size.coded_ratio is None and fp8.mean().kl > 0


def test_kl_and_perplexity_of_a_known_distribution() -> None:
    dense, ours = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    made = Agreement.of(ours, dense, torch.tensor([1]))
    assert made.kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert made.perplexity == pytest.approx(4) and made.change == pytest.approx(100)


def test_the_mean_is_over_log_likelihoods() -> None:
    mean = Agreement.mean([Agreement(4, 1.0, 1.0, 0.0, 1.0), Agreement(4, 2.0, 1.0, 0.2, 0.5)])
    assert (mean.tokens, mean.nll, mean.kl, mean.top1) == (8, 1.5, 0.1, 0.75)


def test_a_graph_that_is_missing_fails_loudly(llama: PreTrainedModel) -> None:
    read(contender(llama, "exact"), tokens(1, 30), 20)
    require_matched({"prefill", "extend"})
    with pytest.raises(RuntimeError, match="expected decode, extend, prefill graphs"):
        require_matched({"prefill", "extend", "decode"})


def test_a_model_of_which_nothing_is_compressed_is_said(llama: PreTrainedModel) -> None:
    with pytest.raises(Refused, match=r"nothing was compressed: .*keys are float64"), pytest.warns(SpectralWarning):
        read(contender(copy.deepcopy(llama).double(), "exact"), tokens(1, 30), 20)


def test_a_cache_that_stays_dense_fails_loudly(llama: PreTrainedModel) -> None:
    uncompiled = replace(contender(llama, "exact"), model=llama)
    with pytest.raises(RuntimeError, match="exact: the cache is dense"):
        read(uncompiled, tokens(1, 30), 20)


def test_a_site_that_matches_in_one_graph_alone_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "reports", lambda: [GraphReport("prefill", 2, 2), GraphReport("decode", 2, 1)])
    with pytest.raises(RuntimeError, match="decode: 1 of 2 attention sites compressed"):
        require_matched({"prefill", "decode"})


def test_built_in_texts_do_not_overlap_and_are_of_three_kinds(tiny_folder: Path) -> None:
    _, tokenizer = models.load(str(tiny_folder))
    expected = ["topics 0", "topics 1", "argparse.py", "inspect.py", "dialogue 0"]
    assert list(built_in.texts(tokenizer, 5, 100)) == expected
    pieces = built_in.prose(3)
    assert len(set(pieces)) == 3 and all(len(piece) == len(pieces[0]) for piece in pieces)


def test_a_text_that_is_too_short_is_named(tiny_folder: Path) -> None:
    _, tokenizer = models.load(str(tiny_folder))
    with pytest.raises(Mistake, match=r"short\.txt has only 2 of 100 tokens"):
        built_in.texts(tokenizer, 1, 100, {"short.txt": "w2 w3"})


@pytest.mark.parametrize("task", tasks.TASKS)
def test_questions_stand_at_their_depth_and_repeat(tiny_folder: Path, task: str) -> None:
    _, tokenizer = models.load(str(tiny_folder))
    first, again = (tasks.questions(tokenizer, task, 200, 4) for _ in range(2))
    assert [question.depth for question in first] == [0.125, 0.375, 0.625, 0.875]
    assert all(a.answer == b.answer and torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert len({question.answer for question in first}) > 1


@pytest.mark.parametrize("task", tasks.TASKS)
def test_what_is_asked_for_stands_in_the_text(task: str) -> None:
    hidden = tasks.TASKS[task](random.Random(0))
    told = "\n".join(hidden.lines)
    assert hidden.answer in told and hidden.answer not in hidden.question + hidden.begun
    if task == "count":
        words = [line.split()[-1].strip(".") for line in hidden.lines]
        assert max(set(words), key=words.count) == hidden.answer


@pytest.mark.parametrize("key", ["w7", "w8"])
def test_a_key_is_found_in_what_the_model_says(tiny_folder: Path, key: str) -> None:
    _, tokenizer = models.load(str(tiny_folder))

    class SaysSeven:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.full((1, 1), 7), 128))

    says_seven = Contender("says seven", SaysSeven(), DynamicCache)
    assert tasks.answers(says_seven, tokenizer, tasks.Question("key", tokens(1, 5), key, 0.5, "", "")) == (key == "w7")


def test_the_table_has_a_row_for_each_cache(results: dict[str, Result]) -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(table(list(results.values()), "a title"))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("a title", "ratio, coded part", f"KL, first {DECODED}", "KL, same decoded", *results))


def test_a_narrow_table_cuts_no_name_off(results: dict[str, Result]) -> None:
    console = Console(width=80, file=io.StringIO())
    long = [replace(result, name=f"{name}-without-nothing") for name, result in results.items()]
    console.print(table(long, "a title"))
    assert all(result.name in console.file.getvalue() for result in long if len(result.name) <= 24)
    assert any(result.name == "balanced-without-nothing" for result in long)


def test_the_command_prints_a_table_and_writes_json(tiny_folder: Path, tmp_path: Path) -> None:
    text, out, plot = (tmp_path / name for name in ("text.txt", "out.json", "plot.png"))
    text.write_text(" ".join(f"w{2 + i * i % 126}" for i in range(1300)))
    caches = ("--presets", "balanced", "--rivals", "", "--device", "cpu", "--dtype", "float32")
    work = ("--tokens", 1124, "--scored", 16, "--text", text, "--tasks", "key", "--json", out, "--plot", plot)
    result = invoke("eval", "--model", tiny_folder, *caches, *work)
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("ratio, all bytes", "ratio, coded part", "balanced", "key 3000", "/16"))
    written = json.loads(out.read_text())
    assert set(written) == {"settings", "caches"} and written["settings"]["tokens"] == 1124
    assert [cache["cache"] for cache in written["caches"]] == ["dense", "balanced"]
    fields = {"cache", "ratio", "dense_bytes", "stored_bytes", "parts", "coded_ratio", "span", "tasks", "texts"}
    assert all(set(cache) == fields for cache in written["caches"])
    assert all(cache["tasks"]["key 3000"]["cases"] == 16 for cache in written["caches"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(written["caches"][1]["texts"]) == {"text.txt"}


def test_a_preset_can_go_without_an_ingredient() -> None:
    whole, without = CODECS["balanced"], options_of("balanced-margin-joint")["preset"]
    assert (without.margin, without.key_group, without.value_group) == (1.0, 1, 1) and without.key == whole.key
    assert options_of("balanced")["preset"] == whole
    assert options_of('{"preset": "compact", "recent": 8}') == {"preset": "compact", "recent": 8}
    assert options_of("balanced-luck") is None and options_of("kivi-4") is None
    assert split('quality,{"a": 1, "b": 2},seed') == ["quality", '{"a": 1, "b": 2}', "seed"]


@pytest.mark.parametrize(("name", "most"), [("kivi-4", 0.1), ("kivi-2", 0.45), ("turbo-4", 0.11), ("turbo-2", 0.36)])
def test_a_simulated_codec_loses_and_weighs_what_its_bits_say(name: str, most: float) -> None:
    x = torch.randn(2, 3, 320, 64, generator=torch.Generator().manual_seed(0))
    bits = int(name[-1])
    for codec in simulated.SIMULATED[name]:
        restored, stored = codec(x)
        assert restored.shape == x.shape and 0.005 < (restored - x).norm() / x.norm() < most
        assert bits / 8 < stored / x.numel() <= bits / 8 + 1 / 8


@pytest.mark.parametrize("name", ["turbo-2", "kivi-2"])
def test_a_simulated_cache_loses_all_but_its_windows(name: str, llama: PreTrainedModel) -> None:
    trial, dense = contender(llama, name), contender(llama, "dense")
    cache, plain = trial.empty(), dense.empty()
    ids = tokens(1, 500)
    assert torch.equal(trial.feed(cache, ids[:, :400]), dense.feed(plain, ids[:, :400]))
    for i in range(400, 500):
        trial.feed(cache, ids[:, i : i + 1])
        dense.feed(plain, ids[:, i : i + 1])
        lost = (cache.layers[0].keys != plain.layers[0].keys).any(-1).any(1)[0]
        coded = (i + 1 - 4 - 96) // 32 * 32
        assert not lost[:4].any() and lost[4 : 4 + coded].all() and not lost[4 + coded :].any()
    row = 2 * cache.layers[0].keys[:, :, 0].nbytes * len(cache.layers)
    packed = coded * row * (2 / 32 + (1 / 32 if name == "kivi-2" else 1 / 64))  # bits, and scales, in numbers of 32 bits
    assert weigh(cache).stored_bytes == packed + (500 - coded) * row


def test_calibration_finds_the_layer_that_matters(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    profile = calibrate(model, [tokens(1, PROMPT + 40)], PROMPT)
    assert (profile.kv_heads, profile.head_dim) == (llama.config.num_key_value_heads, llama.config.head_dim)
    assert profile.loss[1] > 100 * profile.loss[0] and profile.coarse_loss[1] > profile.loss[1]


def test_a_profile_is_of_each_layers_cache_exchanged_alone(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written out, one after the other; layers some at a time."""
    ids = tokens(1, PROMPT + 24)
    dense = contender(llama, "dense")
    exact = dense.empty()
    with torch.no_grad():
        dense.feed(exact, ids[:, :PROMPT], keep=1)
        expected = dense.feed(copy.deepcopy(exact), ids[:, PROMPT:-1])
        found: list[list[float]] = []
        for preset in calibration.PRESETS:
            ours = contender(llama, preset)
            held = ours.empty()
            ours.feed(held, ids[:, :PROMPT], keep=1)
            found.append([])
            for own, part in enumerate(held.layers):
                trial = copy.deepcopy(exact)
                trial.layers[own].keys, trial.layers[own].values = part.keys.dense(), part.values.dense()
                logits = dense.feed(trial, ids[:, PROMPT:-1])
                found[-1].append(Agreement.of(logits, expected, ids[0, PROMPT + 1 :]).kl)
    each = torch.tensor(found, dtype=torch.float64)
    each = (each - each.amin(-1, keepdim=True)).clamp(min=calibration.LEAST)
    for logits in (1 << 28, 1):
        monkeypatch.setattr(calibration, "_LOGITS", logits)
        profile = calibrate(llama, [ids], PROMPT)
        losses = torch.tensor([profile.loss, profile.coarse_loss], dtype=torch.float64)
        torch.testing.assert_close(losses, each, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "llama, layers in no list", "gemma3", "qwen3.5"])
def test_branches_are_what_each_trial_alone_is(kind: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one window's layers, and of layers that hold a state, too."""
    model = llama if kind.startswith("llama") else HYBRIDS[kind]().eval() if kind in HYBRIDS else build(kind)
    ids, dense = tokens(1, 60), contender(model, "dense")
    exact = dense.empty()
    with torch.no_grad():
        dense.feed(exact, ids[:, :40], keep=1)
        held = [(i, layer) for i, layer in enumerate(exact.layers) if isinstance(getattr(layer, "keys", None), torch.Tensor)]
        caches = [(i, layer.keys, layer.values) for i, layer in reversed(held)]
        trials = [trial for i, k, v in caches for trial in (Branch(i, k.flip(2), v), Branch(i, k, v.flip(2)))]
        if "list" in kind:
            monkeypatch.setattr(model, "get_decoder", lambda: None)
        found = branched(dense, exact, ids[:, 40:], trials)
        for trial, row in zip([None, *trials], found, strict=True):
            alone = copy.deepcopy(exact)
            if trial is not None:
                alone.layers[trial.layer].keys, alone.layers[trial.layer].values = trial.keys, trial.values
            torch.testing.assert_close(row, dense.feed(alone, ids[:, 40:]), rtol=1e-4, atol=1e-5)
        assert exact.get_seq_length() == 40


def test_calibrate_writes_what_the_backend_takes(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a file, or to where it is found without being asked for."""
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text(" ".join(f"w{2 + i * i % 126}" for i in range(1300)))
    work = ("--model", tiny_folder, "--tokens", 1124, "--scored", 16, "--text", text, "--device", "cpu")
    result = invoke("calibrate", out, *work)
    assert result.exit_code == 0, result.output
    profile = Profile.load(out)
    model = models.load(str(tiny_folder), torch.float32)[0]
    assert len(profile.loss) == model.config.num_hidden_layers
    assert profile.fingerprint == fingerprint(model.parameters()) and known(profile.fingerprint) is None
    result = invoke("calibrate", *work)
    assert result.exit_code == 0 and "from now on this model is compiled with it" in result.output
    assert known(profile.fingerprint) == profile
    trial = contender(model, "compact+profile", profile=profile)
    read(trial, tokens(1, PROMPT + 4) % model.config.vocab_size, PROMPT)
    require_matched({"prefill", "extend"})


def test_a_model_is_measured_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path))
    model, tokenizer = models.load(str(tiny_folder), torch.float32)
    profile = calibrate_once(model, tokenizer, tokens=1124, scored=16)
    assert known(fingerprint(model.parameters())) == profile and len(profile.loss) == model.config.num_hidden_layers
    monkeypatch.setattr(once, "calibrate", None)  # which is not called again, of another process either
    again, _ = models.load(str(tiny_folder), torch.float32)
    assert calibrate_once(again, tokenizer) == profile
    again.compile(backend="spectral", options={"strict": True, "inner": "eager"})
    with torch.no_grad():
        again(tokens(1, PROMPT) % model.config.vocab_size, use_cache=True)
    assert reports()[-1].matched == 2 and "by a profile" in str(reports()[-1])


def test_a_model_without_vectors_has_no_profile_to_be_found() -> None:
    with pytest.raises(Mistake, match="name a file"):
        keep(Profile(2, 16, (0.1,), (0.2,)))


def test_a_trace_marks_what_diverges_and_where(llama: PreTrainedModel) -> None:
    ids = tokens(1, PROMPT)
    same, other = (trace(llama, name, ids, 6) for name in ("exact", "seed"))
    assert all(step.dense == step.ours and step.gap == 0 and step.kl < 1e-6 for step in same)
    assert all(len(step.layers) == llama.config.num_hidden_layers for step in (*same, *other))
    assert min(min(step.layers) for step in same) > 0.999 > min(min(step.layers) for step in other)
    assert [step.dense for step in same] == [step.dense for step in other]
    assert same == trace(llama, "exact", ids, 6)


def test_the_first_layer_to_drift_is_named(tiny_folder: Path) -> None:
    _, tokenizer = models.load(str(tiny_folder))
    steps = [Step(3, 3, 0.0, 0.0, (1.0, 0.999, 0.9, 0.88)), Step(4, 5, 0.5, 0.1, (1.0, 1.0, 0.92, 0.9))]
    console = Console(width=160, file=io.StringIO())
    console.print(show(steps, "balanced", tokenizer))
    shown = " ".join(console.file.getvalue().split())
    assert "the first other token comes at step 2, 1 in all; layer 2 is the first to drift" in shown


def test_the_command_traces(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{2 + i * i % 126}" for i in range(1300)))
    work = ("--presets", "balanced", "--rivals", "", "--device", "cpu", "--tokens", 1124, "--scored", 1, "--trace", 3)
    result = invoke("eval", "--model", tiny_folder, "--text", text, *work)
    assert result.exit_code == 0, result.output
    assert "balanced beside dense" in result.stdout and "is the first to drift" in result.stdout


def test_a_rival_that_is_not_installed_is_named(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "obstacle", lambda name, config: f"no {name}")
    text = tmp_path / "text.txt"
    text.write_text("w2 w3 " * 40)
    work = ("--presets", "", "--rivals", "quanto-4", "--device", "cpu", "--tokens", 20, "--scored", 4)
    result = invoke("eval", "--model", tiny_folder, "--text", text, *work)
    assert result.exit_code == 2 and "quanto-4 cannot be used here, so leave it out: no quanto-4" in result.stderr


@pytest.mark.parametrize("name", ["gemma3", "cohere2", "gpt-oss"])
def test_layers_that_stay_dense_are_dense_in_every_cache_and_count(name: str) -> None:
    """Of two layers the first keeps a window of 24 tokens."""
    model, texts = build(name), {"one": tokens(1, 210)}
    options = json.dumps({"preset": "exact", **WINDOWS})
    dense, exact, turbo = compare(model, None, (options, "turbo-4"), Trial(texts, 200))
    assert abs(exact.mean().kl) < 1e-6 and exact.mean().top1 == 1
    window, whole = (storage_bytes(vars(layer)) for layer in dense_after(model, texts["one"][:, :200]).layers)
    assert dense.dense_bytes == dense.size.stored_bytes == whole + window
    assert exact.size.parts["codes"] > 0 and exact.size.parts["dense"] + exact.size.parts["other"] > window
    assert window + whole < exact.size.stored_bytes < window + 2 * whole
    assert window < turbo.size.stored_bytes < dense.size.stored_bytes


def dense_after(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    plain = contender(model, "dense")
    cache = plain.empty()
    plain.feed(cache, ids)
    return cache


def test_a_model_with_states_is_compared_too() -> None:
    options = json.dumps({"preset": "exact", **WINDOWS})
    dense, exact = compare(HYBRIDS["qwen3.5"]().eval(), None, (options,), Trial({"one": tokens(1, 60)}, 48))
    assert abs(exact.mean().kl) < 1e-5
    assert exact.size.parts["states"] > 0 and dense.dense_bytes > exact.size.parts["states"]


def test_eval_and_calibrate_take_a_model_of_which_some_layers_stay_dense(tiny_folder: Path, tmp_path: Path) -> None:
    folder, text, out = tmp_path / "gemma3", tmp_path / "text.txt", tmp_path / "profile.json"
    build("gemma3").save_pretrained(folder)
    models.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    text.write_text(" ".join(f"w{2 + i * i % 126}" for i in range(1300)))
    work = ("--model", folder, "--text", text, "--tokens", 1260, "--scored", 8, "--device", "cpu", "--dtype", "float32")
    calibrated = invoke("calibrate", out, *work)
    assert calibrated.exit_code == 0, calibrated.output
    known = Profile.load(out)
    assert (known.kv_heads, known.head_dim) == (2, 16)
    for losses in (known.loss, known.coarse_loss):
        assert losses[0] is None and losses[1] > 0
    shown = invoke("eval", *work, "--presets", "compact+profile", "--rivals", "", "--profile", out)
    assert shown.exit_code == 0, shown.output
    assert "compact+profile" in shown.stdout
    assert "full attention" in contenders.obstacle("quanto-4", build("gemma3").config)


def test_a_profile_divides_bytes_among_layers_that_have_losses_alone() -> None:
    losses = (0.5, 0.001, 0.02)
    alone = Profile(3, 64, losses, losses)
    mixed = (None, losses[0], None, *losses[1:])
    among = Profile(3, 64, mixed, mixed)
    layout = SpectralConfig("balanced").layout(3, 64, None)
    assert [among.apply(layout, layer) for layer in (1, 3, 4)] == [alone.apply(layout, layer) for layer in range(3)]
    assert among.apply(layout, 0) == among.apply(layout, 2) == layout
    for wrong in ((mixed, losses), (mixed, (0.5, None, *mixed[2:])), ((None,),) * 2):
        with pytest.raises(ValueError, match="a profile holds two finite losses"):
            Profile(3, 64, *wrong)
