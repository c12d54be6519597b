"""Transform coding of keys and values in plain PyTorch: the reference for every kernel."""

from .basis import decode, encode, fit, key_weight, latent, residual, synthesis, value_weight
from .layout import Layout, Rotary, Tiers
from .presets import PRESETS, Preset
from .quantise import dequantise, norm_code, norm_value, pack, quantise, search_step, unpack

__all__ = [
    "PRESETS",
    "Layout",
    "Preset",
    "Rotary",
    "Tiers",
    "decode",
    "dequantise",
    "encode",
    "fit",
    "key_weight",
    "latent",
    "norm_code",
    "norm_value",
    "pack",
    "quantise",
    "residual",
    "search_step",
    "synthesis",
    "unpack",
    "value_weight",
]
