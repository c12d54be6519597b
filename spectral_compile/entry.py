"""The entry point of ``torch_dynamo_backends``: importing it means that somebody asked for the backend by name."""

from spectral_compile import limit
from spectral_compile.backend import spectral
from spectral_compile.report import expect_a_graph

limit.watch(spectral)
expect_a_graph()

__all__ = ["spectral"]
