"""``python -m spectral_compile.cli``."""

from spectral_compile.cli.main import app

app()
