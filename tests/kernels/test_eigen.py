"""The eigenvectors that segments get on a GPU code as well as exact ones, in the interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.budget import FULL, combinations, examples
from tests.tiny import DEVICE

pytest.importorskip("triton")

import triton
import triton.language as tl

from spectral_compile.kernels.append import eigen
from spectral_compile.kernels.arguments import LEAST

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and Triton was imported without its interpreter", allow_module_level=True)

FLOOR = 1e-5  # of the largest eigenvalue: below a tenth of it, eigenvectors may be mixed
SPECTRA = {
    "flat": lambda t: torch.ones_like(t),
    "slow": lambda t: 1 / (1 + 100 * t),
    "steep": lambda t: 1 / (1 + 100 * t).square(),
    "clusters": lambda t: torch.where(t < 0.3, 1.0, 0.01) * (1 + 0.05 * (40 * t).sin()),
    "exponential": lambda t: 1e-3**t,
    "vanishing": lambda t: 1e-8**t,
    "dominated": lambda t: torch.where(t > 0, 1e-4 / (1 + 100 * t), 1.0),
    "deficient": lambda t: torch.where(t < 0.2, 1 - t, 0.0),
}


@triton.jit(do_not_specialize=["rows", "rank"])
def _eigen_kernel(room, out, rows, rank, further, width: tl.constexpr, WIDTH: tl.constexpr):
    """Of one matrix."""
    matrix = tl.program_id(0).to(tl.int64)
    a, x, y = room.a + matrix * width * width, room.x + matrix * rows * width, room.y + matrix * rows * width
    numbers, c = room.numbers + matrix * width, tl.arange(0, WIDTH)
    eigen.balance(a, width, WIDTH)
    eigen.eigenvectors(a, x, y, numbers, rows, width, further, WIDTH)
    for first in range(0, rows, eigen.PANEL):
        vectors, place = eigen.vectors_by_energy(x, numbers, first, rows, width, WIDTH)
        at = out + (matrix * rank + place)[:, None] * width + c[None, :]
        tl.store(at, vectors, mask=(place < rank)[:, None] & (c < width)[None, :])


def eigenbasis(gram: Tensor, rank: int) -> Tensor:
    """Orthonormal columns near the ``rank`` leading eigenvectors, by falling energy: [..., W, W] -> [..., W, rank]."""
    *shape, width = gram.shape[:-1]
    out = torch.empty(*shape, rank, width, device=DEVICE)
    if out.numel():
        room = eigen.Room.of(gram[..., 0, 0].numel(), width, rank, out.device)
        room.a.copy_(gram.reshape(-1, width, width))
        _eigen_kernel[(len(room.a),)](
            room, out, eigen.padded(rank), rank, eigen.FURTHER,
            width=width, WIDTH=max(LEAST, triton.next_power_of_2(width)), num_warps=eigen.WARPS,
        )  # fmt: skip
    return out.mT.cpu()


def with_spectrum(values: Tensor, count: int, seed: int) -> Tensor:
    """``count`` symmetric matrices with these eigenvalues and random eigenvectors, rounded to float32: [count, W, W]."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(count, len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return ((vectors * values) @ vectors.mT).float()


def correlated(*shape: int, seed: int) -> Tensor:
    """Sums of products of tokens around a mean that is not zero: float32 [..., W, W] of [..., n, W]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[-1], shape[-1], generator=generator) * torch.logspace(0, -2, shape[-1])[:, None]
    x = torch.randn(*shape, generator=generator) @ mix + 3 * torch.randn(shape[-1], generator=generator)
    return x.mT @ x


def energies(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What the columns hold and what eigenvectors would, as shares of the largest eigenvalue: float64 [..., rank]."""
    gram, basis = gram.double(), basis.double()
    exact = torch.linalg.eigvalsh(gram).flip(-1)
    most = exact[..., :1].clamp_min(torch.finfo(torch.float32).tiny)
    return (basis * (gram @ basis)).sum(-2) / most, exact[..., : basis.shape[-1]] / most


