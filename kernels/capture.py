"""Records what a call does on a GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Results = TypeVar("_Results")


def capture(call: Callable[[], _Results], device: torch.device) -> tuple[Callable[[], None], _Results]:
    """What replays ``call``, and what each replay writes its results to; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # cuBLAS would keep its workspace beside the graph for good, and take one for it that another graph owns
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = call()
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay, results
