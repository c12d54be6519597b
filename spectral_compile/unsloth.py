"""Unsloth models: the standard transformers forward over the very same weights, which a compiler sees in prefill and decode.

Unsloth assigns forwards of its own to the classes of transformers, peft and bitsandbytes. Here a module is executed afresh from
its file, under a name of its own, and its classes are as their authors wrote them. Nothing of anybody's is assigned to.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from spectral_compile.report import SpectralWarning, stance_warning

_LACKS = "{} has no {}, which transformers' own has: load the checkpoint by transformers instead"


def standard_forward(model: nn.Module) -> PreTrainedModel:
    """A transformers model that shares every weight of ``model`` and computes what transformers' own code says.

    ``model`` is what Unsloth loaded, with an adapter of peft or without. Linear layers, those of 4 bits and of LoRA included,
    and embeddings are the same objects, and norms hold the same parameters, so training goes on and is seen at once. Caches,
    ``generate`` and ``model.compile(backend="spectral")`` then work as for any transformers model; it is meant for inference.
    ValueError for a model whose code is not part of transformers, or that differs from it in its modules.
    """
    base = _without_adapter(model)
    private = _fresh(_modeling(base))
    cls = getattr(private, type(base).__name__, None)
    if cls is None:
        raise ValueError(
            f"transformers has no {type(base).__name__}: load the checkpoint by transformers' AutoModelForCausalLM instead"
        )
    config = copy.deepcopy(base.config)
    if config._attn_implementation != "eager":
        config._attn_implementation = None  # transformers' own choice
    with torch.device("meta"):
        new = cls(config)
    new.eval()  # before it shares modules, whose mode is left alone
    _share(base, new)
    new.generation_config = base.generation_config
    if (sentence := stance_warning()) is not None:
        warnings.warn(sentence, SpectralWarning, stacklevel=2)
    return new


def _without_adapter(model: nn.Module) -> PreTrainedModel:
    """The transformers model within a peft model, whose LoRA layers stand in it."""
    configs = getattr(model, "peft_config", None)
    if isinstance(model, PreTrainedModel) or configs is None:
        base = model
    elif any(config.is_prompt_learning for config in configs.values()):
        raise ValueError("its adapter learns prompts, which are not part of the model: merge it, or use a LoRA adapter")
    else:
        base = cast(Any, model).get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(base).__name__} is no transformers model: give what from_pretrained returned")
    return base


def _modeling(base: PreTrainedModel) -> str:
    """The module of transformers that defines the model of a configuration; the model's own class may be Unsloth's."""
    name = type(base.config).__module__.replace(".configuration_", ".modeling_")
    if not name.startswith("transformers.models.") or importlib.util.find_spec(name) is None:
        raise ValueError(
            f"the code of {type(base).__name__} is not part of transformers: compile the model as it is, if its attention is"
            " scaled_dot_product_attention over a growing cache"
        )
    return name


@functools.cache
def _fresh(name: str) -> ModuleType:
    """The module ``name`` executed from its file once more, without what was assigned to it or to what it imports."""
    file = _file(name)
    package, _, last = name.rpartition(".")
    spec = importlib.util.spec_from_file_location(f"{package}._as_written_{last}", file)
    assert spec is not None and spec.loader is not None, "a file of Python has a loader"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dynamo looks for globals by the module's name
    spec.loader.exec_module(module)
    authors = str(_file(name.partition(".")[0]).parent)
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(statement, ast.ImportFrom) or not statement.level:
            continue
        source = importlib.util.resolve_name("." * statement.level + (statement.module or ""), module.__package__)
        for alias in statement.names:
            value = getattr(module, alias.asname or alias.name, None)
            if isinstance(value, FunctionType) and not value.__code__.co_filename.startswith(authors):
                setattr(module, alias.asname or alias.name, getattr(_fresh(source), alias.name))
    return module


def _file(name: str) -> Path:
    """The file of the module ``name``."""
    file = importlib.import_module(name).__file__
    assert file is not None, f"{name} is a module of Python, with a file"
    return Path(file)


def _share(base: nn.Module, new: nn.Module) -> None:
    """Let ``new``, on the meta device, hold the weights of ``base``."""
    held = dict(base.named_modules())
    device = next(base.parameters()).device
    for path, module in list(new.named_modules()):
        if not path or not (module._parameters or module._buffers):
            continue
        theirs = held.get(path)
        if type(module).__module__.startswith("transformers.models."):
            if not module._parameters and hasattr(module, "config"):  # RoPE is computed from the configuration
                with torch.device(device):
                    new.set_submodule(path, type(module)(module.config))
            elif theirs is not None:
                for own, held_there in ((module._parameters, theirs._parameters), (module._buffers, theirs._buffers)):
                    own.update({name: held_there[name] for name in own if name in held_there})
        elif theirs is None:
            raise ValueError(_LACKS.format(type(base).__name__, path))
        else:
            new.set_submodule(path, _as_written(theirs))
    if left := [name for name, x in (*new.named_parameters(), *new.named_buffers()) if x.is_meta]:
        raise ValueError(_LACKS.format(type(base).__name__, left[0]))


def _as_written(module: nn.Module) -> nn.Module:
    """``module``, or where its forward has been replaced one of its class as written that shares all that it holds."""
    cls = type(module)
    code = getattr(cls.forward, "__code__", None)
    as_written = code is not None and code.co_filename == inspect.getsourcefile(cls)
    if as_written and "forward" not in vars(module):
        return module
    if not as_written:
        cls = getattr(_fresh(cls.__module__), cls.__name__)
    new = cls.__new__(cls)
    new.__dict__.update({name: value for name, value in vars(module).items() if name != "forward"})
    return new
