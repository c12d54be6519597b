"""How a token's row of codes becomes digits in a warp's registers, for keys and for values.

A digit of so few bits is, as the lowest bits of a number of 16, a subnormal number: a mask makes the operand of a product, and
nothing is converted. Half of a digit's range is taken away by one addition: products of large digits with a rounded basis would
else cancel and leave an error. What a code stands for is the sum of its digits times what the basis is times, less the rest of
the middle of its range; the rests of all codes together are one digit more, a constant.

Keys: lane 4 r + c takes byte c of each word of token r, two words to a register. Values: lane 4 r + c takes halfword r of the
tokens 2 c and 2 c + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from spectral_compile.codec.layout import Tiers
from spectral_compile.kernels.digits import HALFWORDS, row_fields

ONE = 0x0400  # as float16 the number that 1024 is among subnormal ones


class KeySource(NamedTuple):
    """Registers that are made of the same bytes: one of word ``low`` and one of word ``high`` of each lane's token."""

    low: int
    high: int
    bits: int  # of a digit
    masks: tuple[int, ...]  # a register each
    centres: tuple[int, ...]  # what is added to each, two float16; 0 adds nothing
    constant: int  # what is put beside the digits of the only register


class Digit(NamedTuple):
    """One of the digits that a register holds in lane c: which code it belongs to, and how it counts."""

    code: int  # -1 where it belongs to none
    shift: int  # the basis is divided by 2**shift
    middle: float  # of its range, as it stands in the register


