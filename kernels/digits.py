"""Rows of codes as digits that tensor cores multiply, and the matrix from digits to channels.

All tiers look alike as digits: a code of 8, 4 or 2 bits is a number to the base 256, 16 or 4, and what it stands for is the sum
of its digits, each less the middle of its range, times its power of the base, in steps.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spectral_compile.codec.layout import Tiers

HALFWORDS = 8  # the fewest of a row field: then a lane's share of an operand is just what that lane has loaded
_PTX = {torch.bfloat16: ("bf16", 7), torch.float16: ("f16", 10)}  # names, and bits of the mantissa
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no instructions
PACKED = {} if INTERPRETED.value else _PTX  # for which there are instructions on two numbers at a time


class RowField(NamedTuple):
    """A run of halfwords of a token's row of codes, which a kernel takes as one operand."""

    first: int  # halfword
    held: int  # halfwords
    padded: int  # halfwords of the operand, a power of two
    bits: int  # of a digit

    @property
    def digits(self) -> int:
        """Extent of the operand."""
        return self.padded * (16 // self.bits)


@functools.cache
def row_fields(tiers: Tiers) -> tuple[RowField, ...]:
    """The fields of a row of codes, none of fewer than ``HALFWORDS``.

    Digits have 2 bits, or 4 where no code of 2 bits stands, in a field of its own where that leaves fewer digits; 8 where all
    codes are bytes.
    """
    wide, row = tiers.bits8 + -(-tiers.bits4 // 2), tiers.row_bytes // 2
    if not tiers.bits2:
        return _fields(0, row, 4 if tiers.bits4 else 8)
    whole = _fields(0, row, 2)
    if wide == 0 or wide % 4:
        return whole
    split = _fields(0, wide // 2, 4) + _fields(wide // 2, row, 2)
    return min(whole, split, key=lambda fields: (sum(field.digits for field in fields), len(fields)))


def _fields(at: int, end: int, bits: int) -> tuple[RowField, ...]:
    fields = []
    while at < end:
        left = end - at
        padded = max(HALFWORDS, triton.next_power_of_2(left))
        if left - padded // 2 <= padded // 4 >= HALFWORDS:
            padded //= 2  # two fields with little padding instead of one with much
        fields.append(RowField(at, min(left, padded), padded, bits))
        at += padded
    return tuple(fields)


@functools.cache
def unpack(dtype: torch.dtype) -> tuple[str, str, str] | None:
    """Instructions that make two halfwords into digits of 2 bits, of 4 and of 8, two to a register, field by field.

    A digit is written into the mantissa of a power of two, where it counts the ones; then the power and the middle of the
    digit's range are taken off. What Triton makes of such arithmetic is several times as long. None where it must do.
    """
    return None if dtype not in PACKED else (_unpack(dtype, 2), _unpack(dtype, 4), _unpack_bytes(dtype))


def _unpack(dtype: torch.dtype, bits: int) -> str:
    kind, mantissa = PACKED[dtype]

    def both(value: float) -> str:
        half = torch.tensor(value, dtype=dtype).view(torch.int16).item() & 0xFFFF
        return f"0x{half:04x}{half:04x}"

    code, shift = [f"{{ .reg .b32 s, x, c, one; mov.b32 one, {both(1.0)};"], None
    for field in range(16 // bits):
        power = 64 >> 2 * (field % 3) if bits == 2 else 16
        one = mantissa - (power.bit_length() - 1)  # the bit of the mantissa that counts ones
        if one - bits * field != shift:
            shift = one - bits * field
            code.append(f"{'shl' if shift >= 0 else 'shr'}.b32 s, ${16 // bits}, {abs(shift)};")
        mask = f"{(1 << bits) - 1 << one:04x}"
        code.append(f"lop3.b32 x, s, 0x{mask}{mask}, {both(power)}, 0xEA;")
        code.append(f"mov.b32 c, {both(-power - ((1 << bits) - 1) / 2)}; fma.rn.{kind}x2 ${field}, x, one, c;")
    return "\n".join([*code, "}"])


def _unpack_bytes(dtype: torch.dtype) -> str:
    """The same; by way of float32 where 16 bits are bfloat16's, which has no 8 bits for a digit beside its power."""
    if dtype == torch.float16:
        code = ["{ .reg .b32 y, h, c, d; mov.b32 h, 0x64646464; mov.b32 c, 0xE480E480; mov.b32 d, 0x38003800;"]
        for field in range(2):  # a byte in the mantissa of 2**10 counts ones; of 1151.5 there is none: -1152 and 0.5
            code.append(f"prmt.b32 y, $2, h, 0x4{2 + field}4{field};")
            code.append(f"add.rn.f16x2 y, y, c; add.rn.f16x2 ${field}, y, d;")
        return "\n".join([*code, "}"])
    code = ["{ .reg .b32 y, h; .reg .f32 a, b; mov.b32 h, 0x00004700;"]
    for field in range(2):  # a byte in the second place of 2**15 counts ones
        for name, byte in (("a", field), ("b", 2 + field)):
            code.append(f"prmt.b32 y, $2, h, 0x54{byte}4; mov.b32 {name}, y; add.f32 {name}, {name}, 0fC7007F80;")
        code.append(f"cvt.rn.{PACKED[dtype][0]}x2.f32 ${field}, b, a;")
    return "\n".join([*code, "}"])


@functools.cache
def scaled(dtype: torch.dtype) -> str | None:
    """Instructions that scale four signed bytes, the same way as ``unpack``; None where Triton's own must do."""
    if dtype not in PACKED:
        return None
    code = ["{ .reg .b32 x, y, h; .reg .f32 a, b, c; xor.b32 x, $2, 0x80808080; mov.b32 h, 0x00004700;"]
    for i in range(2):  # a byte in the second place of 2**15 counts ones; the sign bit stands for 128 of them
        for name, byte in (("a", 2 * i), ("b", 2 * i + 1)):
            code.append(f"prmt.b32 y, x, h, 0x54{byte}4; mov.b32 {name}, y;")
            code.append(f"mul.f32 c, ${3 + byte}, 0fC7008000; fma.rn.f32 {name}, {name}, ${3 + byte}, c;")
        code.append(f"cvt.rn.{PACKED[dtype][0]}x2.f32 ${i}, b, a;")
    return "\n".join([*code, "}"])


@triton.jit
def side_by_side(a, b):
    """[N, K] and [N, K] side by side: [N, 2 * K]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _four(a, b, c, d):
    return side_by_side(side_by_side(a, b), side_by_side(c, d))


@triton.jit
def _field(x, AT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    return (((x >> AT) & ((1 << BITS) - 1)).to(tl.float32) - ((1 << BITS) - 1) * 0.5).to(DTYPE)


@triton.jit
def load(ptr, slots, ok, SIDE: tl.constexpr):
    """The rows of codes of some tokens, one tensor [N, halfwords] a field."""
    out = ()
    for i in tl.static_range(len(SIDE.fields)):
        j = tl.arange(0, SIDE.fields[i].padded)
        held = ok[:, None] & (j < SIDE.fields[i].held)[None, :]
        x = tl.load(ptr + slots[:, None] * SIDE.halfwords + (SIDE.fields[i].first + j)[None, :], mask=held, other=0)
        out = out + (x,)
    return out


@triton.jit
def digits(rows, SIDE: tl.constexpr, DTYPE: tl.constexpr, UNPACK: tl.constexpr):
    """Loaded rows as digits, one tensor [N, digits] a field, lowest fields of all halfwords first."""
    out = ()
    for i in tl.static_range(len(SIDE.fields)):
        x = rows[i]
        if UNPACK is None:
            x = x.to(tl.int32)
            if SIDE.fields[i].bits == 8:
                x = side_by_side(_field(x, 0, 8, DTYPE), _field(x, 8, 8, DTYPE))
            elif SIDE.fields[i].bits == 4:
                x = _four(_field(x, 0, 4, DTYPE), _field(x, 4, 4, DTYPE), _field(x, 8, 4, DTYPE), _field(x, 12, 4, DTYPE))
            else:
                low = _four(_field(x, 0, 2, DTYPE), _field(x, 2, 2, DTYPE), _field(x, 4, 2, DTYPE), _field(x, 6, 2, DTYPE))
                high = _four(_field(x, 8, 2, DTYPE), _field(x, 10, 2, DTYPE), _field(x, 12, 2, DTYPE), _field(x, 14, 2, DTYPE))
                x = side_by_side(low, high)
        elif SIDE.fields[i].bits == 8:
            a, b = tl.inline_asm_elementwise(UNPACK[2], "=r,=r,r", [x], (DTYPE.value,) * 2, True, 2)
            x = side_by_side(a, b)
        elif SIDE.fields[i].bits == 4:
            a, b, c, d = tl.inline_asm_elementwise(UNPACK[1], "=r,=r,=r,=r,r", [x], (DTYPE.value,) * 4, True, 2)
            x = _four(a, b, c, d)
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                UNPACK[0], "=r,=r,=r,=r,=r,=r,=r,=r,r", [x], (DTYPE.value,) * 8, True, 2
            )
            x = side_by_side(_four(a, b, c, d), _four(e, f, g, h))
        out = out + (x,)
    return out


@triton.jit
def as_loaded(tensors):
    """The same tensors; where those of 16 bits came from is hidden from Triton by a move.

    Triton lays out an operand that was joined from others in a way that costs moves. Of an operand that was loaded it computes
    all again in every warp, and waits for each load before it begins the next.
    """
    out = ()
    for i in tl.static_range(len(tensors)):
        x = tensors[i]
        if not INTERPRETED and x.dtype.primitive_bitwidth == 16:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
        out = out + (x,)
    return out


@triton.jit
def digit_rows(basis, affine, channels, live, SIDE: tl.constexpr, i: tl.constexpr):
    """Of field ``i`` the basis' bytes [digits, channels] and what they are times [digits], zero where there is padding."""
    FIELD: tl.constexpr = SIDE.fields[i]
    digit = tl.arange(0, FIELD.padded * (16 // FIELD.bits))
    at, field = digit % FIELD.padded, digit // FIELD.padded
    byte, bit = 2 * (FIELD.first + at) + field * FIELD.bits // 8, field * FIELD.bits % 8
    in8, in4 = byte < SIDE.tiers[0], byte < SIDE.tiers[0] + (SIDE.tiers[1] + 1) // 2
    nibble, crumb = (byte - SIDE.tiers[0]) * 2 + bit // 4, (byte - SIDE.tiers[0] - (SIDE.tiers[1] + 1) // 2) * 4 + bit // 2
    real = (at < FIELD.held) & (in8 | (in4 & (nibble < SIDE.tiers[1])) | (~in4 & (crumb < SIDE.tiers[2])))
    r = tl.where(in8, byte, SIDE.tiers[0] + tl.where(in4, nibble, SIDE.tiers[1] + crumb))
    x = tl.load(basis + r[:, None] * SIDE.width + channels[None, :], mask=real[:, None] & live[None, :], other=0)
    place = tl.exp2(tl.where(in8, bit, tl.where(in4, bit % 4, 0)).to(tl.float32))
    return x, tl.load(affine + r, mask=real, other=0.0) * tl.load(affine + SIDE.rank + r, mask=real, other=0.0) * place


@triton.jit
def matrix(
    basis, affine, channels, live, gain, SIDE: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The matrix from digits to some channels times their weights and ``gain``, one tensor [digits, channels] a field."""
    out = ()
    for i in tl.static_range(len(SIDE.fields)):
        x, scale = digit_rows(basis, affine, channels, live, SIDE, i)
        scale = scale * gain
        if SCALED is None:
            x = (x.to(tl.float32) * scale[:, None]).to(DTYPE)
        else:
            scale = tl.broadcast_to(scale[:, None], x.shape)
            x = tl.inline_asm_elementwise(SCALED, "=r,=r,r,f,f,f,f", [x, scale], DTYPE.value, True, 4)
        out = out + (x,)
    return out
