"""A compressed tensor beside what else may be done to a tensor: nothing is lost without a word, and nothing crashes."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

import spectral_compile as sc
from spectral_compile.tensor import SpectralTensor
from tests.tiny import EXACT, build, tokens


@pytest.fixture(autouse=True)
def fresh() -> None:
    sc.reset()


def held(rows: int = 2) -> SpectralTensor:
    """Keys that a tiny model has cached, from a prompt of 40 tokens."""
    model = build("llama")
    model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
    with torch.no_grad():
        return model(tokens(rows, 40), use_cache=True).past_key_values.layers[0].keys


def in_place(keys: torch.Tensor) -> None:
    keys *= 2


WRITES = {
    "a row": lambda keys: keys.__setitem__(0, 0.0),
    "columns": lambda keys: keys.__setitem__((slice(None), slice(None), slice(5, 9)), 0.0),
    "first columns": lambda keys: keys.__setitem__((slice(None), slice(None), slice(0, 5)), 0.0),
    "a view of a row": lambda keys: keys[1].zero_(),
    "a view of columns": lambda keys: keys[:, :, :5].zero_(),
    "a view of channels": lambda keys: keys[..., 0].add_(1),
    "a view of a view": lambda keys: keys[1][0].zero_(),
    "a transposed view": lambda keys: keys.transpose(1, 2).mul_(2),
    "a view, indexed": lambda keys: keys[1].__setitem__(0, 0.0),
    "a view, as the output": lambda keys: torch.zeros(2, 40, 16, out=keys[1]),
    "all": lambda keys: keys.zero_(),
    "an operator": in_place,
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.filterwarnings("ignore::spectral_compile.SpectralWarning")
def test_what_is_written_to_a_compressed_tensor_or_a_view_of_it_is_an_error(what: str) -> None:
    """It used to reach a decoded copy, and was lost without a word."""
    keys = held()
    before = keys.dense()
    with pytest.raises(RuntimeError, match="would write to a compressed cache"):
        WRITES[what](keys)
    assert torch.equal(keys.dense(), before)


@pytest.mark.filterwarnings("ignore::spectral_compile.SpectralWarning")
def test_what_is_computed_from_a_view_is_a_plain_tensor() -> None:
    keys = held()
    copied = keys[1].clone()
    copied[0] = 0
    assert type(copied) is type(keys[1] + 1) is torch.Tensor
    assert torch.equal(keys[1][0] * 2, keys.dense()[1][0] * 2)


@pytest.mark.parametrize(
    "how",
    [
        lambda keys: keys.share_memory_(),
        lambda keys: keys.is_shared(),
        lambda keys: keys.storage(),
        lambda keys: keys.data_ptr(),
        lambda keys: keys.numpy(),
        lambda keys: keys.tolist(),
        lambda keys: memoryview(np.asarray(keys)),
        lambda keys: torch.save(keys, io.BytesIO()),
        lambda keys: pickle.dumps(keys),
        lambda keys: safetensors.torch.save({"keys": keys}),
    ],
)
def test_other_libraries_and_processes_are_told_to_ask_for_the_dense_tensor(how) -> None:
    """``share_memory_`` used to kill the process."""
    with pytest.raises(TypeError, match=r"call \.dense\(\) for the tensor that it stands for"):
        how(held())


@pytest.mark.filterwarnings("ignore::spectral_compile.SpectralWarning")
def test_the_methods_of_a_tensor_are_there() -> None:
    keys = held()
    assert torch.equal(keys.view(-1), keys.dense().view(-1))
    assert torch.equal(copy.copy(keys).dense(), keys.dense())
    assert copy.copy(keys).store is keys.store
