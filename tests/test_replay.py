"""When a decode step is recorded, and that replaying it gives what running it gives; the CUDA graph itself is for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import spectral_compile as sc
from spectral_compile import backend, replay, report
from spectral_compile.cache.store import SpectralStore
from spectral_compile.cache.timeline import Timeline
from spectral_compile.codec import PRESETS
from spectral_compile.kernels.buffers import Buffers
from spectral_compile.replay import Replay
from tests.budget import examples
from tests.tiny import GREEDY, WINDOWS, build, tokens

OPTIONS = {"preset": "balanced", "inner": "eager", "strict": True, "warmup": 16, **WINDOWS}
CPU = torch.device("cpu")


class Recorder:
    """Stands for CUDA: a replay runs the same call on the same tensors again, and writes its results where the last lay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replayed = 0
        monkeypatch.setattr(replay, "capture", self.capture)
        monkeypatch.setattr(replay, "watch", lambda call: (call(), False))
        monkeypatch.setattr(backend, "records", lambda plan, config: plan.kind == "decode" and config.cudagraphs)

    def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Sequence[Any]]:
        results: list[Any] = []

        def again() -> None:
            self.replayed += 1
            made = call()
            if not results:
                results.extend(made)
            for old, new in zip(results, made, strict=True):
                old.copy_(new)

        return again, results


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    sc.reset()
    return Recorder(monkeypatch)


@pytest.mark.slow
@settings(max_examples=examples(2, full=5), deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(20, 60), st.integers(1, 25), st.integers(0, 9)), min_size=1, max_size=3)
)
def test_recorded_steps_give_the_same_tokens(turns: list[tuple[int, int, int, int]]) -> None:
    """Batches, lengths and padding of conversations that follow one another on one model, whose buffers grow often."""
    made = []
    for cudagraphs in (False, True):
        sc.reset()
        with pytest.MonkeyPatch.context() as monkeypatch:
            recorder, model = Recorder(monkeypatch), build("llama")
            model.compile(backend=sc.spectral, options={**OPTIONS, "headroom": 8, "cudagraphs": cudagraphs})
            out = []
            for batch, length, new, padding in turns:
                prompt = tokens(batch, length)
                mask = torch.ones_like(prompt)
                mask[0, :padding] = 0
                out.append(model.generate(prompt, attention_mask=mask, max_new_tokens=new, **GREEDY))
        made.append(out)
    for without, recorded in zip(*made, strict=True):
        assert torch.equal(without, recorded)
    assert (recorder.replayed > 0) == (report.recordings() > 0)


def test_a_conversation_is_recorded_once_until_its_buffers_grow(recorder: Recorder) -> None:
    model = build("llama")
    model.compile(backend=sc.spectral, options={**OPTIONS, "headroom": 64})
    model.generate(tokens(1, 100), max_new_tokens=50, **GREEDY)
    assert report.recordings() == 1 and recorder.replayed == 48  # of 49 steps, the first of which shows where all lies
    model.generate(tokens(1, 100), max_new_tokens=150, **GREEDY)
    assert 3 <= report.recordings() <= 4


@pytest.mark.parametrize("padding", [0, 7])
def test_a_masked_conversation_is_recorded_once(recorder: Recorder, padding: int) -> None:
    """What ``generate`` cuts from a mask, or from what it has written, has other strides at every step."""
    model, prompt = build("llama"), tokens(2 if padding else 1, 60)
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    model.compile(backend=sc.spectral, options={**OPTIONS, "headroom": 64})
    model.generate(prompt, attention_mask=mask, max_new_tokens=30, **GREEDY)
    assert report.recordings() == 1 and recorder.replayed == 28


def test_conversations_that_take_turns_are_recorded_when_one_goes_on(recorder: Recorder) -> None:
    model, prompts = build("llama"), [tokens(1, 60), tokens(1, 90)]
    order = [0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1]
    made = []
    for cudagraphs in (False, True):
        sc.reset()
        model.compile(backend=sc.spectral, options={**OPTIONS, "cudagraphs": cudagraphs})
        caches = [DynamicCache(config=model.config) for _ in prompts]
        logits, recorded = [], []
        with torch.no_grad():
            for prompt, cache in zip(prompts, caches, strict=True):
                model(prompt, past_key_values=cache)
            for i in order:
                past = caches[i].get_seq_length()
                logits.append(model(tokens(1, 1), past_key_values=caches[i], position_ids=torch.tensor([[past]])).logits)
                recorded.append(report.recordings())
        made.append(torch.cat(logits))
    torch.testing.assert_close(*made, rtol=0, atol=0)
    assert recorded == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert recorder.replayed == 6


