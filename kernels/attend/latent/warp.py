"""What one warp of a GPU can do in one instruction, as Triton functions of one number a lane.

Triton has no operation for these, and lays out the operands of its own products so that a warp waits for others. Here a tensor
[lanes] is one register of each thread: lane 4 r + c of a warp of 32, with r from 0 to 7 and c from 0 to 3, and one warp after
another. A register of 32 bits holds two numbers of 16 bits, the first in its low half; of a matrix of 8 x 8 such numbers lane
4 r + c holds those of row r in the columns 2 c and 2 c + 1. That is a *fragment*: what products take and give is made of them.

Each function is one instruction, or a few, of PTX (sm_80 and later). In the interpreter it is computed from what NVIDIA's PTX
ISA says of each lane, so that the very kernels run on a CPU; shared memory is then memory like any other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_compile.kernels.digits import INTERPRETED

LANES: tl.constexpr = tl.constexpr(32)
# Triton patches itself again whenever its interpreter enters a function of its own: ten times what these take
function = (lambda of: of) if INTERPRETED.value else triton.jit


@function
def _matrices(x):
    """Fragments [lanes] int32 as matrices [warps, 8, 8] of 16 bits, int32 below 2**16."""
    halves = tl.join(x & 0xFFFF, (x >> 16) & 0xFFFF)
    return tl.reshape(halves, (x.shape[0] // LANES, 8, 8))


@function
def _fragments(m):
    """Matrices [warps, 8, 8] of 16 bits as fragments."""
    low, high = tl.split(tl.reshape(m, (m.shape[0] * LANES, 2)))
    return (low & 0xFFFF) | (high << 16)


@function
def _of_half(bits):
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@function
def _of_bfloat(bits):
    return ((bits & 0xFFFF) << 16).to(tl.float32, bitcast=True)


@function
def _as_half(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@function
def _as_bfloat(x):
    """Rounded to the nearest, to an even one of two; of what is finite."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@function
def permuted(a, b, selector):
    """Four bytes: of the eight of ``a`` and ``b``, lowest first, those that the four lowest hexadecimal digits say."""
    if INTERPRETED:
        out = a * 0
        for i in tl.static_range(4):
            at = (selector >> (4 * i)) & 7
            out = out | (((tl.where(at < 4, a, b) >> (8 * (at % 4))) & 0xFF) << (8 * i))
        return out
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.int32, True, 1)


@function
def halves(low, high):
    """Two numbers of float32 as float16."""
    if INTERPRETED:
        return _as_half(low) | (_as_half(high) << 16)
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)


@function
def bfloats(low, high):
    """Two numbers of float32 as bfloat16."""
    if INTERPRETED:
        return _as_bfloat(low) | (_as_bfloat(high) << 16)
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)


@function
def power_of_two(x):
    """2**x; 0 of minus infinity."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@function
def exponent(code):
    """The power of two that a token's values are times, of its code from 0 to 255: (code - 128) / 8."""
    if INTERPRETED:
        return (code - 128).to(tl.float32) * 0.125
    # the code in the mantissa of 2**23 counts ones
    return tl.inline_asm_elementwise(
        "{ .reg .b32 b; .reg .f32 x; or.b32 b, $1, 0x4b000000; mov.b32 x, b; fma.rn.f32 $0, x, 0f3E000000, 0fC9800080; }",
        "=f,r", [code], tl.float32, True, 1,
    )  # fmt: skip


@function
def plus(a, b):
    """Sums of two pairs of float16."""
    if INTERPRETED:
        low, high = _of_half(a) + _of_half(b), _of_half(a >> 16) + _of_half(b >> 16)
        return _as_half(low) | (_as_half(high) << 16)
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@function
def _turned_half(a, b, cos, sin):
    a, b, cos, sin = _of_half(a), _of_half(b), _of_half(cos), _of_half(sin)
    return _as_half(a * cos + _of_half(_as_half(b * sin))), _as_half(b * cos - _of_half(_as_half(a * sin)))


