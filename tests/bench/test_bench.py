"""The benchmark: a whole run with tiny models on the CPU, and what it says when something fails or is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from spectral_compile.bench import attention, generation, host, measure, second, waits
from spectral_compile.bench.measure import GEOMETRIES, Settings, build, one_line, tidy
from spectral_compile.bench.store import Layer, draw
from spectral_compile.cli import bench, console
from spectral_compile.codec import PRESETS
from spectral_compile.runtime import BoundGraph
from tests import shell
from tests.budget import FULL

TINY = ("--geometry", "tiny", "--device", "cpu", "--dtype", "float32", "--inner", "eager", "--cached", "1300")
SETTINGS = Settings(
    geometries=("tiny",),
    pairs=((1, 1300),),
    presets=("balanced",),
    cached=(1300,),
    variants=("eager", "spectral"),
    chunk=None,
    new_tokens=4,
    steady_tokens=4,
    dtype=torch.float32,
    device=torch.device("cpu"),
    inner="eager",
    seed=0,
)


invoke = partial(shell.invoke, "bench")


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """Times are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SPENT", 0.01)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any], Path]:
    """All parts but the host's: output, JSON and plot."""
    folder = tmp_path_factory.mktemp("bench")
    work = ("--parts", "attention,encode,generate,steady", "--pairs", "1x1400,2x1300", "--variants", "eager,spectral")
    files = ("--json", folder / "out.json", "--plot", folder / "out.png")
    result = invoke(*TINY, *work, "--new-tokens", 5, "--steady-tokens", 12, *files)
    assert result.exit_code == 0, result.output
    return result, json.loads((folder / "out.json").read_text()), folder / "out.png"


def rows(run: tuple[Result, dict[str, Any], Path], part: str) -> list[dict[str, Any]]:
    return run[1]["parts"][part]


def test_every_part_prints_a_table_under_a_header(run: tuple[Result, dict[str, Any], Path]) -> None:
    shown = run[0].stdout
    assert all(f"{name} " in shown.splitlines()[0] for name in ("device", "torch", "triton", "transformers", "command"))
    titles = ("Decode attention of one layer", "Prefill of one layer", "generate, greedy", "Many new tokens")
    assert all(title in shown for title in titles)
    assert "prefill 2/2, decode 2/2" in shown and "against best dense" in shown


def test_progress_goes_to_stderr(run: tuple[Result, dict[str, Any], Path]) -> None:
    assert "attention: tiny, 1, 1400, balanced" in run[0].stderr
    assert "attention: tiny" not in run[0].stdout


def test_a_plot_is_drawn(run: tuple[Result, dict[str, Any], Path]) -> None:
    assert run[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("preset", "keys"), [("balanced", "latent"), ("seed", "rebuilt")])
def test_a_step_of_a_large_model_takes_the_form_that_is_faster(preset: str, keys: str) -> None:
    """Where a store or a plan does not suit it, keys are rebuilt with the same result, only slower."""
    settings = measure.Settings(None, (), (), (), (), None, 1, 1, torch.bfloat16, torch.device("cuda"), "inductor", 0, 1)
    row = attention.spectral(measure.GEOMETRIES["llama-3-8b"], settings, 1, 4096, preset)
    assert row["keys"] == keys and row["relative_error"] < 4e-3


def test_attention_is_compared_and_right(run: tuple[Result, dict[str, Any], Path]) -> None:
    copied, *measured = rows(run, "attention")
    assert copied["bytes_per_s"] > 0
    assert [row["method"] for row in measured] == [attention.GQA, attention.REPEATED, attention.FP8, "balanced", "seed"] * 2
    for row in measured:
        assert row["error"] is None and row["timed"] == ("bytes / copy" if row["method"] == attention.FP8 else "call")
        assert min(row[name] for name in ("microseconds", "speedup_gqa", "speedup_repeat_kv", "floor_microseconds")) > 0
    for dense, _, fp8, *spectral in (measured[:5], measured[5:]):
        assert fp8["bytes_read"] * 4 == dense["bytes_read"]
        assert fp8["microseconds"] == pytest.approx(fp8["floor_microseconds"]) and fp8["speedup_fp8"] == 1
        assert dense["bytes_read"] == 2 * 2 * 16 * 4 * dense["batch"] * (dense["cached"] + 1)
        for row in spectral:
            assert 0 < row["relative_error"] < 1e-5 and row["bytes_read"] < dense["bytes_read"]


