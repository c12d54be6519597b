"""Transform coding of keys and values in plain PyTorch: the reference for every kernel."""

from .basis import (
    REFRESH,
    decode,
    encode,
    fit,
    gram_residual,
    key_weight,
    latent,
    residual,
    synthesis,
    token_scale,
)
from .layout import Layout, Rotary, Tiers
from .presets import PRESETS, Preset, largest_group
from .profile import GRADES, USUAL, Profile
from .quantise import dequantise, norm_code, norm_value, pack, quantise, recent_code, recent_value, search_step, unpack

__all__ = [
    "GRADES",
    "PRESETS",
    "REFRESH",
    "USUAL",
    "Layout",
    "Preset",
    "Profile",
    "Rotary",
    "Tiers",
    "decode",
    "dequantise",
    "encode",
    "fit",
    "gram_residual",
    "key_weight",
    "largest_group",
    "latent",
    "norm_code",
    "norm_value",
    "pack",
    "quantise",
    "recent_code",
    "recent_value",
    "residual",
    "search_step",
    "synthesis",
    "token_scale",
    "unpack",
]