@function
def turned(a, b, cos, sin):
    """a cos + b sin and b cos - a sin, of two pairs of float16 at a time: (a, b) turned back by an angle."""
    if INTERPRETED:
        low = _turned_half(a, b, cos, sin)
        high = _turned_half(a >> 16, b >> 16, cos >> 16, sin >> 16)
        return low[0] | (high[0] << 16), low[1] | (high[1] << 16)
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t; mul.rn.f16x2 t, $3, $5; fma.rn.f16x2 $0, $2, $4, t;
        mul.rn.f16x2 t, $2, $5; neg.f16x2 t, t; fma.rn.f16x2 $1, $3, $4, t; }""",
        "=&r,=&r,r,r,r,r", [a, b, cos, sin], (tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@function
def transposed(x):
    """A fragment of the transposed matrix."""
    if INTERPRETED:
        return _fragments(tl.permute(_matrices(x), (0, 2, 1)))
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], tl.int32, True, 1
    )  # fmt: skip


@function
def _sums(a0, a1, a2, a3, b0, b1, BFLOAT: tl.constexpr):
    """Of a product of [16, 16] and [16, 8], for each lane: row r of the columns 2 c and 2 c + 1, then row r + 8 of them."""
    WARPS: tl.constexpr = a0.shape[0] // LANES
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # [lanes, half of the columns, half of the rows]
    b = tl.join(b0, b1)
    a, b = tl.join(a, a >> 16), tl.join(b, b >> 16)
    a, b = (_of_bfloat(a), _of_bfloat(b)) if BFLOAT else (_of_half(a), _of_half(b))
    a = tl.reshape(tl.permute(tl.reshape(a, (WARPS, 8, 4, 2, 2, 2)), (0, 4, 1, 3, 2, 5)), (WARPS, 16, 16))
    b = tl.reshape(tl.permute(tl.reshape(b, (WARPS, 8, 4, 2, 2)), (0, 3, 2, 4, 1)), (WARPS, 16, 8))
    d = tl.permute(tl.reshape(tl.dot(a, b), (WARPS, 2, 8, 4, 2)), (0, 2, 3, 4, 1))
    upper, lower = tl.split(tl.reshape(d, (WARPS * LANES, 2, 2)))
    d0, d1 = tl.split(upper)
    d2, d3 = tl.split(lower)
    return d0, d1, d2, d3


@function
def product(d, a0, a1, a2, a3, b0, b1, BFLOAT: tl.constexpr):
    """``d`` plus [16, 16] x [16, 8] in float32.

    ``a`` are fragments of its rows 0 to 7, then 8 to 15, in the columns 0 to 7, then 8 to 15; ``b`` of the second matrix
    transposed, [8, 8] each. A lane holds of the result row r, then row r + 8, in the columns 2 c and 2 c + 1.
    """
    if INTERPRETED:
        e = _sums(a0, a1, a2, a3, b0, b1, BFLOAT)
        return d[0] + e[0], d[1] + e[1], d[2] + e[2], d[3] + e[3]
    if BFLOAT:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, d[0], d[1], d[2], d[3]], (tl.float32,) * 4, True, 1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, d[0], d[1], d[2], d[3]], (tl.float32,) * 4, True, 1,
    )  # fmt: skip


@function
def half_product(d, a0, a1, b0):
    """``d`` plus [16, 8] x [8, 8] of float16, in float32."""
    if INTERPRETED:
        zero = a0 * 0
        e = _sums(a0, a1, zero, zero, b0, zero, False)
        return d[0] + e[0], d[1] + e[1], d[2] + e[2], d[3] + e[3]
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0,$1,$2,$3},{$4,$5},{$6},{$7,$8,$9,$10};",
        "=f,=f,=f,=f,r,r,r,f,f,f,f", [a0, a1, b0, d[0], d[1], d[2], d[3]], (tl.float32,) * 4, True, 1,
    )  # fmt: skip


@function
def _rounded(d, e):
    """Two fragments of float16 plus what four registers of float32 hold."""
    upper, lower = _of_half(d[0]) + e[0], _of_half(d[1]) + e[2]
    return halves(upper, _of_half(d[0] >> 16) + e[1]), halves(lower, _of_half(d[1] >> 16) + e[3])


@function
def rounded_product(d, a0, a1, a2, a3, b0, b1):
    """``d`` plus [16, 16] x [16, 8] in float16: two fragments, of rows 0 to 7 and 8 to 15."""
    if INTERPRETED:
        return _rounded(d, _sums(a0, a1, a2, a3, b0, b1, False))
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {$0,$1},{$2,$3,$4,$5},{$6,$7},{$8,$9};",
        "=r,=r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, d[0], d[1]], (tl.int32,) * 2, True, 1,
    )  # fmt: skip


@function
def rounded_half_product(d, a0, a1, b0):
    """``d`` plus [16, 8] x [8, 8] in float16."""
    if INTERPRETED:
        zero = a0 * 0
        return _rounded(d, _sums(a0, a1, zero, zero, b0, zero, False))
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {$0,$1},{$2,$3},{$4},{$5,$6};",
        "=r,=r,r,r,r,r,r", [a0, a1, b0, d[0], d[1]], (tl.int32,) * 2, True, 1,
    )  # fmt: skip


@function
def room(scratch, x, RESERVE: tl.constexpr, BYTES: tl.constexpr):
    """Where the program's own shared memory begins, in each lane; in the interpreter its ``BYTES`` of ``scratch``."""
    if INTERPRETED:
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        return scratch + (program * BYTES + x * 0)
    return tl.inline_asm_elementwise(RESERVE, "=r,r", [x], tl.int32, False, 1)


