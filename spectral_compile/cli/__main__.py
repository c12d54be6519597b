"""``python -m spectral_compile.cli``."""

from spectral_compile.cli import app

app()
