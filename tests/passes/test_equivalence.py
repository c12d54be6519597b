"""A rewritten graph computes what the graph as it came computes: a small decoder of random geometry, compiled and not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import spectral_compile
from spectral_compile import SpectralConfig, SpectralTensor, backend, reports
from spectral_compile.report import SpectralWarning
from tests.budget import FULL, examples
from tests.tiny import joint_heads

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """What a decoder looks like, and how it writes down what others write down differently."""

    kv_heads: int = 2
    groups: int = 2
    head_dim: int = 8
    rope: str = "half"  # none, half, interleaved, partial
    repeat: str = "enable_gqa"  # or repeat_kv
    writes: str = "sdpa"  # or attention written out: eager, capped, sinks
    mask: str = "causal"  # causal: a bool mask only where several queries meet a past; bool: always; padding: from a 2-D mask
    variant: str = ""
    layers: int = 2

    @property
    def written_out(self) -> bool:
        return self.writes != "sdpa" or self.variant in ("eager_dropout", "taken_weights", "biased")


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, width = shape, shape.kv_heads * shape.groups * shape.head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(width, (1 if shape.variant == "v_heads" else shape.kv_heads) * shape.head_dim, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.sinks = nn.Parameter(torch.linspace(-1.0, 2.0, shape.kv_heads * shape.groups))

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shape, variant = self.shape, self.shape.variant
        q, k, v = (p(x).view(*x.shape[:2], -1, shape.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        if angles is not None:
            q, k = self.rotated(q, *angles), self.rotated(k, *angles)
        if past is None and variant != "no_cache":
            past = (torch.tensor([], dtype=k.dtype, device=k.device), torch.tensor([], dtype=v.dtype, device=v.device))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        causal = mask is None and q.shape[2] > 1 and variant != "bidirectional"
        keys, values, options = k, v, {"enable_gqa": True}
        if shape.repeat == "repeat_kv":
            keys, values, options = self.repeated(k), self.repeated(v), {}
        if variant == "einsum":
            out = torch.einsum("bhqd,bhkd->bhqk", q, keys).softmax(-1) @ values
        elif shape.written_out:
            out = self.written_out(q, self.repeated(k), self.repeated(v), mask)
        else:
            if variant == "dropout":
                options["dropout_p"] = 1e-9
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, **options)
        return self.o(out.transpose(1, 2).reshape(x.shape)), (k, v)

    def written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * self.shape.head_dim**-0.5
        if self.shape.writes == "capped":
            scores = torch.tanh(scores / 0.3) * 0.3
        scores = scores + torch.where(mask, 1e-3 if self.shape.variant == "biased" else 0.0, torch.finfo(scores.dtype).min)
        if self.shape.writes == "sinks":
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)
        weights = F.dropout(weights, 1e-9, training=self.shape.variant == "eager_dropout").to(q.dtype)
        out = torch.matmul(weights[..., :-1] if self.shape.writes == "sinks" else weights, v)
        return out + weights.mean() if self.shape.variant == "taken_weights" else out

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, dim = x.shape
        times = self.shape.kv_heads * self.shape.groups // heads
        return x[:, :, None].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope = self.shape.rope
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if rope == "interleaved":
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            other = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
        out = turned * cos + other * sin
        return torch.cat((out, rest), -1) if rope == "partial" else out


class Decoder(nn.Module):
    """Attention over a cache as transformers keeps it: a list of (keys, values), rotated, grown by concatenation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape = shape
        self.layers = nn.ModuleList(Attention(shape) for _ in range(shape.layers))
        width = shape.head_dim // 2 if shape.rope == "partial" else shape.head_dim
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(0, width, 2) / width))

    def forward(self, x: Tensor, cache: Layers | None = None, padding: Tensor | None = None) -> tuple[Tensor, Layers]:
        count = x.shape[1]
        past = 0 if cache is None else cache[0][0].shape[2]
        if padding is not None:
            ids = (padding.cumsum(-1) - 1).clamp(min=0)[:, past:]
        else:
            ids = torch.arange(past, past + count, device=x.device)[None]
        angles, mask = self.angles(ids), self.mask(past, count, padding)
        grown = []
        for i, layer in enumerate(self.layers):
            out, pair = layer(x, cache[i] if cache is not None else None, angles, mask)
            x = x + torch.tanh(out)
            grown.append(pair)
        return x, ([] if self.shape.variant == "cache_stays" else grown)

    def angles(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.shape.rope == "none":
            return None
        angle = ids[:, :, None].float() * self.frequencies
        angle = angle.repeat_interleave(2, -1) if self.shape.rope == "interleaved" else torch.cat((angle, angle), -1)
        return angle.cos()[:, None], angle.sin()[:, None]

    def mask(self, past: int, count: int, padding: Tensor | None) -> Tensor | None:
        if self.shape.variant == "bidirectional":
            return None
        skips = self.shape.variant != "float_mask" and not self.shape.written_out
        if self.shape.mask == "causal" and skips and (count == 1 or past == 0):
            return None
        mask = torch.arange(past + count)[None] <= torch.arange(past, past + count)[:, None]
        mask = mask[None, None]
        if self.shape.mask == "padding":
            mask = mask & padding[:, None, None, :].bool()
        if self.shape.variant == "float_mask":
            return torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        return mask


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    spectral_compile.reset()


def run_compiled(model: nn.Module, **options: Any) -> Any:
    spectral_compile.reset()
    options = {"preset": "exact", "strict": True, "inner": "eager", **options}
    return torch.compile(model, backend=backend.spectral, options=options)


def shapes(dims: tuple[int, ...]) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        kv_heads=st.integers(1, 4),
        groups=st.integers(1, 3),
        head_dim=st.sampled_from(dims),
        rope=st.sampled_from(["none", "half", "interleaved", "partial"]),
        repeat=st.sampled_from(["enable_gqa", "repeat_kv"]),
        writes=st.sampled_from(["sdpa", "sdpa", "eager", "capped", "sinks"]),
        mask=st.sampled_from(["causal", "bool", "padding"]),
        layers=st.integers(1, 2),
    )


