"""The caches on trial: dense, compressed in any way, and rivals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from spectral_compile.backend import reset, spectral
from spectral_compile.codec import PRESETS, Preset, Profile
from spectral_compile.config import SpectralConfig
from spectral_compile.errors import Refused
from spectral_compile.evaluation.simulated import RECENT, SIMULATED, SimulatedCache
from spectral_compile.evaluation.size import compressed_keys
from spectral_compile.outputs import cache_argument
from spectral_compile.report import first_refusal, reports

DENSE = "dense"
PROFILED = "+profile"
RIVALS = {  # the quantised caches of transformers: back end and bits
    "fp8": ("fp8", None),
    "quanto-4": ("quanto", 4),
    "quanto-2": ("quanto", 2),
    "hqq-4": ("hqq", 4),
    "hqq-2": ("hqq", 2),
}
# what changes in a preset without one of its ingredients: ``balanced-token_weighted`` is balanced without token weights
WITHOUT: dict[str, dict[str, Any]] = {
    "joint": {"key_group": 1, "value_group": 1},
    "query_weighted": {"query_weighted": False},
    "token_weighted": {"token_weighted": False},
    "normalised": {"normalised": False},
    "margin": {"margin": 1.0},
    "first_exact": {"first_exact": 0},
    "recent": {"recent": 0},
    "bytes": {"recent_bits": 16, "recent": RECENT},
}


@dataclass(frozen=True)
class Contender:
    """A cache on trial: ``model`` takes what a transformers model takes and fills a cache that ``empty`` makes."""

    name: str
    model: PreTrainedModel
    empty: Callable[[], Cache]
    compressed: bool = False  # by this backend

    def feed(self, cache: Cache, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Append ``ids`` [1, n] to ``cache``; logits [n, vocabulary], or of the last ``keep`` tokens."""
        return self.run(cache, ids, logits_to_keep=keep).logits[0]

    def run(self, cache: Cache, ids: torch.Tensor, **options: Any) -> Any:
        """What the model returns for ``ids`` [B, n], which are appended to ``cache``."""
        ids, start = ids.to(self.model.device), cache.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        out = self.model(input_ids=ids, position_ids=positions, use_cache=True, **cache_argument(cache), **options)
        if self.compressed:
            require_compressed(self.name, cache)
        return out


def options_of(name: str, profile: Profile | None = None) -> dict[str, Any] | None:
    """The backend's options under a contender's name, if it is one of this backend.

    Names are presets, perhaps without some ingredients (``balanced-margin-token_weighted``), perhaps with the profile
    (``balanced+profile``), or options as JSON. ValueError where the name asks for a profile and there is none.
    """
    if name.startswith("{"):
        try:
            return json.loads(name)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is no JSON") from None
    base, *without = name.removesuffix(PROFILED).split("-")
    if base not in PRESETS or any(ingredient not in WITHOUT for ingredient in without):
        return None
    if not name.endswith(PROFILED):
        profile = None
    elif profile is None:
        raise ValueError(f"{name} needs --profile with a file that `spectral-compile calibrate` wrote")
    changes = {field: value for ingredient in without for field, value in WITHOUT[ingredient].items()}
    return {"preset": replace(PRESETS[base], **changes), "profile": profile}


def preset_options(name: str) -> dict[str, Any]:
    """The same of a name that must be this backend's own; of any other ``SpectralConfig`` then says that it is no preset."""
    return options_of(name) or {"preset": name}


def split(given: str) -> list[str]:
    """The names in ``given``, by comma; commas within JSON separate nothing."""
    return [name for name in re.split(r",(?![^{]*\})", given) if name]


def contender(model: PreTrainedModel, name: str | Preset, inner: str = "eager", profile: Profile | None = None) -> Contender:
    """The cache called ``name``: dense, one of this backend's (or under a codec of its own), or a rival.

    Only the latest one of this backend keeps its compiled graphs and reports.
    """
    empty = partial(DynamicCache, config=model.config)
    options = {"preset": name, "profile": None} if isinstance(name, Preset) else options_of(name, profile)
    if options is not None:
        reset()
        asked: dict[str, Any] = {**options, "strict": True, "inner": inner}
        compiled = torch.compile(model, backend=spectral, options=asked)
        return Contender(str(name), compiled, empty, compressed=True)
    if name in RIVALS:
        backend, bits = RIVALS[name]
        return Contender(name, model, partial(QuantizedCache, backend, model.config, nbits=bits))
    if name in SIMULATED:
        return Contender(name, model, partial(SimulatedCache, SIMULATED[name], model.config))
    return Contender(DENSE, model, empty)


def check(names: Iterable[str], profile: Profile | None = None, inner: str = "eager") -> None:
    """ValueError for a name that no contender has, or options that the backend does not take."""
    for name in names:
        if name in RIVALS or name in SIMULATED:
            continue
        if (options := options_of(name, profile)) is None:
            known = ", ".join((*PRESETS, *RIVALS, *SIMULATED))
            raise ValueError(f"unknown cache {name!r}: choose from {known}, or give options as JSON")
        SpectralConfig.parse({**options, "inner": inner})


def obstacle(rival: str, config: transformers.PreTrainedConfig) -> str | None:
    """Why a rival cannot be used: its package is missing, or transformers lacks its back end, or not for such a model."""
    backend, bits = RIVALS[rival]
    try:
        QuantizedCache(backend, config, nbits=bits)
    except (ImportError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def require_matched(kinds: set[str]) -> None:
    """Raise RuntimeError unless graphs of just these ``kinds`` were compiled, with equally many attention sites compressed."""
    made = reports()
    if {report.kind for report in made} != kinds or len({report.matched for report in made}) > 1:
        found = "; ".join(map(str, made)) or "no graph at all"
        raise RuntimeError(f"expected {', '.join(sorted(kinds))} graphs with the same sites compressed, but got {found}")


def require_compressed(name: str, cache: Cache) -> None:
    """Raise ``Refused`` where no graph compresses anything, and RuntimeError where ``cache`` is dense nevertheless."""
    made = reports()
    if made and not any(report.matched for report in made):
        raise Refused(f"nothing was compressed: {first_refusal(made)}")
    if not compressed_keys(cache):  # also when Dynamo gave up at its recompile limit, of which no report tells
        raise RuntimeError(f"{name}: the cache is dense, so its figures would be those of another cache")