def test_a_step_that_waits_for_the_gpu_is_not_recorded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "watch", lambda call: (call(), True))
    model = build("llama")
    model.compile(backend=sc.spectral, options=OPTIONS)
    model.generate(tokens(1, 60), max_new_tokens=9, **GREEDY)
    assert report.recordings() == 0


def step(weight: torch.Tensor) -> Replay:
    return Replay(lambda x, w, n: (x * w + n,), [0, 2], [1], CPU)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_move_are_copied(recorder: Recorder, mode: Any) -> None:
    """In whatever way they lie: contiguous, in columns, repeated."""
    weight = torch.randn(3)
    run = step(weight)
    for turn in (torch.no_grad, mode):
        for x in (torch.randn(2, 3), torch.randn(3, 2).T, torch.randn(3).expand(2, 3), torch.randn(2, 1).expand(2, 3)):
            for _ in range(4):
                with turn():
                    now = x + 0 if x.is_contiguous() else x
                    (result,) = run([now, weight, 2], "size")
                    torch.testing.assert_close(result, now * weight + 2)
    assert report.recordings() == 4


def test_what_a_recording_depends_on_makes_a_new_one(recorder: Recorder) -> None:
    weights, x = [torch.randn(3), torch.randn(3)], torch.randn(2, 3)
    run, results = step(weights[0]), []
    for weight, n, size in ((0, 2, "a"), (1, 2, "a"), (0, 3, "a"), (0, 2, "b"), (0, 2, "a")):
        for _ in range(3):
            results.append(run([x, weights[weight], n], size)[0])
            torch.testing.assert_close(results[-1], x * weights[weight] + n)
    assert report.recordings() == 4
    assert recorder.replayed == 4 * 2 + 3
    first = results[1].clone()
    run([torch.zeros(2, 3), weights[0], 2], "a")
    assert torch.equal(results[1], first)  # what was returned is not written to


def test_few_recordings_are_kept(recorder: Recorder) -> None:
    weight = torch.randn(3)
    run = step(weight)
    for size in (*range(replay._KEPT + 1), 1, 0):
        for _ in range(2):
            run([torch.randn(2, 3), weight, 0], size)
    assert report.recordings() == replay._KEPT + 2


def test_strides_that_lead_nowhere_make_no_new_recording(recorder: Recorder) -> None:
    weight = torch.randn(3)
    run = step(weight)
    for length in range(4, 9):
        x = torch.randn(1, 3, length)[:, :, -1][:, ::2]  # strides of 3 * length and 2 * length
        (result,) = run([x[:, :1], weight, 0], "size")
        torch.testing.assert_close(result, x[:, :1] * weight)
    assert report.recordings() == 1 and recorder.replayed == 4


def test_a_placement_is_that_of_memory_and_not_of_tensors() -> None:
    """A new cache whose buffers lie where those of an old one lay is served by its recording; anything else is not."""
    layout = PRESETS["balanced"].layout(2, 64, None)
    timeline = Timeline(layout, 1, 40, 40, CPU, 8)
    one, other = (SpectralStore(layout, timeline, torch.float32) for _ in range(2))
    assert one.placement == one.placement != other.placement
    again = SpectralStore(layout, timeline, torch.float32, Buffers(*(x.view(x.shape) for x in one.buffers)))
    assert again.placement == one.placement
    again.buffers = again.buffers._replace(k_exact=again.buffers.k_exact[:, :, :-1])
    assert again.placement != one.placement, "of another shape"
    again.buffers = one.buffers._replace(moment=one.buffers.moment.as_strided((1, 2, 64), (128, 1, 2)))
    assert again.placement != one.placement, "in another order"
    again.buffers = one.buffers._replace(v_sizes=one.buffers.v_sizes.clone(), moment=one.buffers.moment.clone())
    assert again.placement != one.placement, "some of it lies elsewhere"