def reserve(count: int) -> str:
    """The instructions by which ``room`` reserves ``count`` bytes."""
    return f"{{ .shared .align 128 .b8 spectral_room[{count}]; mov.u32 $0, spectral_room; }}"


@function
def _at(address, DTYPE: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE))


@function
def shared_word(address):
    """32 bits of shared memory."""
    if INTERPRETED:
        return tl.load(_at(address, tl.int32))
    return tl.inline_asm_elementwise("ld.shared.u32 $0, [$1];", "=r,r", [address], tl.int32, False, 1)


@function
def _four(address):
    at = _at(address, tl.int32)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@function
def shared_words(address):
    """Four times 32 bits of shared memory."""
    if INTERPRETED:
        return _four(address)
    return tl.inline_asm_elementwise(
        "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,r", [address], (tl.int32,) * 4, False, 1
    )  # fmt: skip


@function
def shared_fragments(address, TRANSPOSED: tl.constexpr):
    """Four fragments from shared memory: lanes 8 m to 8 m + 7 say where the rows of matrix m begin, 16 bytes each."""
    if INTERPRETED:
        ALL: tl.constexpr = address.shape[0]
        rows = tl.load(_at(address, tl.int16)[:, None] + tl.arange(0, 8)[None, :]).to(tl.int32) & 0xFFFF
        m = tl.reshape(rows, (ALL // LANES, 2, 2, 8, 8))  # [warps, matrix by twos, row, column]
        m = tl.permute(m, (0, 4, 3, 2, 1)) if TRANSPOSED else tl.permute(m, (0, 3, 4, 2, 1))
        low, high = tl.split(tl.permute(tl.reshape(m, (ALL, 2, 2, 2)), (0, 2, 3, 1)))
        even, odd = tl.split(tl.permute(low | (high << 16), (0, 2, 1)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    if TRANSPOSED:
        return tl.inline_asm_elementwise(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
            "=r,=r,=r,=r,r", [address], (tl.int32,) * 4, False, 1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r", [address], (tl.int32,) * 4, False, 1,
    )  # fmt: skip


@function
def shared_halfwords(first, second):
    """16 bits of shared memory from each of two places, in one register."""
    if INTERPRETED:
        low, high = tl.load(_at(first, tl.int16)).to(tl.int32), tl.load(_at(second, tl.int16)).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)
    return tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; ld.shared.b16 a, [$1]; ld.shared.b16 b, [$2]; mov.b32 $0, {a, b}; }",
        "=r,r,r", [first, second], tl.int32, False, 1,
    )  # fmt: skip


@function
def shared_byte(address):
    """A byte of shared memory."""
    if INTERPRETED:
        return tl.load(_at(address, tl.uint8)).to(tl.int32)
    return tl.inline_asm_elementwise("ld.shared.u8 $0, [$1];", "=r,r", [address], tl.int32, False, 1)


@function
def to_shared(address, word, live=None):
    """Write 32 bits to shared memory, where ``live``."""
    if INTERPRETED:
        tl.store(_at(address, tl.int32), word, mask=live)
    elif live is None:
        tl.inline_asm_elementwise("st.shared.b32 [$1], $2; mov.b32 $0, $2;", "=r,r,r", [address, word], tl.int32, False, 1)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, $2; }",
            "=r,r,r,r", [address, word, live.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@function
def half_to_shared(address, x, live=None):
    """Write one float32 to shared memory as float16, where ``live``."""
    if INTERPRETED:
        tl.store(_at(address, tl.float16), x.to(tl.float16), mask=live)
    elif live is not None:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $3, 0; cvt.rn.f16.f32 h, $2;"
            " @p st.shared.b16 [$1], h; mov.f32 $0, $2; }",
            "=f,r,f,r", [address, x, live.to(tl.int32)], tl.float32, False, 1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .b16 h; cvt.rn.f16.f32 h, $2; st.shared.b16 [$1], h; mov.f32 $0, $2; }",
            "=f,r,f", [address, x], tl.float32, False, 1,
        )  # fmt: skip


