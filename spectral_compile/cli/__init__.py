"""The command line, a file a command; ``main`` is what a shell calls.

Nothing is imported here: torch imports this package, half imported itself, where ``TORCH_LOGS`` names ``spectral_compile``.
"""
