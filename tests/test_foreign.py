"""A compressed cache in a graph of another compiler: its values, counted, or an error; never a number that is not its."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, StaticCache

import spectral_compile as sc
from spectral_compile import report
from spectral_compile.foreign import decoded
from spectral_compile.tensor import SpectralTensor
from tests.tiny import EXACT, build, tokens

COMPILERS = ("eager", "aot_eager", "inductor")
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda k: k + 1,
    "sum": lambda k: k.sum(),
    "transpose": lambda k: k.transpose(1, 2),
    "crop": lambda k: k[:, :, :5],
    "rows": lambda k: k[1:],
    "select": lambda k: k.index_select(0, torch.tensor([1, 0])),
    "clone": lambda k: k.clone(),
    "detach": lambda k: k.detach(),
    "alias": lambda k: k.view_as(k),
    "flat": lambda k: k.reshape(-1),
    "cat": lambda k: torch.cat([k, k[:, :, :1]], 2),
    "shape": lambda k: torch.ones(k.shape) * k.shape[2],
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def compressed(strict: bool = False, rows: int = 2) -> torch.Tensor:
    """Keys of the first layer after a prompt of 40 tokens."""
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "strict": strict})
    with torch.no_grad():
        return model(tokens(rows, 40), use_cache=True).past_key_values.layers[0].keys


@pytest.mark.parametrize("compiler", COMPILERS)
def test_another_compiler_is_given_the_values(compiler: str) -> None:
    keys = compressed()
    dense = keys.dense()
    for name, function in FUNCTIONS.items():
        torch._dynamo.reset()
        with torch.no_grad():
            got = torch.compile(function, backend=compiler)(keys)
        got = got.dense() if isinstance(got, SpectralTensor) else got
        torch.testing.assert_close(got, function(dense.clone()), atol=1e-4, rtol=1e-5, msg=name)  # a sum's order is free


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_step_that_another_compiler_made_is_right_and_counted(compiler: str) -> None:
    """AOTAutograd sees the handle alone: uninitialised memory used to stand in for the cache."""
    model, prompt, token = build("llama"), tokens(1, 40), tokens(1, 1, seed=1)
    with torch.no_grad():
        expected = model(torch.cat((prompt, token), 1)).logits[:, -1]
        model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
        cache = model(prompt, use_cache=True).past_key_values
        step = torch.compile(lambda t, c: model(t, past_key_values=c, use_cache=True).logits[:, -1], backend=compiler)
        with pytest.warns(report.SpectralWarning, match="decodes the compressed cache"):
            torch.testing.assert_close(step(token, cache), expected, atol=1e-5, rtol=1e-5)
    assert report.decodes() >= 4, "keys and values of two layers"


def test_a_model_that_is_compiled_anew_with_another_compiler_goes_on_from_a_compressed_cache() -> None:
    model, prompt, token = build("llama"), tokens(1, 40), tokens(1, 1, seed=1)
    with torch.no_grad():
        expected = model(torch.cat((prompt, token), 1)).logits[:, -1]
        model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
        cache = model(prompt, use_cache=True).past_key_values
        model.compile(backend="aot_eager")
        for _ in range(2):
            given = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
            got = model(token, past_key_values=given, use_cache=True).logits[:, -1]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_another_compiler_is_an_error_where_strict(compiler: str) -> None:
    keys = compressed(strict=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="strict: a graph of another compiler"):
        torch.compile(FUNCTIONS["add"], backend=compiler)(keys)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compressed_static_cache_is_written_to_in_full_or_not_at_all(compiler: str) -> None:
    model, prompt, token = build("llama"), tokens(1, 40), tokens(1, 1, seed=1)
    with torch.no_grad():
        expected = model(torch.cat((prompt, token), 1)).logits[:, -1]
        model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
        cache = model(prompt, past_key_values=StaticCache(model.config, max_cache_len=60), use_cache=True).past_key_values
        assert isinstance(cache.layers[0].keys, SpectralTensor)
        step = torch.compile(lambda t, c: model(t, past_key_values=c, use_cache=True).logits[:, -1], backend=compiler)
        if compiler == "eager":
            torch.testing.assert_close(step(token, cache), expected, atol=1e-5, rtol=1e-5)
        else:
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="would write to a compressed static cache"):
                step(token, cache)


def test_a_handle_that_was_copied_is_an_error_and_no_values() -> None:
    keys = compressed()
    with pytest.raises(RuntimeError, match="holds a compressed cache that it copied or made itself"):
        decoded(keys.handle.clone(), "key", list(keys.shape), keys.dtype, False)
    lost = SpectralTensor(keys.handle.clone(), keys.shape, keys.kind)
    with pytest.raises(RuntimeError, match="copied or made itself"):
        lost.sum()


def test_cuda_graphs_leave_what_another_compiler_decodes_alone() -> None:
    """A recording would hold the values of its own step."""
    assert torch.Tag.cudagraph_unsafe in decoded.tags