def _bits_at(byte: int, tiers: Tiers) -> int:
    """Of the codes in a byte of a row, 0 past the last one."""
    if byte < tiers.bits8:
        return 8
    begin2 = tiers.bits8 + -(-tiers.bits4 // 2)
    if byte < begin2:
        return 4
    return 2 if byte < begin2 + -(-tiers.bits2 // 4) else 0


def _code_at(byte: int, bit: int, tiers: Tiers) -> tuple[int, int]:
    """The code that a bit belongs to, -1 for none, and the bit at which it begins."""
    bits = _bits_at(byte, tiers)
    if bits == 8:
        return byte, 0
    if bits == 4:
        at = (byte - tiers.bits8) * 2 + bit // 4
        return (tiers.bits8 + at if at < tiers.bits4 else -1), bit // 4 * 4
    at = (byte - tiers.bits8 - -(-tiers.bits4 // 2)) * 4 + bit // 2
    return (tiers.bits8 + tiers.bits4 + at if bits and at < tiers.bits2 else -1), bit // 2 * 2


@functools.cache
def key_sources(tiers: Tiers) -> tuple[KeySource, ...]:
    """In the order of their registers, which are eight digits of the operand each."""
    words = tiers.row_bytes // 4
    bits = [min(filter(None, (_bits_at(4 * w + c, tiers) for c in range(4))), default=0) for w in range(words)]
    out, constant = [], False
    for width in (8, 4, 2):
        of_width = [w for w in range(words) if bits[w] == width]
        for low, high in zip(of_width[::2], [*of_width[1::2], None], strict=False):
            out.append(_source(low, high, width))
            constant = constant or bool(out[-1].constant)
    if not constant:
        out.append(KeySource(0, 0, 0, (0,), (0,), ONE << 16))
    return tuple(out)


def _source(low: int, high: int | None, bits: int) -> KeySource:
    digit = (1 << bits) - 1
    if high is not None:
        masks = [(digit | digit << 16) << at for at in range(0, 8, bits)]
    elif bits == 8:
        masks = [digit]  # the other half is free for the constant
    else:  # both halves hold the same byte
        masks = [digit << at | digit << (16 + at + bits) for at in range(0, 8, 2 * bits)]
    centres = []
    for mask in masks:
        centres.append(_centre(mask & 0xFFFF, bits) | _centre(mask >> 16, bits) << 16)
    constant = ONE << 16 if masks == [255] else 0
    return KeySource(low, low if high is None else high, bits, tuple(map(signed, masks)), tuple(map(signed, centres)), constant)


def signed(word: int) -> int:
    """32 bits as the int32 that they are."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _centre(mask: int, bits: int) -> int:
    """The float16 that takes half of the range of a digit away, where there is one."""
    return 0x8000 | (1 << (bits - 1)) << (mask & -mask).bit_length() - 1 if mask else 0


def key_digits(tiers: Tiers) -> Iterator[Digit]:
    """All digits of a key in the order of the operand: of each register lane c's low half, then its high one."""
    for source in key_sources(tiers):
        for mask, centre in zip(source.masks, source.centres, strict=True):
            for c in range(4):
                for i, word in enumerate((source.low, source.high)):
                    half, taken = mask >> 16 * i & 0xFFFF, centre >> 16 * i & 0x7FFF
                    if not half:
                        yield Digit(-1, 0, 0.0)
                        continue
                    at = (half & -half).bit_length() - 1
                    code, begin = _code_at(4 * word + c, at, tiers)
                    yield Digit(code, begin, half / 2 - taken)


@functools.cache
def key_table(tiers: Tiers, device: torch.device) -> torch.Tensor:
    """The digits of a key as a kernel reads them, in the order of the operand: int32 [digits, 4].

    Of each the row of the basis, -1 for none, then as float32 what the row is times and what the constant takes away.
    """
    digits = list(key_digits(tiers))
    table = torch.zeros(len(digits), 4)
    for row, digit in zip(table, digits, strict=True):
        if digit.code >= 0:
            row[1], row[2] = 2.0**-digit.shift, digit.middle
    table = table.view(torch.int32)
    table[:, 0] = torch.tensor([digit.code for digit in digits])
    return table.to(device)


def constant_at(tiers: Tiers) -> int:
    """Of the operand's digits the first that is the constant: lane 0's, in the high half of a register; lane 1's is two on."""
    at = 0
    for source in key_sources(tiers):
        if source.constant:
            return at + 1
        at += 8 * len(source.masks)
    raise AssertionError("one of the registers holds it")


class ValueRegister(NamedTuple):
    shift: int  # to the right
    mask: int
    at: int  # the bit at which the digit stands then


class ValueGroup(NamedTuple):
    """Up to eight halfwords of a token's row: registers in which lane 4 r + c holds a digit of halfword r, or r % ``held``."""

    byte: int  # at which it begins
    live: int  # halfwords; those that follow in the registers are another group's, or no one's
    held: int  # that many and more: 2, 4 or 8
    bits: int  # of a digit that is left for the merge; bytes are two digits of 4 bits in registers
    fields: int  # digits of a halfword that are left for the merge
    registers: tuple[ValueRegister, ...]
    first: int  # of its registers among all
    place: int  # of its first digit among those that are left for the merge
    stride: int  # between a halfword's digits there


@functools.cache
def value_groups(tiers: Tiers) -> tuple[ValueGroup, ...]:
    """In the order of registers. Bytes are two digits of 4 bits: bfloat16 has not eight bits below its exponent."""
    out: list[ValueGroup] = []
    place = 0
    for row_field in row_fields(tiers):
        bits = min(row_field.bits, 4)
        for first in range(0, row_field.held, HALFWORDS):
            left = min(HALFWORDS, row_field.held - first)
            held = HALFWORDS if row_field.bits == 8 else max(2, 1 << (left - 1).bit_length())
            registers = []
            for field in range(0, 16 // bits, HALFWORDS // held):
                bit = bits * field
                shift = bit if bits == 4 else bit // 6 * 6
                mask = ((1 << bits) - 1) * 0x00010001 << bit - shift
                registers.append(ValueRegister(shift, signed(mask), bit - shift))
            byte = 2 * (row_field.first + first)
            count = sum(len(group.registers) for group in out)
            fields = 16 // row_field.bits
            out.append(
                ValueGroup(byte, left, held, row_field.bits, fields, tuple(registers), count, place + first, row_field.padded)
            )
        place += row_field.digits
    return tuple(out)


class LeftRegister(NamedTuple):
    """Digits that a split leaves for the merge: of lane 4 r + c those of query c."""

    register: int
    at: int  # the bit at which they stand in it
    upper_too: bool  # bytes are two registers, of which this is the lower one's
    place: int  # of halfword 0's among what is left
    stride: int  # from one field of a halfword to the next
    held: int  # halfwords
    middle: float  # of the digits' range
    step: int = 1  # from one halfword's place to the next one's


@functools.cache
def left_registers(tiers: Tiers) -> tuple[LeftRegister, ...]:
    out = []
    for group in value_groups(tiers):
        in_bytes = group.bits == 8
        for k in range(0, len(group.registers), 2 if in_bytes else 1):
            field = k // 2 if in_bytes else k * (HALFWORDS // group.held)
            place, middle = group.place + field * group.stride, ((1 << group.bits) - 1) / 2
            at = group.registers[k].at
            out.append(LeftRegister(group.first + k, at, in_bytes, place, group.stride, group.held, middle))
    return tuple(out)


class ValueTable(NamedTuple):
    """The digits of values in the order of registers, eight each."""

    codes: torch.Tensor  # int32: the row of the basis, -1 for none
    places: torch.Tensor  # float32: what the row is times


@functools.cache
def value_table(tiers: Tiers, device: torch.device) -> ValueTable:
    codes, places = [], []
    for group in value_groups(tiers):
        bits = min(group.bits, 4)
        for k in range(len(group.registers)):
            for r in range(HALFWORDS):
                bit = bits * (k * (HALFWORDS // group.held) + r // group.held)
                code, begin = _code_at(group.byte + 2 * (r % group.held) + bit // 8, bit % 8, tiers)
                codes.append(code if r % group.held < group.live else -1)
                places.append(2.0 ** (bit % 8 - begin))
    return ValueTable(torch.tensor(codes, dtype=torch.int32).to(device), torch.tensor(places).to(device))


def value_registers(tiers: Tiers) -> int:
    return sum(len(group.registers) for group in value_groups(tiers))
