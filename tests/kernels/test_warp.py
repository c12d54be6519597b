"""Each instruction of ``kernels.attend.latent.warp``, lane by lane: in the interpreter, or on the GPU that is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from spectral_compile.kernels.attend.latent import warp
from tests.tiny import DEVICE

WARPS = 2
LANES = 32 * WARPS
R, C = np.arange(LANES) % 32 // 4, np.arange(LANES) % 4
WARP = np.arange(LANES) // 32


def fragment(matrices: np.ndarray) -> torch.Tensor:
    """Matrices [warps, 8, 8] of 16 bits as a register of each lane."""
    bits = np.ascontiguousarray(matrices).view(np.uint16).astype(np.uint32)
    return torch.from_numpy((bits[WARP, R, 2 * C] | bits[WARP, R, 2 * C + 1] << 16).view(np.int32)).to(DEVICE)


def halves_of(words: torch.Tensor) -> np.ndarray:
    """[lanes, 2] float16."""
    return words.cpu().numpy().view(np.float16).reshape(-1, 2)


def blank(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@triton.jit
def _words_kernel(a, b, s, out, LANES: tl.constexpr):
    x = tl.arange(0, LANES)
    a, b, s = tl.load(a + x), tl.load(b + x), tl.load(s + x)
    tl.store(out + x, warp.permuted(a, b, s))
    tl.store(out + LANES + x, warp.transposed(a))
    tl.store(out + 2 * LANES + x, warp.plus(a, b))
    first, second = warp.turned(a, b, s, warp.permuted(s, s, s * 0 + 0x1032))
    tl.store(out + 3 * LANES + x, first)
    tl.store(out + 4 * LANES + x, second)


def test_words() -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.normal(size=(WARPS, 8, 8)).astype(np.float16) for _ in range(2))
    angle = generator.uniform(-3, 3, (LANES,))
    turn = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float16)
    out = blank(5, LANES)
    words = torch.from_numpy(turn.view(np.int32)[:, 0].copy()).to(DEVICE)
    _words_kernel[(1,)](fragment(a), fragment(b), words, out, LANES=LANES, num_warps=WARPS)
    first, second, cos_sin = (halves_of(x).astype(np.float64) for x in (fragment(a), fragment(b), words))
    selected = np.concatenate([x.cpu().numpy().view(np.uint8).reshape(LANES, 4) for x in (fragment(a), fragment(b))], 1)
    selector = words.cpu().numpy().view(np.uint32)
    wanted = np.stack([selected[np.arange(LANES), selector >> 4 * i & 7] for i in range(4)], 1)
    sign = (selector[:, None] >> 4 * np.arange(4) & 8) != 0  # asks for a sign instead, which nobody needs
    got = out[0].cpu().numpy().view(np.uint8).reshape(LANES, 4)
    assert (got == wanted)[~sign].all()
    assert torch.equal(out[1], fragment(a.transpose(0, 2, 1)))
    assert np.array_equal(halves_of(out[2]), (first + second).astype(np.float16))
    cos, sin = cos_sin, cos_sin[:, ::-1]
    np.testing.assert_allclose(halves_of(out[3]), first * cos + second * sin, atol=4e-3)
    np.testing.assert_allclose(halves_of(out[4]), second * cos - first * sin, atol=4e-3)


@triton.jit
def _products_kernel(a, b, d, out, rounded, BFLOAT: tl.constexpr, LANES: tl.constexpr):
    x = tl.arange(0, LANES)
    a0, a1 = tl.load(a + x), tl.load(a + LANES + x)
    a2, a3 = tl.load(a + 2 * LANES + x), tl.load(a + 3 * LANES + x)
    b0, b1 = tl.load(b + x), tl.load(b + LANES + x)
    begin = (tl.load(d + x), tl.load(d + LANES + x), tl.load(d + 2 * LANES + x), tl.load(d + 3 * LANES + x))
    whole = warp.product(begin, a0, a1, a2, a3, b0, b1, BFLOAT)
    for i in tl.static_range(4):
        tl.store(out + i * LANES + x, whole[i])
    if not BFLOAT:
        half = warp.half_product(begin, a0, a1, b0)
        for i in tl.static_range(4):
            tl.store(out + (4 + i) * LANES + x, half[i])
        packed = (warp.halves(begin[0], begin[1]), warp.halves(begin[2], begin[3]))
        first = warp.rounded_product(packed, a0, a1, a2, a3, b0, b1)
        second = warp.rounded_half_product(packed, a0, a1, b0)
        for i in tl.static_range(2):
            tl.store(rounded + i * LANES + x, first[i])
            tl.store(rounded + (2 + i) * LANES + x, second[i])


@pytest.mark.parametrize("bfloat", [False, True], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("subnormal", [False, True], ids=["numbers", "digits"])
def test_products(bfloat: bool, subnormal: bool) -> None:
    """Digits, as subnormal numbers, are multiplied exactly; a GPU that took them for zero would hide every code."""
    generator = torch.Generator().manual_seed(2)
    dtype = torch.bfloat16 if bfloat else torch.float16
    a, b = (torch.randn(WARPS, rows, 16, generator=generator).to(dtype) for rows in (16, 8))
    smallest = 2.0**-133 if bfloat else 2.0**-24
    if subnormal:
        a = torch.randint(0, 64, (WARPS, 16, 16), generator=generator, dtype=torch.int16).view(dtype)
        b = b * 2.0**60 if bfloat else b
    d = torch.randn(WARPS, 16, 8, generator=generator) * (
        smallest * 2.0**60 if subnormal and bfloat else smallest if subnormal else 1
    )

    def parts(x: torch.Tensor, rows: int) -> torch.Tensor:
        """The quarters of a matrix: rows 0 to 7, then 8 to 15, in the columns 0 to 7, then 8 to 15."""
        bits = x.view(torch.int16).numpy()
        cut = [bits[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] for j in range(2) for i in range(rows // 8)]
        return torch.stack([fragment(m) for m in cut])

    def in_lanes(m: torch.Tensor) -> torch.Tensor:
        return torch.stack([m[WARP, R + 8 * i, 2 * C + j] for i in range(2) for j in range(2)]).float()

    out, rounded = blank(8, LANES, dtype=torch.float32), blank(4, LANES)
    _products_kernel[(1,)](
        parts(a, 16), parts(b, 8), in_lanes(d).to(DEVICE), out, rounded, BFLOAT=bfloat, LANES=LANES, num_warps=WARPS
    )
    exact, half = (d.double() + a.double()[..., :n] @ b.double().mT[:, :n] for n in (16, 8))
    size = exact.abs().max().item()
    torch.testing.assert_close(out[:4].cpu(), in_lanes(exact), atol=2e-6 * size, rtol=0)
    if not bfloat:
        torch.testing.assert_close(out[4:].cpu(), in_lanes(half), atol=2e-6 * size, rtol=0)
        for got, expected in ((rounded[:2], exact), (rounded[2:], half)):
            pairs = torch.from_numpy(halves_of(got).astype(np.float32)).reshape(2, LANES, 2)
            torch.testing.assert_close(pairs.mT.reshape(4, LANES), in_lanes(expected), atol=3e-3 * size + smallest, rtol=0)


@triton.jit
def _memory_kernel(
    numbers, out, floats, scratch, COUNT: tl.constexpr, RESERVE: tl.constexpr, ALL: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    x = tl.arange(0, LANES)
    room = warp.room(scratch, x, RESERVE, 4096)
    warp.copy_ahead(room + 16 * x, numbers + 16 * x, x < LANES - 1, 16)
    warp.copy_ahead(room + 16 * LANES + 4 * x, numbers + 4 * x, x > 0, 4)
    warp.end_of_copies(x)
    warp.wait_for_copies(x, ALL)
    tl.debug_barrier()
    words = warp.shared_words(room + 16 * x)
    for i in tl.static_range(4):
        tl.store(out + i * LANES + x, words[i])
    tl.store(out + 4 * LANES + x, warp.shared_word(room + 16 * LANES + 4 * x))
    tl.store(out + 5 * LANES + x, warp.shared_halfwords(room + 2 * x, room + 2 * x + 6))
    tl.store(out + 6 * LANES + x, warp.shared_byte(room + x))
    tl.store(out + 7 * LANES + x, warp.signed_byte(numbers + x))
    tl.store(out + 8 * LANES + x, warp.word_of(numbers + 4 * x, x % 2 == 0))
    tl.debug_barrier()
    warp.to_shared(room + 4 * x, x)
    warp.to_shared(room + 4 * LANES + 4 * (x ^ 1), (x * 0.5).to(tl.int32, bitcast=True))
    warp.half_to_shared(room + 8 * LANES + 2 * x, x * 0.25)
    tl.debug_barrier()
    tl.store(out + 9 * LANES + x, warp.shared_word(room + 4 * (x ^ 3)))
    four = warp.shared_words(room + 4 * LANES + 16 * (x % 16))
    for i in tl.static_range(4):
        tl.store(floats + i * LANES + x, four[i].to(tl.float32, bitcast=True))
    tl.store(floats + 4 * LANES + x, warp.exponent(x))
    tl.store(floats + 5 * LANES + x, warp.power_of_two(x - 40.0))
    tl.store(floats + 6 * LANES + x, warp.number_of(numbers + 2 * x, x > 3, tl.bfloat16))
    tl.store(floats + 7 * LANES + x, warp.float_of(numbers + 4 * x, x > 3))
    tl.store(out + 10 * LANES + x, warp.shared_word(room + 8 * LANES + 4 * (x % (LANES // 2))))
    four = warp.words_of(numbers + 16 * x)
    for i in tl.static_range(4):
        tl.store(out + (11 + i) * LANES + x, four[i])
    tl.debug_barrier()
    for i in tl.static_range(4):
        warp.to_shared(room + 16 * x + 4 * i, four[i])
    tl.debug_barrier()
    straight = warp.shared_fragments(room + 16 * x, False)
    across = warp.shared_fragments(room + 16 * x, True)
    for i in tl.static_range(4):
        tl.store(out + (15 + i) * LANES + x, straight[i])
        tl.store(out + (19 + i) * LANES + x, across[i])


def test_memory() -> None:
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(4 * LANES, generator=generator)
    words = given.view(torch.int32)
    out, floats = blank(23, LANES), blank(8, LANES, dtype=torch.float32)
    scratch = blank(4096, dtype=torch.uint8)
    _memory_kernel[(1,)](
        given.view(torch.uint8).to(DEVICE), out, floats, scratch, COUNT=4096, RESERVE=warp.reserve(4096), ALL=warp.all_but(0),
        LANES=LANES, num_warps=WARPS,
    )  # fmt: skip
    out, floats = out.cpu(), floats.cpu()
    x = torch.arange(LANES)
    byte, half = given.view(torch.uint8), given.view(torch.int16)
    assert torch.equal(out[:4, :-1], words.reshape(LANES, 4).T[:, :-1])
    assert torch.equal(out[4, 1:], words[1:LANES])
    assert torch.equal(out[5].view(torch.int16).reshape(LANES, 2), torch.stack((half[x], half[x + 3]), 1))
    assert torch.equal(out[6], byte[x].int())
    assert torch.equal(out[7], given.view(torch.int8)[x].int())
    assert torch.equal(out[8], torch.where(x % 2 == 0, words[x], 0))
    assert torch.equal(out[9], (x ^ 3).int())
    assert torch.equal(floats[:4], ((4 * (x % 16) + torch.arange(4)[:, None]) ^ 1) * 0.5)
    assert torch.equal(floats[4], (x - 128) / 8.0)
    torch.testing.assert_close(floats[5], 2.0 ** (x - 40.0), rtol=1e-6, atol=0)
    assert torch.equal(floats[6], torch.where(x > 3, half[:LANES].view(torch.bfloat16).float(), 0))
    assert torch.equal(floats[7], torch.where(x > 3, given[:LANES], 0))
    assert torch.equal(out[10, : LANES // 2].view(torch.float16).float(), torch.arange(LANES) * 0.25)
    assert torch.equal(out[11:15], words.reshape(LANES, 4).T)
    matrices = half.numpy().reshape(WARPS, 4, 8, 8)
    for m in range(4):
        assert torch.equal(out[15 + m], fragment(matrices[:, m]).cpu())
        assert torch.equal(out[19 + m], fragment(matrices[:, m].transpose(0, 2, 1)).cpu())
