"""Eigenvectors of many symmetric matrices at once, out of products and Cholesky factors, where eigh takes one after another."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectral_compile.kernels.capture import capture

_SHIFT = 1e-6  # of the trace: below it float32 sums of products hold little but noise, and may be indefinite
_POWERS = (1, 2, 2, 2, 2)  # products with the matrix before each orthogonalisation; the error falls as 1 / sum squared
_RIDGE = 1e-14  # of each squared length: above the rounding of float64, so that no factorisation can fail
_RECORDED = 1 << 20  # numbers in the matrices of which a graph is kept: it keeps some fifty bytes for each
_KEPT = 4  # graphs
_graphs: dict[tuple[object, ...], tuple[Callable[[], None], torch.Tensor, torch.Tensor]] = {}


def eigenbasis(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal columns near the ``rank`` leading eigenvectors, by falling energy, without waiting for the device.

    Subspace iteration (Golub and Van Loan, Matrix Computations, 8.2.4), orthogonalised by shifted Cholesky QR (Fukaya et al.
    2020, doi:10.1137/18M1218212). It starts from the Cholesky factor of the matrix, channels by falling energy: a factor spans
    what the matrix does with the root of its condition. Eigenvectors with eigenvalues that differ by some per cent stay mixed,
    which hardly costs transform coding anything; so do those with eigenvalues below ``_SHIFT``.

    float32 [..., W, W], positive semidefinite up to ``_SHIFT`` -> float32 [..., W, rank].
    """
    width = gram.shape[-1]
    found = (_recorded if gram.is_cuda else _leading)(gram.reshape(-1, width, width), rank)
    return found.reshape(*gram.shape[:-1], rank)


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Of one matrix after another: float32 [N, W, W] -> float32 [N, W, rank]."""
    a = gram.double()
    trace = a.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    a = a / trace.clamp_min(torch.finfo(torch.float32).tiny)
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_SHIFT)
    order = diagonal.argsort(-1, descending=True)[:, :, None]
    a = a.gather(-2, order.expand_as(a)).gather(-1, order.mT.expand_as(a))
    basis = torch.linalg.cholesky_ex(a).L[..., :rank]
    for power in _POWERS:
        for _ in range(power):
            basis = a @ basis
        basis = _orthonormal(basis)
    energy = (basis * (a @ basis)).sum(-2, keepdim=True)
    basis = basis.gather(-1, energy.argsort(-1, descending=True).expand_as(basis)).float()
    return torch.empty_like(basis).scatter_(-2, order.expand_as(basis), basis)


def _recorded(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """``_leading`` as a CUDA graph: launched one by one, its some hundred kernels take the host longer than the device."""
    key = (gram.shape, rank, gram.device, torch.cuda.current_stream(gram.device))
    if gram.numel() > _RECORDED or torch.cuda.is_current_stream_capturing():
        return _leading(gram, rank)
    if key not in _graphs:
        while len(_graphs) >= _KEPT:
            del _graphs[next(iter(_graphs))]
        _graphs[key] = _record(gram, rank)
    replay, given, found = _graphs[key]
    given.copy_(gram)
    replay()
    return found.clone()


def _record(gram: torch.Tensor, rank: int) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
    """What replays the graph, and where that finds its matrices and leaves their eigenvectors."""
    given, here, aside = gram.clone(), torch.cuda.current_stream(gram.device), torch.cuda.Stream(gram.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        _leading(given, rank)  # libraries set themselves up in a first call, which must not be recorded
    here.wait_stream(aside)
    replay, found = capture(lambda: _leading(given, rank), gram.device)
    return replay, given, found


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """The Q of a QR decomposition, as nearly as the columns' condition allows: float64 [N, W, rank]."""
    products = columns.mT @ columns
    products.diagonal(dim1=-2, dim2=-1).mul_(1 + _RIDGE)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(products).L, columns.mT, upper=False).mT
