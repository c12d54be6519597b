"""Options of the backend: parsed once into a frozen value, checked at the earliest moment."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch

from spectral_compile.codec import PRESETS, Layout, Preset, Profile, Rotary, Tiers
from spectral_compile.errors import Mistake
from spectral_compile.files import make_folder

AUTO = "auto"
INNER = ("inductor", "aot_eager", "eager")
_RANGES = {  # of counts; first tokens, a block and the headroom are allocated before there are tokens for them
    "head_group": (1, 256),
    "key_group": (1, 256),
    "value_group": (1, 256),
    "first_exact": (0, 4096),
    "recent": (0, 2**20),
    "block": (1, 4096),
    "warmup": (1, 2**20),
    "headroom": (1, 2**17),
}


@dataclass(frozen=True)
class SpectralConfig:
    """What ``torch.compile(..., backend="spectral", options=...)`` understands.

    ``preset`` names a codec: ``quality`` (about 6x), ``balanced`` (about 8.5x), ``compact`` (about 14x), ``seed`` (the
    rank-16/32 int8 codec that everything is compared with) or ``exact`` (lossless); or it is a ``codec.Preset``. ``strict``
    turns every silent loss of compression into an error. Keys of ``key_group`` KV heads are coded jointly, and values of
    ``value_group``, of which one divides the other; ``head_group`` is for both (the preset's choice where None).
    ``key_ranks`` and ``value_ranks`` are channels per head at 8, 4 and 2 bits. ``profile`` spends the preset's bytes on
    the layers that need them: ``auto`` is the one that ``spectral-compile calibrate`` has kept on this machine for a model
    with these weights, or that comes with the package, if there is one; else it is a file that was written so, its content, or
    the name of one that comes with the package; with None all layers get the same. Of a text the ``first_exact`` first tokens
    stay exact, and the ``recent`` last ones are kept at ``recent_bits`` a channel: 8, or 16 for the model's dtype. ``block``
    tokens are coded at a time, ``warmup`` tokens are awaited before a basis is computed; None keeps the preset's. ``headroom``
    tokens that are yet to come have room at once (None: 64, on a GPU 1024): until they are there, buffers are not copied to
    larger ones, and CUDA graphs are not recorded again. ``cudagraphs`` records decode steps on a GPU as CUDA graphs. ``inner``
    compiles the rewritten graph. ``inductor`` holds options that are Inductor's own, as a dictionary or pairs. ``dump_graphs``
    is a folder, made if need be, in which each graph gets a folder of its own, ``graph_000`` and so on: with the graph as it
    came and behind each pass that changed it, as readable Python whose names are numbered in that order, and its report as
    ``report.txt``.

    ValueError, in a sentence, for whatever an option cannot be.
    """

    preset: str | Preset = "balanced"
    strict: bool = False
    head_group: int | None = None
    key_group: int | None = None
    value_group: int | None = None
    key_ranks: tuple[int, int, int] | None = None
    value_ranks: tuple[int, int, int] | None = None
    profile: Profile | str | None = AUTO
    first_exact: int | None = None
    recent: int | None = None
    recent_bits: int | None = None
    block: int | None = None
    warmup: int | None = None
    headroom: int | None = None
    cudagraphs: bool = True
    inner: str = "inductor"
    inductor: tuple[tuple[str, Any], ...] = ()
    dump_graphs: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.preset, Preset) and not (isinstance(self.preset, str) and self.preset in PRESETS):
            raise ValueError(f"unknown preset {self.preset!r}{_nearest(self.preset, PRESETS)}")
        if self.inner not in INNER:
            raise ValueError(f"unknown inner compiler {self.inner!r}{_nearest(self.inner, INNER)}")
        for name in ("strict", "cudagraphs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                value = getattr(self.codec, name, None)  # a preset may be anybody's too
            if value is not None and not (_is_integer(value) and least <= value <= most):
                raise ValueError(f"{name} must be an integer from {least} to {most}, not {value!r}")
        if self.recent_bits is not None and not (
            _is_integer(self.recent_bits) and self.recent_bits in ((16,) if self.codec.lossless else (8, 16))
        ):
            allowed = "16, as the preset is lossless" if self.codec.lossless else "8 or 16"
            raise ValueError(f"recent_bits must be {allowed}, not {self.recent_bits!r}")
        for name in ("key_ranks", "value_ranks"):
            value = getattr(self, name)
            if value is None:
                continue
            counts = isinstance(value, (tuple, list)) and len(value) == 3 and all(_is_integer(n) and n >= 0 for n in value)
            if not counts or not sum(value):
                raise ValueError(f"{name} must be three counts, of channels at 8, 4 and 2 bits per head, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        divisible = not (self.codec.lossless or self.codec.segment or self.key_ranks or self.value_ranks)
        if self.profile == AUTO and not divisible:
            object.__setattr__(self, "profile", None)
        elif self.profile not in (None, AUTO):
            if not divisible:
                raise ValueError("a profile divides the bytes of quality, balanced or compact: leave it, or the ranks, out")
            if not isinstance(self.profile, Profile):
                object.__setattr__(self, "profile", Profile.load(self.profile))
        object.__setattr__(self, "inductor", _of_inductor(self.inductor))
        if self.dump_graphs is not None:
            if not isinstance(self.dump_graphs, (str, os.PathLike)) or not str(self.dump_graphs):
                raise ValueError(f"dump_graphs must be the path of a folder, not {self.dump_graphs!r}")
            object.__setattr__(self, "dump_graphs", os.fspath(self.dump_graphs))
            make_folder(Path(self.dump_graphs))

    @property
    def codec(self) -> Preset:
        """The preset itself."""
        return self.preset if isinstance(self.preset, Preset) else PRESETS[self.preset]

    def layout(self, kv_heads: int, head_dim: int, rotary: Rotary | None, layer: int = 0) -> Layout:
        """The layout of attention layer ``layer``, with ``kv_heads`` KV heads of ``head_dim`` channels, under these options."""
        preset = self.codec
        names = ("key_group", "value_group", "first_exact", "recent", "recent_bits", "block", "warmup")
        chosen: dict[str, Any] = {}
        if self.head_group is not None:
            chosen = {"key_group": self.head_group, "value_group": self.head_group}
        chosen |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if preset.segment and "block" in chosen:
            chosen["segment"] = chosen["block"]  # a preset with a basis a block keeps one a block
        layout = replace(preset, **chosen).layout(kv_heads, head_dim, rotary)
        for name, ranks, heads in (
            ("key", self.key_ranks, layout.key_group), ("value", self.value_ranks, layout.value_group)
        ):  # fmt: skip
            if ranks is None:
                continue
            if sum(ranks) > head_dim:
                raise Mistake(f"{name}_ranks {ranks} sum to more than head_dim {head_dim}: lower them")
            side: dict[str, Any] = {name: Tiers(*(n * heads for n in ranks))}
            layout = replace(layout, **side)
        if isinstance(self.profile, Profile):
            layout = self.profile.apply(layout, layer)
        return Layout.parse(layout.spec())  # interned, so that guards compare it by identity

    @classmethod
    def parse(cls, options: Mapping[str, Any] | SpectralConfig | None, mode: str | None = None) -> SpectralConfig:
        """The config that ``options`` and ``mode`` of ``torch.compile`` mean.

        Keys that are options of Inductor are handed on to it, and so is ``mode``. ValueError for an unknown key, which names a
        known one that is near, and for a value that an option cannot have.
        """
        if isinstance(options, SpectralConfig):
            return options
        if not isinstance(options, Mapping | None):
            raise ValueError(f"options must be a dictionary or a SpectralConfig, not {options!r}")
        given, passed = {}, {}
        for key, value in (options or {}).items():
            name = str(key).replace("-", "_")
            if name == "inductor":
                passed.update(_pairs(value))
            elif name in _own():
                given[name] = value
            else:
                passed[name] = value
        if mode not in (None, "default"):
            known = torch._inductor.list_mode_options()
            if not isinstance(mode, str) or mode not in known:
                raise ValueError(f"unknown mode {mode!r}{_nearest(mode, known)}")
            passed = {**known[mode], **passed}
        return cls(**given, inductor=tuple(passed.items()))


def _own() -> set[str]:
    return {field.name for field in fields(SpectralConfig)} - {"inductor"}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pairs(given: Any) -> dict[str, Any]:
    try:
        return dict(given)
    except (TypeError, ValueError):
        raise ValueError(f"inductor must be a dictionary of Inductor's options, not {given!r}") from None


def _of_inductor(given: Any) -> tuple[tuple[str, Any], ...]:
    """Options of Inductor in order, each of which it must know and be able to take, whatever the inner compiler is."""
    options = _pairs(given)
    if not options:
        return ()
    from torch._inductor import config  # here, since to import it takes seconds

    known = config.get_config_copy()
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r}{_nearest(name, sorted(_own() | set(known)))}")
        kind = config.get_type(name)  # type: ignore[attr-defined]  # it is no plain module, as a type checker takes it for
        # an option that is None and has no annotation can be anything
        if kind is not type(None) and not _fits(value, kind):
            raise ValueError(f"{name} of Inductor must be {getattr(kind, '__name__', kind)}, not {value!r}")
    return tuple(sorted(options.items()))


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of a type that is a plain one, literals, or a union of such; others are Inductor's to check."""
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is int:
        return _is_integer(value)
    if kind is float:
        return isinstance(value, float) or _is_integer(value)
    return kind not in (bool, str, type(None)) or isinstance(value, kind)


def _nearest(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
