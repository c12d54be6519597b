"""Eigenvectors of many symmetric matrices at once, out of products and Cholesky factors, where eigh takes one after another."""

from __future__ import annotations

import torch

_SHIFT = 1e-6  # of the trace: below it float32 sums of products hold little but noise, and may be indefinite
_POWERS = (1, 2, 2, 2, 2)  # products with the matrix before each orthogonalisation; the error falls as 1 / sum squared
_RIDGE = 1e-14  # of each squared length: above the rounding of float64, so that no factorisation can fail


def eigenbasis(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal columns near the ``rank`` leading eigenvectors, by falling energy, without waiting for the device.

    Subspace iteration (Golub and Van Loan, Matrix Computations, 8.2.4), orthogonalised by shifted Cholesky QR (Fukaya et al.
    2020, doi:10.1137/18M1218212). It starts from the Cholesky factor of the matrix, channels by falling energy: a factor spans
    what the matrix does with the root of its condition. Eigenvectors with eigenvalues that differ by some per cent stay mixed,
    which hardly costs transform coding anything; so do those with eigenvalues below ``_SHIFT``.

    float32 [..., W, W], positive semidefinite up to ``_SHIFT`` -> float32 [..., W, rank].
    """
    width = gram.shape[-1]
    a = gram.reshape(-1, width, width).double()
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
    return torch.empty_like(basis).scatter_(-2, order.expand_as(basis), basis).reshape(*gram.shape[:-1], rank)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """The Q of a QR decomposition, as nearly as the columns' condition allows: float64 [N, W, rank]."""
    products = columns.mT @ columns
    products.diagonal(dim1=-2, dim2=-1).mul_(1 + _RIDGE)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(products).L, columns.mT, upper=False).mT