@function
def copy_ahead(address, pointer, wanted, BYTES: tl.constexpr):
    """Begin to copy 16 or 4 bytes of global memory to shared memory where ``wanted``; both lie at multiples of as many."""
    if INTERPRETED:
        # a GPU stops at one that does not; here it reads from the multiple before, which no test takes for right
        pointer = pointer - pointer.to(tl.int64) % BYTES
        for i in tl.static_range(BYTES // 4):
            x = tl.load(_at(pointer, tl.int32) + i, mask=wanted, other=0)
            tl.store(_at(address, tl.int32) + i, x, mask=wanted)
    elif BYTES == 16:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.cg.shared.global [$1], [$2], 16; mov.b32 $0, $1; }",
            "=r,r,l,r", [address, pointer.to(tl.int64), wanted.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.ca.shared.global [$1], [$2], 4; mov.b32 $0, $1; }",
            "=r,r,l,r", [address, pointer.to(tl.int64), wanted.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@function
def end_of_copies(x):
    """What has been begun to copy since the last time is one batch."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("cp.async.commit_group; mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)


@function
def wait_for_copies(x, LATER: tl.constexpr):
    """Wait until all lanes' batches but the last ones are there, as ``LATER``, of ``all_but``, says."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(LATER, "=r,r", [x], tl.int32, False, 1)


def all_but(batches: int) -> str:
    """The instructions by which ``wait_for_copies`` waits for all but the last ``batches``."""
    return f"cp.async.wait_group {batches}; bar.warp.sync 0xffffffff; mov.b32 $0, $1;"


ALL: tl.constexpr = tl.constexpr(all_but(0))


@function
def lanes_meet(x):
    """What the lanes of a warp have written to shared memory is there for its other lanes."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)


@function
def words_of(pointer):
    """Four times 32 bits of global memory, from a multiple of 16 bytes that nobody writes meanwhile."""
    if INTERPRETED:
        return _four(pointer)
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l", [pointer.to(tl.int64)], (tl.int32,) * 4, False, 1
    )  # fmt: skip


@function
def word_of(pointer, wanted):
    """32 bits of global memory that nobody writes meanwhile, as int32; 0 where they are not ``wanted``.

    What Triton knows to be a load it compares with all others to lay them out: of hundreds that took half a minute.
    """
    if INTERPRETED:
        return tl.load(_at(pointer, tl.int32), mask=wanted, other=0)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
        "=&r,l,r", [pointer.to(tl.int64), wanted.to(tl.int32)], tl.int32, False, 1,
    )  # fmt: skip


@function
def float_of(pointer, wanted):
    """A float32, likewise."""
    return word_of(pointer, wanted).to(tl.float32, bitcast=True)


@function
def number_of(pointer, wanted, DTYPE: tl.constexpr):
    """A number of 16 bits as float32, likewise; 0 where it is not ``wanted``."""
    if INTERPRETED:
        bits = tl.load(_at(pointer, tl.int16), mask=wanted, other=0)
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, 0; @p ld.global.nc.b16 $0, [$1]; }",
            "=&h,l,r", [pointer.to(tl.int64), wanted.to(tl.int32)], tl.int16, False, 1,
        )  # fmt: skip
    return bits.to(DTYPE, bitcast=True).to(tl.float32)


@function
def signed_byte(pointer):
    """A signed byte as int32, likewise."""
    if INTERPRETED:
        return tl.load(_at(pointer, tl.int8)).to(tl.int32)
    return tl.inline_asm_elementwise("ld.global.nc.s8 $0, [$1];", "=r,l", [pointer.to(tl.int64)], tl.int32, False, 1)
