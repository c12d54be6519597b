"""What the operations tell a compiler about themselves: what they write to, and the shapes of what they return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral_compile.kernels.advance import advance_
from spectral_compile.kernels.append import append_
from spectral_compile.kernels.attend import attend_
from spectral_compile.kernels.causal import causal
from spectral_compile.kernels.importance import importance
from tests.stores import store


def arguments(name: str) -> tuple[Any, ...]:
    """For a step of three columns over a store of 190 tokens."""
    books, chunk = store("balanced", 16, past=190, chunk=3)
    tokens = chunk.query, chunk.key, chunk.value
    spec = books.layout.spec()
    absent = None, None, books.ledger, books.positions, None
    return {
        "advance_": (books.ledger, torch.zeros(1, 220, dtype=torch.int32), None, None, chunk.key, spec),
        "append_": (*tokens, books.ledger, None, None, *books.buffers, spec),
        "attend_": (*tokens, *absent, *books.buffers, spec, 0.25, 0, 0.0, None),
        "causal": (*tokens, books.ledger, None, 0.25),
        "importance": (chunk.query, chunk.key, None, 0.25, 1),
    }[name]


@pytest.mark.parametrize("operation", [advance_, append_, attend_, causal, importance], ids=lambda op: op._opname)
def test_they_do_what_they_declare(operation: torch._ops.OpOverload) -> None:
    with torch.no_grad():
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operation, arguments(operation._opname), test_utils=tests)