@st.composite
def windows(draw: st.DrawFn, shape: Shape) -> dict[str, int]:
    return {
        "first_exact": draw(st.integers(0, 3)),
        "recent": draw(st.integers(0, 6)),
        "block": draw(st.integers(1, 6)),
        "warmup": draw(st.integers(1, 12)),
        **draw(joint_heads(shape.kv_heads)),
    }


@dataclass
class Case:
    shape: Shape
    options: dict[str, int]
    batch: int
    chunks: list[Tensor]
    padding: Tensor | None


@st.composite
def cases(draw: st.DrawFn, dims: tuple[int, ...] = (4, 8, 12, 32, 64)) -> Case:
    shape = draw(shapes(dims))
    batch = draw(st.integers(1, 3))
    counts = [draw(st.integers(1, 24)), *draw(st.lists(st.sampled_from([1, 1, 2, 5, 9]), min_size=1, max_size=5))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = shape.kv_heads * shape.groups * shape.head_dim
    padding = None
    if shape.mask == "padding":
        total = sum(counts)
        padding = torch.ones(batch, total, dtype=torch.int64)
        kind = draw(st.sampled_from(["none", "left", "holes"]))
        if kind == "left":
            padding = (torch.arange(total) >= torch.randint(0, counts[0], (batch, 1), generator=generator)).long()
        elif kind == "holes":
            padding = (torch.rand(batch, total, generator=generator) < 0.7).long()
            padding[:, [0, *(torch.tensor(counts).cumsum(0) - 1)]] = 1
    chunks = [torch.randn(batch, count, width, generator=generator) for count in counts]
    return Case(shape, draw(windows(shape)), batch, chunks, padding)


def steps(case: Case) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(chunk, mask of all columns so far, which of the chunk's columns are tokens)."""
    end = 0
    for chunk in case.chunks:
        start, end = end, end + chunk.shape[1]
        mask = None if case.padding is None else case.padding[:, :end]
        valid = torch.ones(chunk.shape[:2], dtype=torch.bool) if mask is None else mask[:, start:].bool()
        yield chunk, mask, valid


def kind_of(i: int, chunk: Tensor) -> str:
    return "prefill" if i == 0 else "decode" if chunk.shape[1] == 1 else "extend"


def assert_all_matched(case: Case) -> None:
    made = reports()
    layers = case.shape.layers
    assert [(r.sites, r.matched, r.refusals, r.notes) for r in made] == [(layers, layers, (), ())] * len(made)
    assert {r.kind for r in made} == {kind_of(i, chunk) for i, chunk in enumerate(case.chunks)}


@settings(PROPERTY, max_examples=examples(10, full=48))
@given(cases())
def test_exact_graph_equals_the_graph_as_it_came(case: Case) -> None:
    model = Decoder(case.shape)
    compiled = run_compiled(model, **case.options)
    stored = dense = None
    with torch.no_grad():
        for chunk, mask, valid in steps(case):
            expected, dense = model(chunk, dense, mask)
            out, stored = compiled(chunk, stored, mask)
            assert all(isinstance(x, SpectralTensor) for pair in stored for x in pair)
            torch.testing.assert_close(out[valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert_all_matched(case)


@settings(PROPERTY, max_examples=examples(10, full=48))
@given(cases(dims=(16, 32)), st.sampled_from(["quality", "balanced", "compact", "seed"]))
def test_lossy_graph_equals_decoding_and_then_attending(case: Case, preset: str) -> None:
    model = Decoder(case.shape)
    compiled = run_compiled(model, **{**case.options, "preset": preset})
    stored = None
    with torch.no_grad():
        for chunk, mask, valid in steps(case):
            dense = None if stored is None else [(k.dense(), v.dense()) for k, v in stored]
            expected, _ = model(chunk, dense, mask)
            out, stored = compiled(chunk, stored, mask)
            assert out[valid].isfinite().all()
            torch.testing.assert_close(out[valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert_all_matched(case)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"] if FULL else ["aot_eager"])  # models have the other
def test_every_inner_compiler_gives_the_same(inner: str) -> None:
    model, generator = Decoder(Shape()), torch.Generator().manual_seed(0)
    compiled = run_compiled(model, inner=inner, first_exact=1, recent=4, block=2, warmup=4)
    stored = dense = None
    with torch.no_grad():
        for count in (20, 1, 1, 5, 1):
            chunk = torch.randn(2, count, 32, generator=generator)
            expected, dense = model(chunk, dense)
            out, stored = compiled(chunk, stored)
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert [(r.kind, r.matched) for r in reports()] == [("prefill", 2), ("decode", 2), ("extend", 2)]


class Spy:
    """The backend, with every graph that Dynamo gives to it and every graph that it gives to the inner compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[GraphModule, str]] = []
        self.handed: list[GraphModule] = []
        inner = backend.compile_inner

        def compile_inner(gm: GraphModule, examples: list[Any], config: SpectralConfig, *rest: Any) -> Any:
            self.handed.append(gm)
            return inner(gm, examples, config, *rest)

        monkeypatch.setattr(backend, "compile_inner", compile_inner)

    def __call__(self, gm: GraphModule, examples: list[Any], **options: Any) -> Any:
        self.given.append((gm, gm.code))
        return backend.spectral(gm, examples, options={"inner": "eager", **options})

    def assert_untouched(self) -> None:
        assert self.given
        for (gm, code), handed in zip(self.given, self.handed, strict=True):
            assert handed is gm
            assert handed.code == code
        assert all(r.kind == "other" and r.matched == 0 for r in reports())


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spectral_compile.reset()
    return Spy(monkeypatch)


COUNTER_EXAMPLES = {
    "no_cache": "cache",
    "cache_stays": "the cache does not leave this graph",
    "dropout": "dropout",
    "v_heads": "keys and values differ in heads",
    "einsum": "attn_implementation='sdpa'",
    "eager_dropout": "attention dropout is on",
    "taken_weights": "its attention weights are used elsewhere too",
}


@pytest.mark.parametrize("variant", COUNTER_EXAMPLES)
def test_a_prefill_that_can_not_be_compressed_is_left_alone(variant: str, spy: Spy) -> None:
    model = Decoder(Shape(repeat="repeat_kv", variant=variant))
    x = torch.randn(1, 12, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        out, _ = torch.compile(model, backend=spy)(x)
        torch.testing.assert_close(out, model(x)[0])
    spy.assert_untouched()
    assert all(COUNTER_EXAMPLES[variant] in str(refusal) for r in reports() for refusal in r.refusals)
    assert all(r.refusals for r in reports())


def test_a_graph_with_gradients_is_left_alone(spy: Spy) -> None:
    model = Decoder(Shape())
    with pytest.warns(SpectralWarning, match="gradients"):
        out, _ = torch.compile(model, backend=spy)(torch.randn(1, 12, 32))
    out.sum().backward()
    assert model.layers[0].k.weight.grad is not None
    spy.assert_untouched()


def test_a_cache_of_dense_tensors_is_left_alone(spy: Spy) -> None:
    model, x = Decoder(Shape()), torch.randn(1, 12, 32)
    with torch.no_grad(), pytest.warns(SpectralWarning, match="holds dense tensors"):
        _, dense = model(x)
        out, grown = torch.compile(model, backend=spy)(x[:, :1], dense)
    assert not any(isinstance(x, SpectralTensor) for pair in grown for x in pair)
    torch.testing.assert_close(out, model(x[:, :1], dense)[0])
    spy.assert_untouched()


def test_what_a_model_writes_down_besides_its_cache_is_written_down() -> None:
    """FX takes a method that changes a tensor in place for one that does nothing where its result is not used."""

    class Counting(Decoder):
        def __init__(self, shape: Shape) -> None:
            super().__init__(shape)
            self.register_buffer("calls", torch.zeros(2))
            self.register_buffer("tokens", torch.zeros(()))

        def forward(self, x: Tensor, cache: Layers | None = None, padding: Tensor | None = None) -> tuple[Tensor, Layers]:
            self.calls[1:].add_(1)
            self.tokens += x.shape[1]
            seen = torch.zeros(1)
            seen.view(-1).add_(self.calls[1] - self.calls[1])
            out, grown = super().forward(x + seen, cache, padding)
            return out, grown

    model = Counting(Shape())
    compiled, stored = run_compiled(model), None
    with torch.no_grad():
        for count in (12, 1, 1):
            _, stored = compiled(torch.randn(1, count, 32), stored)
    assert model.calls.tolist() == [0, 3] and model.tokens == 14
    assert all(r.matched == r.sites == 2 for r in reports())


SECOND_STEPS = {"bidirectional": "not causally", "float_mask": "adds numbers", "biased": "adds numbers"}


@pytest.mark.parametrize("variant", SECOND_STEPS)
def test_a_chunk_that_can_not_attend_to_a_compressed_past_gets_it_decoded(variant: str, spy: Spy) -> None:
    model = Decoder(Shape(variant=variant))
    x, more = torch.randn(1, 12, 32), torch.randn(1, 3, 32)
    compiled = torch.compile(model, backend=lambda gm, ex: spy(gm, ex, preset="exact"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralWarning)
        _, stored = compiled(x)
        _, dense = model(x)
        out, _ = compiled(more, stored)
        torch.testing.assert_close(out, model(more, dense)[0], atol=1e-4, rtol=1e-4)
    first, second = reports()
    assert (first.kind, first.matched) == ("prefill", 2)
    assert (second.kind, second.sites, second.matched) == ("other", 2, 0)
    assert all(SECOND_STEPS[variant] in refusal.reason for refusal in second.refusals)
    assert spy.handed[1].code == spy.given[1][1]


@pytest.mark.parametrize("variant", SECOND_STEPS)
def test_a_past_that_would_be_decoded_is_an_error_where_strict(variant: str) -> None:
    compiled = run_compiled(Decoder(Shape(variant=variant)))
    with torch.no_grad():
        _, stored = compiled(torch.randn(1, 12, 32))
        with pytest.raises(Exception, match=f"strict.*{SECOND_STEPS[variant]}"):
            compiled(torch.randn(1, 3, 32), stored)


def assert_chunks_equal_dense(model: Decoder, counts: tuple[int, ...], padding: Tensor | None = None) -> Layers:
    """Feed chunks of two rows to the compressed model and the dense one; the compressed cache. ``padding`` [2, tokens]."""
    compiled, generator = run_compiled(model, first_exact=1, recent=4, block=2, warmup=4), torch.Generator().manual_seed(0)
    shown = torch.ones(2, sum(counts)) if padding is None else padding
    stored, dense, at = None, None, 0
    with torch.no_grad():
        for count in counts:
            chunk, at = torch.randn(2, count, 32, generator=generator), at + count
            so_far = None if padding is None else padding[:, :at]
            expected, dense = model(chunk, dense, so_far)
            out, stored = compiled(chunk, stored, so_far)
            keep = shown[:, at - count : at].bool()
            torch.testing.assert_close(out[keep], expected[keep], atol=1e-4, rtol=1e-4)
    assert all(r.matched == r.sites for r in reports())
    return stored


def test_a_chunk_whose_mask_hides_more_than_the_future_equals_dense() -> None:
    """A bool mask that is none of the known kinds is attended with as it is."""

    class Blind(Decoder):
        def mask(self, past: int, count: int, padding: Tensor | None) -> Tensor | None:
            q, k = torch.arange(past, past + count)[:, None], torch.arange(past + count)[None]
            return ((k <= q) & ((q - k) % 3 != 1))[None, None]

    assert_chunks_equal_dense(Blind(Shape()), (20, 5, 1, 1))


def test_a_prompt_that_sees_itself_wholly_is_followed_by_steps_without_a_mask() -> None:
    """A mask of no known kind hid nothing that is stored, so nothing keeps later steps from seeing all of it."""

    class Prefixed(Decoder):
        def mask(self, past: int, count: int, padding: Tensor | None) -> Tensor | None:
            return None if past else torch.ones(1, 1, count, count, dtype=torch.bool)

    assert_chunks_equal_dense(Prefixed(Shape()), (20, 1, 1, 1))


def test_a_mask_of_no_known_kind_still_tells_which_columns_are_padding() -> None:
    """Padding is then left out of the store, and a later causal mask with the same padding fits it."""

    class Blind(Decoder):
        def mask(self, past: int, count: int, padding: Tensor | None) -> Tensor | None:
            q, k = torch.arange(past, past + count)[:, None], torch.arange(past + count)[None]
            causal = (k <= q) if past else (k <= q) & ((q - k) % 3 != 1)
            return causal[None, None] & padding[:, None, None, :].bool()

    padding = (torch.arange(23) >= torch.tensor([[0], [5]])).long()
    stored = assert_chunks_equal_dense(Blind(Shape(mask="padding")), (20, 1, 1, 1), padding)
    assert stored[0][0].store.timeline.ledger[:, 2].tolist() == [23, 18]


@settings(PROPERTY, max_examples=examples(4, full=10))
@given(window=st.integers(1, 12), counts=st.lists(st.sampled_from([1, 4]), min_size=1, max_size=4))
def test_a_window_in_the_mask_equals_dense(window: int, counts: list[int]) -> None:
    class Windowed(Decoder):
        def mask(self, past: int, count: int, padding: Tensor | None) -> Tensor | None:
            q, k = torch.arange(past, past + count)[:, None], torch.arange(past + count)[None]
            return ((k <= q) & (k > q - window))[None, None]

    assert_chunks_equal_dense(Windowed(Shape()), (20, *counts))
