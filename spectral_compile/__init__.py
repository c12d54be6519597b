"""A torch.compile backend that keeps the KV cache spectrally compressed.

``model.compile(backend="spectral")`` is the whole interface; the names below configure it and show what it did.
"""

from pathlib import Path
from typing import Any

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # a source tree: kernels/ and passes/ stand beside this folder
    __path__.append(str(_here.parent))

from spectral_compile import limit  # noqa: E402
from spectral_compile.backend import explain, reset  # noqa: E402
from spectral_compile.config import SpectralConfig  # noqa: E402
from spectral_compile.report import GraphReport, SpectralWarning, reports  # noqa: E402
from spectral_compile.stats import MemoryStats, memory_stats  # noqa: E402
from spectral_compile.tensor import SpectralTensor  # noqa: E402

__all__ = [
    "GraphReport",
    "MemoryStats",
    "SpectralConfig",
    "SpectralTensor",
    "SpectralWarning",
    "explain",
    "memory_stats",
    "reports",
    "reset",
    "spectral",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "spectral":  # for ``torch.compile(backend=...)``, whose limits are then watched
        from spectral_compile.backend import spectral

        limit.watch(spectral)
        return spectral
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