@pytest.mark.parametrize("columns", [1, 4])
def test_a_step_of_several_columns_is_right(columns: int) -> None:
    settings = replace(SETTINGS, columns=columns)
    rows = [measurement.row() for measurement in attention.measurements(settings)]
    attention.derive(rows)
    assert [row["error"] for row in rows] == [None] * 5
    assert rows[-1]["relative_error"] < 1e-5
    assert rows[1]["bytes_read"] == 2 * 2 * 16 * 4 * (1300 + columns)


def test_encoding_is_a_share_of_the_layer(run: tuple[Result, dict[str, Any], Path]) -> None:
    dense, *spectral = rows(run, "encode")
    assert [row["what"] for row in spectral] == ["balanced", "seed"]
    for row in spectral:
        assert row["percent"] == pytest.approx(100 * row["milliseconds"] / dense["milliseconds"])


def test_generate_compares_with_the_best_dense_cache(run: tuple[Result, dict[str, Any], Path]) -> None:
    dense, spectral = rows(run, "generate")
    assert (dense["variant"], spectral["variant"]) == ("eager", "spectral")
    assert dense["cache_bytes"] == 2 * 2 * 2 * 16 * 4 * (1300 + 5 - 1)
    assert spectral["sites"] == {"prefill": [2, 2], "decode": [2, 2]}
    against = spectral["against_best_dense"]
    assert against["cache_bytes"] == pytest.approx(dense["cache_bytes"] / spectral["cache_bytes"])
    assert against["cache_bytes"] > 2
    assert against["step_median_ms"] == pytest.approx(dense["step_median_ms"] / spectral["step_median_ms"])
    assert against["peak_bytes"] is None
    for row in (dense, spectral):
        assert row["recordings"] == [0, 0] and row["step_slowest_ms"] >= row["step_median_ms"] > 0
        assert row["first_call_s"] > sum(row["compile_s"]) >= 0 and row["first_token_s"] > 0


