"""Transform coding of keys and values in plain PyTorch: the reference for every kernel."""

from .basis import (
    SAMPLE,
    decode,
    encode,
    even,
    fit,
    gram_residual,
    key_weight,
    latent,
    loudness,
    residual,
    rounded,
    synthesis,
)
from .layout import Layout, Rotary, Tiers
from .presets import PRESETS, Preset, largest_group
from .profile import GRADES, USUAL, Profile
from .quantise import dequantise, norm_code, norm_value, pack, quantise, search_step, unpack, window_code, window_value

__all__ = [
    "GRADES",
    "PRESETS",
    "SAMPLE",
    "USUAL",
    "Layout",
    "Preset",
    "Profile",
    "Rotary",
    "Tiers",
    "decode",
    "dequantise",
    "encode",
    "even",
    "fit",
    "gram_residual",
    "key_weight",
    "largest_group",
    "latent",
    "loudness",
    "norm_code",
    "norm_value",
    "pack",
    "quantise",
    "residual",
    "rounded",
    "search_step",
    "synthesis",
    "unpack",
    "window_code",
    "window_value",
]
