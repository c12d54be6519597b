"""What coded and recent tokens share: which of them are seen, digits of values times weights, and whose they are."""

from __future__ import annotations

import triton.language as tl

from spectral_compile.kernels.attend.latent import warp

# powers of two that scores may be above, or below, their reference: a million tokens' weights are finite, of any size
FAR: tl.constexpr = tl.constexpr(40.0)
UP: tl.constexpr = tl.constexpr(64.0)  # powers of two by which weights are larger than they count: digits are subnormal


@warp.function
def repeated(x, COUNT: tl.constexpr):
    """The same number so many times."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (x,)
    return out


@warp.function
def row_of(u, head, G: tl.constexpr):
    """Which (query, head) pair of its group the u-th query of a KV head is, counted over the columns."""
    return u // G.query_heads * (G.heads * G.query_heads) + head * G.query_heads + u % G.query_heads


@warp.function
def seen_of(seen, slot, end, own, column, b, n, slots, masks, G: tl.constexpr, F: tl.constexpr):
    """``seen``, less what a window, the caller or a mask hides of the tokens in these slots, which are before ``end``."""
    if F.slides:
        seen = seen & (G.first_exact + slot > own - masks.sliding_window)
    if masks.visible is not None:
        shown = masks.visible + b * slots + G.first_exact
        seen = seen & (tl.load(shown + tl.minimum(slot, end - 1)) != 0)
    if masks.mask is not None:
        asked = masks.mask + (b * n + column) * masks.mask_slots + G.first_exact
        seen = seen & (tl.load(asked + slot, mask=seen, other=0) != 0)
    return seen


@warp.function
def parts_of(weight):
    """Weights as products take them: their upper 8 bits and the next ones, transposed."""
    upper = (weight.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return warp.transposed(warp.bfloats(upper, weight - upper))


@warp.function
def mixed(first, r, ROW: tl.constexpr, weights, sums, SIGNED: tl.constexpr, L: tl.constexpr):
    """``sums`` plus digits of the values of sixteen tokens times their weights.

    ``first`` is where in shared memory the token 2 c of these begins, in rows of ROW bytes. Signed bytes count from -128 on.
    """
    N: tl.constexpr = L.value_registers
    lower, upper = (), ()
    for i in tl.static_range(len(L.groups)):
        at = first + (L.groups[i].byte + 2 * (r % L.groups[i].held))
        x = warp.shared_halfwords(at, at + ROW)
        y = warp.shared_halfwords(at + 8 * ROW, at + 9 * ROW)
        if SIGNED:
            x, y = x ^ -2139062144, y ^ -2139062144  # 0x80808080
        if L.groups[i].held < 8:
            own = (4 if L.groups[i].bits > 2 else 2) * (r // L.groups[i].held)
            x, y = x >> own, y >> own
        for k in tl.static_range(len(L.groups[i].registers)):
            lower = lower + ((x >> L.groups[i].registers[k].shift) & L.groups[i].registers[k].mask,)
            upper = upper + ((y >> L.groups[i].registers[k].shift) & L.groups[i].registers[k].mask,)
    out = ()
    for m in tl.static_range((N + 1) // 2):
        d = (sums[4 * m], sums[4 * m + 1], sums[4 * m + 2], sums[4 * m + 3])
        if 2 * m + 1 < N:
            a1, a3 = lower[2 * m + 1], upper[2 * m + 1]
        else:
            a1, a3 = r * 0, r * 0
        out = out + warp.product(d, lower[2 * m], a1, upper[2 * m], a3, weights[0], weights[1], True)
    return out