def not_orthonormal(basis: Tensor) -> float:
    basis = basis.double()
    return (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max().item()


def assert_codes_as_well(gram: Tensor, basis: Tensor) -> None:
    held, exact = energies(gram, basis)
    bits = 0.5 * ((held.clamp_min(0) + FLOOR).log2() - (exact.clamp_min(0) + FLOOR).log2())
    assert bits.mean(-1).max() < 5e-3
    lost = (exact - held).sum(-1)
    assert (lost <= 2e-3 * exact.sum(-1)).all()


@pytest.mark.parametrize(
    ("spectrum", "width"), combinations(list(SPECTRA), [64, 128, 192, 256] if FULL or DEVICE == "cuda" else [40, 96])
)
def test_codes_as_well_as_eigh(spectrum: str, width: int) -> None:
    gram = with_spectrum(SPECTRA[spectrum](torch.arange(width, dtype=torch.float64) / width), 2, seed=width)
    for rank in (width // 2, width) if FULL or DEVICE == "cuda" else (2 * width // 3,):
        basis = eigenbasis(gram, rank)
        assert not_orthonormal(basis) < 1e-5
        assert_codes_as_well(gram, basis)


@given(
    st.lists(st.integers(1, 2), max_size=2),
    st.integers(1, 80),
    st.sampled_from([8, 33, 64] if FULL else [8, 20, 33]),
    st.floats(0, 1),
    st.sampled_from([1e-30, 1.0, 1e30]),
    st.integers(0, 2**31),
)
def test_any_tokens(shape: list[int], tokens: int, width: int, share: float, factor: float, seed: int) -> None:
    gram = correlated(*shape, tokens, width, seed=seed) * factor
    rank = round(share * width)
    basis = eigenbasis(gram, rank)
    assert basis.shape == (*shape, width, rank) and basis.dtype == torch.float32
    if rank:
        assert not_orthonormal(basis) < 1e-5
        assert_codes_as_well(gram, basis)


@given(st.sampled_from([16, 64, 128] if FULL else [16, 40]), st.floats(0, 12), st.integers(0, 2**31))
@settings(max_examples=examples(10, full=30))
def test_columns_fall(width: int, decades: float, seed: int) -> None:
    gram = with_spectrum(torch.logspace(0, -decades, width, dtype=torch.float64), 2, seed)
    held, _ = energies(gram, eigenbasis(gram, width))
    assert (held.diff(dim=-1) < 1e-6).all()


@given(st.integers(2, 7), st.integers(0, 2**31))
@settings(max_examples=examples(10, full=30))
def test_distinct_eigenvectors_are_found(width: int, seed: int) -> None:
    """Down to 4**-6 of the largest eigenvalue, where rounding of float32 turns them by 1e-3."""
    gram = with_spectrum(4.0 ** -torch.arange(width, dtype=torch.float64), 1, seed)
    basis, exact = eigenbasis(gram, width), torch.linalg.eigh(gram).eigenvectors.flip(-1)
    torch.testing.assert_close((basis.mT @ exact).abs(), torch.eye(width)[None], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "gram",
    [
        torch.zeros(2, 64, 64),
        torch.ones(1, 64, 64),
        torch.diag(torch.tensor([0.0, 3e38] + [0.0] * 62)),
        torch.full((64, 64), 1e-38),
        torch.eye(64),
        torch.eye(1),
    ],
    ids=["nothing", "one direction", "one channel", "tiny", "equal", "narrow"],
)
def test_degenerate(gram: Tensor) -> None:
    basis = eigenbasis(gram, gram.shape[-1])
    assert not_orthonormal(basis) < 1e-5
    held, exact = energies(gram, basis)
    torch.testing.assert_close(held, exact.expand_as(held), atol=1e-5, rtol=0)


def test_rounding_may_leave_a_matrix_indefinite() -> None:
    gram = with_spectrum(torch.tensor([1.0] + [-2e-7] * 127, dtype=torch.float64), 2, seed=0)
    assert not_orthonormal(eigenbasis(gram, 128)) < 1e-5