def test_prompts_may_be_read_in_chunks(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    given = ("--parts", "generate", "--cached", 1300, "--chunk", 400, "--variants", "eager,spectral", "--new-tokens", 3)
    made = invoke(*TINY, *given, "--json", out)
    assert made.exit_code == 0, made.output
    _, spectral = json.loads(out.read_text())["parts"]["generate"]
    assert spectral["error"] is None
    assert spectral["sites"] == {"prefill": [2, 2], "extend": [2, 2], "decode": [2, 2]}


def test_steady_keeps_tokens_and_steps(run: tuple[Result, dict[str, Any], Path]) -> None:
    compressed, dense, other = rows(run, "steady")
    assert [row["variant"] for row in (compressed, dense, other)] == list(generation.STEADY)
    for row in (compressed, dense, other):
        assert row["error"] is None and len(row["tokens"]) == 12 and len(row["steps_ms"]) == 11
        assert row["slowest_over_median"] >= 1 and 0 <= row["slow_steps"] <= 3
    assert compressed["equal_leading"] == other["equal_leading"] == 12
    assert "equal_leading" not in dense


def test_the_host_part_times_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    titles = list(host.VARIANTS) if FULL else ["inductor, growing cache", "spectral, no CUDA graphs"]
    monkeypatch.setattr(host, "VARIANTS", {title: host.VARIANTS[title] for title in titles})
    made = invoke(*TINY, "--parts", "host", "--cached", 40, "--json", tmp_path / "out.json")
    assert made.exit_code == 0, made.output
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out.json").read_text())["parts"]["host"]}
    assert all(row["error"] is None for row in rows.values())
    dense, ours = (rows[title] for title in ("inductor, growing cache", "spectral, no CUDA graphs"))
    parts = [ours[name] for name in ("guards_ms", "unwrapping_ms", "wrapping_ms")]
    assert min(parts) > 0 and ours["unwrapping_ms"] + ours["wrapping_ms"] < ours["ours_ms"]
    assert "ours_ms" not in dense and not hasattr(BoundGraph.__call__, "__wrapped__"), "it is still watched"


def test_the_waits_part_times_first_tokens_and_both_loops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(waits, "CALLS", (1, 1))
    asked = ("--new-tokens", 3, "--variants", "eager,spectral", "--cached", "1300,1400", "--json", tmp_path / "out.json")
    made = invoke(*TINY, "--parts", "waits", *asked)
    assert made.exit_code == 0, made.output
    rows = json.loads((tmp_path / "out.json").read_text())["parts"]["waits"]
    assert [row["error"] for row in rows] == [None] * 4 and [row["cached"] for row in rows] == [1300, 1400] * 2
    dense, spectral = rows[0], rows[2]
    assert "ahead_ms" not in dense
    assert min(spectral["first_ms"], spectral["step_ms"], spectral["ahead_ms"]) > 0
    assert spectral["second_ms"] > spectral["first_ms"]
    assert spectral["first_over_dense"] == pytest.approx(spectral["first_ms"] / dense["first_ms"])
    assert spectral["step_busy_ms"] is None and spectral["step_over_busy"] is None
    assert spectral["sites"]["prefill"] == spectral["sites"]["decode"] == [2, 2]


def test_a_measurement_that_fails_is_a_cell_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate\n  [too] much")

    monkeypatch.setattr(attention, "over_decoded", out_of_memory)
    out = tmp_path / "out.json"
    result = invoke(*TINY, "--parts", "attention", "--pairs", "1x64", "--json", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("error: OutOfMemoryError") == 2
    dense, _, _, *spectral = json.loads(out.read_text())["parts"]["attention"][1:]
    assert dense["error"] is None and dense["microseconds"] > 0
    assert [row["error"] for row in spectral] == ["OutOfMemoryError: tried to allocate [too] much"] * 2
    assert all("microseconds" not in row for row in spectral)


def test_a_ratio_without_its_dense_side_is_left_out() -> None:
    failed = {"geometry": "tiny", "cached": 8, "variant": "eager", "error": "no"}
    spectral = {"geometry": "tiny", "cached": 8, "variant": "spectral", "error": None}
    generation.derive([failed, spectral])
    assert "against_best_dense" not in spectral


def test_an_error_of_the_backend_is_told_as_its_own() -> None:
    def backend(*_: object) -> None:
        raise ValueError("no such\noption")

    with pytest.raises(Exception) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    tidy()
    assert one_line(caught.value) == "ValueError: no such option"


def test_an_error_of_torch_is_shown_without_its_stack_so_that_what_follows_is() -> None:
    error = RuntimeError(
        "Cannot call numel() on tensor with symbolic sizes/strides\nException raised from throw_it at x.cpp:289 (most recent"
        " call first):\nframe #0: c10::Error::Error + 0x9d\nframe #1: at::matmul\n\nWhile executing %linear"
    )
    assert one_line(error) == (
        "RuntimeError: Cannot call numel() on tensor with symbolic sizes/strides While executing %linear"
    )


def test_on_a_cpu_the_defaults_are_small_and_said_to_be() -> None:
    made = invoke("--parts", "attention", "--device", "cpu", "--presets", "balanced", "--pairs", "1x64")
    assert made.exit_code == 0, made.output
    (sentence,) = (line for line in made.stderr.splitlines() if line.startswith("On a CPU the defaults are small: "))
    assert "--geometry tiny, --cached 2048" in sentence and "--pairs" not in sentence
    assert "attention: tiny, 1, 64, balanced" in made.stderr
    given = [x for name, value in bench.ON_A_CPU._asdict().items() for x in (f"--{name.replace('_', '-')}", value)]
    assert "On a CPU" not in invoke(*given, "--device", "cpu", "--parts", "attention", "--minutes", "1e-9").stderr


def test_no_measurement_begins_when_the_time_is_up() -> None:
    result = invoke(*TINY, "--parts", "attention", "--pairs", "1x64", "--minutes", "1e-9")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("not begun: the time was up") == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--parts", "attentoin"), "unknown part 'attentoin': choose from attention"),
        (("--parts", ","), "name at least one part"),
        (("--geometry", "llama"), "unknown geometry 'llama': choose from llama-3-8b"),
        (("--presets", "balance"), "unknown preset 'balance'; did you mean 'balanced'?"),
        (("--presets", '{"preset": "balanced", "recnt": 9}'), "unknown option 'recnt'; did you mean 'recent'?"),
        (("--presets", ","), "name at least one preset"),
        (("--variants", "fast"), "unknown variant 'fast': choose from eager, inductor, static, spectral"),
        (("--inner", "inductr"), "unknown inner compiler 'inductr'; did you mean 'inductor'?"),
        (("--pairs", "4096"), "'4096' is no batch and count of tokens, such as 8x16384"),
        (("--cached", "4k"), "'4k' is no count of tokens, such as 4096"),
    ],
)
def test_bad_options_leave_before_anything_is_measured(
    options: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PARTS", dict.fromkeys(bench.PARTS))
    result = invoke(*options)
    assert result.exit_code == 2 and sentence in result.stderr


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(console, "find_spec", lambda _: None)
    result = invoke(*TINY, "--plot", tmp_path / "out.png")
    assert result.exit_code == 2
    assert "--plot needs matplotlib: pip install 'spectral-compile[bench]'" in result.stderr


@pytest.mark.parametrize("name", ["tiny", "smollm2", "qwen3-0.6b", "llama-3-8b"])
def test_a_geometry_is_that_of_its_model(name: str) -> None:
    geometry, config = GEOMETRIES[name], GEOMETRIES[name].config()
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    known = {"tiny": (4, 2, 16), "smollm2": (9, 3, 64), "qwen3-0.6b": (16, 8, 128), "llama-3-8b": (32, 8, 128)}
    assert heads == (geometry.query_heads, geometry.kv_heads, geometry.head_dim) == known[name]
    assert config.eos_token_id is None


def test_a_random_model_repeats_and_rotates_by_its_frequencies() -> None:
    one, two = (build(GEOMETRIES["tiny"], SETTINGS) for _ in range(2))
    weights = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) and not a.is_meta for a, b in weights)
    frequencies = torch.tensor(GEOMETRIES["tiny"].rotary.frequencies)
    torch.testing.assert_close(one.model.rotary_emb.inv_freq, frequencies)
    assert one.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_weights_are_one_tensor() -> None:
    geometry = GEOMETRIES["tiny"]
    tied = type(geometry)(**{**vars(geometry), "tied": True})
    model = build(tied, SETTINGS)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "preset", [*(name for name in PRESETS if name != "exact"), "balanced-joint", '{"preset": "balanced", "recent": 9}']
)
def test_a_repeated_step_gives_the_same(preset: str) -> None:
    geometry = GEOMETRIES["tiny"]
    tokens = draw(geometry, SETTINGS, 2, 1301)
    layer = Layer(geometry, SETTINGS, preset, 2, 1300)
    layer.prefill(tokens.columns(0, 1300))
    step = tokens.columns(1300, 1301)
    layer.begin_step(step["key"])
    assert torch.equal(layer.attend(step), layer.attend(step))
    assert layer.timeline.ledger[:, 1].min() > 0


def test_the_second_part_times_whole_processes(tmp_path: Path) -> None:
    made = invoke(*TINY, "--parts", "second", "--variants", "spectral", "--json", tmp_path / "out.json")
    assert made.exit_code == 0, made.output
    (row,) = json.loads((tmp_path / "out.json").read_text())["parts"]["second"]
    assert row["error"] is None, row["error"]
    for process in ("first", "second"):
        model, first, last = (row[f"{process}_{what}_s"] for what in ("model", "first_token", "last_token"))
        assert 0 < model < first < last
    assert row["over_dense"] is None


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    """A name that is no preset once measured the default one."""
    settings = replace(SETTINGS, presets=("no preset",), cached=(64,))
    with pytest.raises(RuntimeError, match="no preset"):
        second.processes("tiny", settings, "spectral")
