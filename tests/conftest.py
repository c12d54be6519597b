"""Fixtures that several files share."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and other children inherit it
    # a process that is killed leaves half a library behind, which is to harm neither the next run nor anybody else
    COMPILED = tempfile.mkdtemp(prefix="spectral-tests-")
    os.environ |= {f"{name}_CACHE_DIR": os.path.join(COMPILED, name.lower()) for name in ("TORCHINDUCTOR", "TRITON")}
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, so before anything imports them

from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spectral_compile.models import load
from tests.budget import PROFILE

settings.register_profile("full", deadline=None, derandomize=True)  # machines differ in speed, runs should not
settings.register_profile("repeatable", settings.get_profile("full"), max_examples=25)
settings.load_profile(PROFILE)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What has been imported by now, millions of objects, is no garbage: a search for some took a second or more."""
    if getattr(session.config.option, "loadgroup", False):
        marked = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group")]
        if any("@" not in name for name in marked):
            raise pytest.UsageError(
                "this pytest-xdist does not keep groups of tests together with this pytest: see pyproject.toml"
            )
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries tell of leaks when the process ends


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in bfloat16, and its tokenizer."""
    return load()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {"<unk>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 128)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
