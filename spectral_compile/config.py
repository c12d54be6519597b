"""Options of the backend: parsed once into a frozen value, checked at the earliest moment."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from spectral_compile.codec import PRESETS, Layout, Preset, Profile, Rotary, Tiers

INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class SpectralConfig:
    """What ``torch.compile(..., backend="spectral", options=...)`` understands.

    ``preset`` names a codec: ``quality`` (about 6x), ``balanced`` (about 8.5x), ``compact`` (about 14x), ``seed`` (the
    rank-16/32 int8 codec that everything is compared with) or ``exact`` (lossless); or it is a ``codec.Preset``. ``strict``
    turns every silent loss of compression into an error. ``head_group`` KV heads are coded jointly (the preset's choice where
    None). ``key_ranks`` and ``value_ranks`` are channels per head at 8, 4 and 2 bits. ``profile``, a file that
    ``spectral-compile calibrate`` wrote or its content, spends the preset's bytes on the layers that need them. ``sinks`` first
    tokens stay exact, and the ``recent`` last ones are kept at ``window_bits`` a channel: 8, or 16 for the model's dtype.
    ``block`` tokens are coded at a time, ``warmup`` tokens are awaited before a basis is computed; None keeps the preset's.
    ``headroom`` tokens that are yet to come have room at once (None: 64, on a GPU 1024): until they are there, buffers are not
    copied to larger ones, and CUDA graphs are not recorded again. ``cudagraphs`` records decode steps on a GPU as CUDA graphs.
    ``inner`` compiles the rewritten graph. ``inductor`` holds options that are Inductor's own.
    """

    preset: str | Preset = "balanced"
    strict: bool = False
    head_group: int | None = None
    key_ranks: tuple[int, int, int] | None = None
    value_ranks: tuple[int, int, int] | None = None
    profile: Profile | None = None
    sinks: int | None = None
    recent: int | None = None
    window_bits: int | None = None
    block: int | None = None
    warmup: int | None = None
    headroom: int | None = None
    cudagraphs: bool = True
    inner: str = "inductor"
    inductor: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.preset, Preset) and self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}{_nearest(self.preset, PRESETS)}")
        if self.inner not in INNER:
            raise ValueError(f"unknown inner compiler {self.inner!r}{_nearest(self.inner, INNER)}")
        for name in ("strict", "cudagraphs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name, least in (("head_group", 1), ("sinks", 0), ("recent", 0), ("block", 1), ("warmup", 1), ("headroom", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        if self.window_bits not in ((None, 16) if self.codec.lossless else (None, 8, 16)):
            allowed = "16, as the preset is lossless" if self.codec.lossless else "8 or 16"
            raise ValueError(f"window_bits must be {allowed}, not {self.window_bits!r}")
        for name in ("key_ranks", "value_ranks"):
            value = getattr(self, name)
            if value is None:
                continue
            if len(value) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in value) or not sum(value):
                raise ValueError(f"{name} must be three counts, of channels at 8, 4 and 2 bits per head, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.profile is not None:
            if self.codec.lossless or self.codec.segment or self.key_ranks or self.value_ranks:
                raise ValueError("a profile divides the bytes of quality, balanced or compact: leave it, or the ranks, out")
            if not isinstance(self.profile, Profile):
                object.__setattr__(self, "profile", Profile.load(self.profile))

    @property
    def codec(self) -> Preset:
        """The preset itself."""
        return self.preset if isinstance(self.preset, Preset) else PRESETS[self.preset]

    def layout(self, kv_heads: int, head_dim: int, rotary: Rotary | None, layer: int = 0) -> Layout:
        """The layout of attention layer ``layer``, with ``kv_heads`` KV heads of ``head_dim`` channels, under these options."""
        preset = self.codec
        chosen = {
            name: getattr(self, name)
            for name in ("head_group", "sinks", "recent", "window_bits", "block", "warmup")
            if getattr(self, name) is not None
        }
        if preset.segment and "block" in chosen:
            chosen["segment"] = chosen["block"]  # a preset with a basis a block keeps one a block
        layout = replace(preset, **chosen).layout(kv_heads, head_dim, rotary)
        for name, ranks in (("key", self.key_ranks), ("value", self.value_ranks)):
            if ranks is None:
                continue
            if sum(ranks) > head_dim:
                raise ValueError(f"{name}_ranks {ranks} sum to more than head_dim {head_dim}: lower them")
            layout = replace(layout, **{name: Tiers(*(n * layout.head_group for n in ranks))})
        if self.profile is not None:
            layout = self.profile.apply(layout, layer)
        return Layout.parse(layout.spec())  # interned, so that guards compare it by identity

    @classmethod
    def parse(cls, options: Mapping[str, Any] | SpectralConfig | None, mode: str | None = None) -> SpectralConfig:
        """The config that ``options`` and ``mode`` of ``torch.compile`` mean.

        Keys that are options of Inductor are handed on to it, and so is ``mode``. An unknown key is a ValueError that
        names the nearest known one.
        """
        if isinstance(options, SpectralConfig):
            return options
        own = {f.name for f in fields(cls)} - {"inductor"}
        inductor = set(torch._inductor.list_options())
        given, passed = {}, {}
        for key, value in (options or {}).items():
            name = key.replace("-", "_")
            if name in own:
                given[name] = value
            elif name in inductor:
                passed[name] = value
            elif name == "inductor":
                passed.update(value)
            else:
                raise ValueError(f"unknown option {key!r}{_nearest(key, sorted(own | inductor))}")
        if mode not in (None, "default"):
            passed = {**torch._inductor.list_mode_options(mode), **passed}
        return cls(**given, inductor=tuple(sorted(passed.items())))


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""
