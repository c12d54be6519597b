"""The same code on a GPU: tokens, graphs and memory."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.bench.generation import recordings
from spectral_compile.report import SpectralWarning
from tests.profiles import profile
from tests.tiny import GREEDY, GROUPED, WINDOWS, build, smollm2_sized, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def assert_all_matched(sites: int) -> None:
    found = [(graph.kind, graph.sites, graph.matched) for graph in sc.reports()]
    assert found == [("prefill", sites, sites), ("decode", sites, sites)]
    assert report.decodes() == 0


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "glm4-partial-interleaved", "gemma2-softcapping", "gpt-oss-sinks"])
def test_greedy_tokens_equal_dense(name: str, inner: str) -> None:
    model, prompt = build(name).cuda(), tokens(2, 40).cuda()
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=60, **GREEDY)
    model.compile(backend=sc.spectral, options={"preset": "exact", "strict": True, "inner": inner, **WINDOWS})
    assert torch.equal(model.generate(prompt, attention_mask=mask, max_new_tokens=60, **GREEDY), expected)
    assert_all_matched(2)


def test_decode_is_recorded_and_replayed() -> None:
    """One recording for a conversation, whose buffers grow no more here, and the same tokens as without any."""
    prompt, made = tokens(1, 500).cuda(), []
    for cudagraphs in (False, True):
        sc.reset()
        model = build("llama").cuda()
        model.compile(backend=sc.spectral, options={"strict": True, "warmup": 128, "cudagraphs": cudagraphs})
        made.append(model.generate(prompt, max_new_tokens=400, **GREEDY))
        assert_all_matched(2)
        assert recordings(prompt.device) == int(cudagraphs)
    assert torch.equal(*made)


def test_recordings_follow_batches_padding_and_growth() -> None:
    """One model, conversations of one and two rows, whose buffers grow while they are recorded."""
    made: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for cudagraphs, texts in made.items():
        sc.reset()
        model = build("llama").cuda()
        options = {"preset": "balanced", "warmup": 16, "headroom": 16, "cudagraphs": cudagraphs, **WINDOWS}
        model.compile(backend=sc.spectral, options={"strict": True, **options})
        for batch, length in ((2, 90), (1, 120), (2, 60)):
            prompt = tokens(batch, length).cuda()
            mask = torch.ones_like(prompt)
            mask[0, : 20 * (batch - 1)] = 0
            texts.append(model.generate(prompt, attention_mask=mask, max_new_tokens=100, **GREEDY))
    # each conversation, and each time that its buffers doubled, but where they lie as others lay before
    assert 0 < recordings(prompt.device) < 30
    for without, recorded in zip(made[False], made[True], strict=True):
        assert torch.equal(without, recorded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [*({"preset": name} for name in ("seed", "quality", "balanced", "compact")), {"profile": profile((2, 32), (1.0, 0.0))}],
    ids=lambda options: options.get("preset", "profile"),
)
def test_presets_lose_what_they_lose_on_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bases come from another solver, so codes differ, but not how well they stand for the values."""
    prompt = tokens(1, 900)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, head_dim=32)).eval().to(dtype)  # wide enough to tell presets apart
    with torch.no_grad():
        dense = torch.stack([layer.values.float() for layer in model(prompt, use_cache=True).past_key_values.layers])
    lost = []
    for device in ("cpu", "cuda"):
        model.to(device)
        model.compile(backend=sc.spectral, options={"strict": True, "inner": "eager", "warmup": 256, **options})
        with torch.no_grad():
            cache = model(prompt.to(device), use_cache=True).past_key_values
        held = torch.stack([layer.values.dense().cpu().float() for layer in cache.layers])
        lost.append(((held - dense).norm() / dense.norm()).item())
        assert cache.layers[0].keys.device.type == device
    layouts = [layer.values.store.layout for layer in cache.layers]
    dropped = 1 - min(layout.value.rank / layout.v.width for layout in layouts)  # of values without any spectrum
    assert dropped**0.5 > lost[0] > 0.005
    assert lost[1] == pytest.approx(lost[0], rel=0.03)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_model_over_two_gpus_stays_dense_with_a_reason() -> None:
    model, prompt = build("llama"), tokens(2, 40).cuda()
    first = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0"], 0)
    model = accelerate.dispatch_model(model, first | dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], 1))
    expected = model.generate(prompt, max_new_tokens=8, **GREEDY)
    model.compile(backend=sc.spectral, options={"preset": "exact", **WINDOWS})
    with pytest.warns(SpectralWarning, match=r"accelerate's hooks \(device_map over several devices"):
        assert torch.equal(model.generate(prompt, max_new_tokens=8, **GREEDY), expected)
    assert not any(graph.matched for graph in sc.reports())
    assert report.decodes() == 0


def test_peak_memory_of_a_long_prefill_is_near_the_compressed_cache() -> None:
    model = smollm2_sized(layers=30, positions=32768).to("cuda", torch.bfloat16)
    prompt = torch.randint(0, 512, (1, 16384), device="cuda")
    peaks, stored = {}, 0
    for name, compile in (
        ("dense", {"backend": "inductor"}),
        ("spectral", {"backend": sc.spectral, "options": {"preset": "balanced", "strict": True}}),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, **compile)
        with torch.no_grad():
            for _ in range(2):
                out = None
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = compiled(prompt, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
            stored = sc.memory_stats(out.past_key_values).stored_bytes
    dense = 30 * 2 * 3 * 16384 * 64 * 2
    print(f"peak beyond weights: {peaks}, dense cache {dense}, compressed cache {stored}")
    wide = 16384 * 1536 * 2  # bytes of one tensor between two hidden states
    assert peaks["spectral"] - stored < peaks["dense"] - dense + dense / 30 - wide
