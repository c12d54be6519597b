"""A torch.compile backend that keeps the KV cache spectrally compressed.

``model.compile(backend="spectral")`` is the whole interface; the names below configure it and show what it did.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # a source tree, where these stand beside this folder
    # not by way of __path__: who walks that, as TORCH_LOGS=spectral_compile does, would find this package within itself
    for _name in ("kernels", "passes", "profiles"):
        if _spec := PathFinder.find_spec(f"{__name__}.{_name}", [str(_here.parent)]):
            sys.modules[_spec.name] = globals()[_name] = module_from_spec(_spec)

from spectral_compile import limit  # noqa: E402
from spectral_compile.ahead import run_ahead  # noqa: E402
from spectral_compile.backend import reset  # noqa: E402
from spectral_compile.config import SpectralConfig  # noqa: E402
from spectral_compile.explain import explain  # noqa: E402
from spectral_compile.report import GraphReport, SpectralWarning, reports  # noqa: E402
from spectral_compile.saved import load_cache, save_cache  # noqa: E402
from spectral_compile.stats import MemoryStats, memory_stats  # noqa: E402
from spectral_compile.tensor import SpectralTensor  # noqa: E402

__all__ = [
    "GraphReport",
    "MemoryStats",
    "SpectralConfig",
    "SpectralTensor",
    "SpectralWarning",
    "explain",
    "load_cache",
    "memory_stats",
    "reports",
    "reset",
    "run_ahead",
    "save_cache",
    "spectral",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "spectral":  # for ``torch.compile(backend=...)``, whose limits are then watched
        from spectral_compile.backend import spectral

        limit.watch(spectral)
        return spectral
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
