"""What the operations tell a compiler about themselves: what they write to, and the shapes of what they return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral_compile.kernels.advance.op import advance_
from spectral_compile.kernels.append.op import append_
from spectral_compile.kernels.attend.op import attend_
from spectral_compile.kernels.causal import causal
from tests.stores import filled


def arguments(name: str) -> tuple[Any, ...]:
    """For a step of three columns over a store of 190 tokens."""
    store, step = filled("balanced", 16, past=190, new=3)
    tokens = step.query, step.key, step.value
    spec = store.layout.spec()
    absent = None, None, store.ledger, store.positions, None
    return {
        "advance_": (store.ledger, torch.zeros(1, 220, dtype=torch.int32), None, None, step.key, spec),
        "append_": (*tokens, store.ledger, None, step.key, 0.25, 0, *store.buffers, spec),
        "attend_": (*tokens, *absent, *store.buffers, spec, 0.25, 0, 0.0, None),
        "causal": (*tokens, store.ledger, None, 0.25),
    }[name]


@pytest.mark.parametrize("operation", [advance_, append_, attend_, causal], ids=lambda op: op._opname)
def test_they_do_what_they_declare(operation: torch._ops.OpOverload) -> None:
    with torch.no_grad():
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operation, arguments(operation._opname), test_utils=tests)
