"""Proof that nothing but the compressed form survives a prefill, by counting what is alive."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
import transformers as hf
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import spectral_compile as sc
from spectral_compile import backend
from spectral_compile.kernels import sliced as operation
from spectral_compile.kernels.append import later
from spectral_compile.passes import slices
from tests.budget import examples
from tests.tiny import GROUPED, WINDOWS, build, smollm2_sized, tokens

LONG = examples(2560, full=4096)


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


class Watching(torch.fx.Interpreter):
    """Runs a graph and counts, after each node, how many tensors with the shape of a layer's keys are alive."""

    def __init__(self, gm: torch.fx.GraphModule, shape: tuple[int, ...]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.shape, self.most = shape, 0
        self.seen: list[weakref.ref[torch.Tensor]] = []

    def run_node(self, n: torch.fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.seen.append(weakref.ref(result))
        storages = {x.untyped_storage().data_ptr() for ref in self.seen if (x := ref()) is not None}
        self.most = max(self.most, len(storages))
        return result


def test_dense_keys_and_values_are_gone_after_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    watchers = []

    def watch(gm: torch.fx.GraphModule, *_: object, **__: object):
        watchers.append(Watching(gm, (1, 2, 300, 16)))
        return watchers[-1].run

    monkeypatch.setattr(backend, "compile_inner", watch)
    model = build("llama")
    model.compile(backend=sc.spectral, options={"preset": "balanced", "strict": True, **WINDOWS})
    with torch.no_grad():
        out = model(tokens(1, 300), use_cache=True)
    watcher = watchers[0]
    assert len(watcher.seen) >= 4
    assert all(ref() is None for ref in watcher.seen)
    # keys before and after RoPE, what RoPE is made of, and values; nothing of the layer before
    assert watcher.most <= 5
    dense = sc.memory_stats(out.past_key_values).parts["dense"]
    assert dense == 0


def peak(run) -> tuple[int, object]:
    """The most bytes that were allocated at once while ``run()`` ran, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most, result


def test_a_prompt_holds_no_more_hidden_states_than_a_layer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries before and after RoPE, what turns them and hidden states, of one size, are alive with keys and values of half."""
    monkeypatch.setattr(later, "TOKENS", LONG - 1)  # as of long prompts, which are stored layer by layer
    for module in (operation, slices):
        monkeypatch.setattr(module, "ROWS", 128)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **sizes, "max_position_embeddings": LONG})).eval()
    prompt = tokens(1, LONG)
    # what is dead is not kept for what is of the same size, so that what is needed is measured
    options = {"preset": "balanced", "strict": True, "allow_buffer_reuse": False}
    model.compile(backend=sc.spectral, options=options)

    def run() -> object:
        return model(prompt, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        with torch._inductor.config.patch(force_disable_caches=True):  # code is to be generated, not found
            _, codes = run_and_get_code(run)
        most, out = peak(run)
    (code,) = (code for code in codes if "append_" in code)
    calls = re.findall(r"extern_kernels\.(mm)\(|^ +(cpp_fused)_|^ +torch\.ops\.spectral\.(append_)", code, re.MULTILINE)
    order = " ".join(map("".join, calls))
    assert order.count("mm mm mm cpp_fused append_") == 4, order  # what they are products of dies before RoPE
    assert (most - sc.memory_stats(out.past_key_values).stored_bytes) / (LONG * 512 * 4) < 4.1


@pytest.mark.slow
def test_peak_of_a_long_prefill_is_one_layer_above_the_compressed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's geometry with four layers.

    The dense cache is whole when the dense peak is reached, in the last layer; what is left of it is what activations need. Of
    a short prompt copies of keys, turned and not, and of values come on top.
    """
    model = smollm2_sized(layers=4, positions=8192)
    prompt = torch.randint(0, 512, (1, LONG))
    one_layer = 2 * 3 * LONG * 64 * 4

    def measured(**compile: object) -> tuple[int, object]:
        torch._dynamo.reset()
        compiled = torch.compile(model, **compile)

        def run() -> object:
            return compiled(prompt, use_cache=True, logits_to_keep=1)

        with torch.no_grad():
            run()
            return peak(run)

    dense, out = measured(backend="inductor")
    activations = dense - sc.memory_stats(out.past_key_values).stored_bytes
    spectral, out = measured(backend=sc.spectral, options={"preset": "balanced", "strict": True})
    assert [(r.kind, r.sites, r.matched) for r in sc.reports()] == [("prefill", 4, 4)]
    stored = sc.memory_stats(out.past_key_values).stored_bytes
    print(f"dense {dense}, spectral {spectral}, compressed cache {stored}, one dense layer {one_layer}")
    assert spectral < activations + stored + one_layer + 4 * 1.5 * one_layer
    monkeypatch.setattr(later, "TOKENS", LONG - 1)
    spectral, out = measured(backend=sc.spectral, options={"preset": "balanced", "strict": True})
    assert spectral < activations + stored + one_layer
