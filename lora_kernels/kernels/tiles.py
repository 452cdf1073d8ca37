"""What every kernel does to a tile: find it, multiply, draw a mask, apply a mask."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl

# The interpreter's dot computes bf16 on the raw bits; there, and only there, operands go through
# fp32, which is exact for the products of bf16 numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Row blocks that walk over the columns side by side (`locate`).
GROUP_M = tl.constexpr(8)


def index_type(tensors: Iterable[Any]) -> Any:
    """The integer for offsets into `tensors`: int64 costs registers, so int32 if that holds all.

    Of each that is not None, shape and stride() are read.
    """
    for t in tensors:
        if t is not None and sum(map(operator.mul, t.shape, t.stride())) >= 1 << 31:
            return tl.int64
    return tl.int32


def divisor(n: int) -> int:
    """What `multiple` is to make known of a rank or a stride: 1, 2, 4 or 8."""
    return math.gcd(n, 8)


@triton.jit
def multiple(value, BY: tl.constexpr):
    """`value`, now known to be a multiple of BY, so that loads along it can be wide.

    Of an argument the compiler sees by itself only whether 16 divides it, and ranks are often 8.
    """
    if BY == 1:
        return value
    else:
        return value // BY * BY


@triton.jit
def pick(values, index):
    """values[index] of a tuple of pointers or sizes, for an index known only at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        if index == i:
            chosen = values[i]
    return chosen


@triton.jit
def of_term(values, segment, term: tl.constexpr, TERMS: tl.constexpr):
    """The segment's own value if each output has one term, else the value of the term."""
    if TERMS == 1:
        return pick(values, segment)
    else:
        return values[term]


@triton.jit
def locate(Ns, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(segment, block_m, block_n) of this program, for outputs [M, Ns[0]], [M, Ns[1]], ...

    Programs that run together share what they read: GROUP_M row blocks walk over the columns side
    by side, so a tile of the weight is read from L2 by all but the first of them.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    segment = 0
    for i in tl.static_range(len(Ns) - 1):
        tiles = blocks_m * tl.cdiv(Ns[i], BLOCK_N)
        past = (segment == i) & (pid >= tiles)
        pid = tl.where(past, pid - tiles, pid)
        segment = tl.where(past, i + 1, segment)
    band = GROUP_M * tl.cdiv(pick(Ns, segment), BLOCK_N)
    first = pid // band * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    return segment, first + pid % band % height, pid % band // height


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in fp32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even (the interpreter's own bf16 cast truncates)."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def draw_keep_bytes(seed, rows, byte_columns, segment, threshold):
    """Packed keep bits [rows, byte_columns]: the mask of (seed, segment) whatever the tile shape.

    Philox 4x32 gives 128 bits a call: eight lanes of 16 bits, one lane an element, one call a
    byte. The counter is (row, byte column, segment), which no offset arithmetic can overflow. Seven
    rounds pass BigCrush (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
    """
    zero = (rows[:, None] * 0 + byte_columns[None, :] * 0).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed,
        zero + rows[:, None].to(tl.uint32),
        zero + byte_columns[None, :].to(tl.uint32),
        zero + segment.to(tl.uint32),
        zero,
        n_rounds=7,
    )
    kept = ((r0 & 0xFFFF) >= threshold).to(tl.int32)
    kept |= ((r0 >> 16) >= threshold).to(tl.int32) << 1
    kept |= ((r1 & 0xFFFF) >= threshold).to(tl.int32) << 2
    kept |= ((r1 >> 16) >= threshold).to(tl.int32) << 3
    kept |= ((r2 & 0xFFFF) >= threshold).to(tl.int32) << 4
    kept |= ((r2 >> 16) >= threshold).to(tl.int32) << 5
    kept |= ((r3 & 0xFFFF) >= threshold).to(tl.int32) << 6
    kept |= ((r3 >> 16) >= threshold).to(tl.int32) << 7
    return kept


@triton.jit
def spread_bits(packed, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Keep flags [ROWS, 8 * BYTES] of the packed bytes [ROWS, BYTES]."""
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, 8 * BYTES)) != 0


@triton.jit
def load_keep(
    mask_ptr, rows, first_column, M, N, stride_mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Keep flags [ROWS, COLUMNS] of a tile from a packed mask in memory; outside it all is kept.

    A byte is loaded once and spread in registers; one load an element would cost as much as a
    step of the K loop.
    """
    columns = first_column // 8 + tl.arange(0, COLUMNS // 8)
    packed = tl.load(
        mask_ptr + rows[:, None] * stride_mask + columns[None, :],
        mask=(rows < M)[:, None] & (columns * 8 < N)[None, :],
        other=0xFF,
    )
    return spread_bits(packed.to(tl.int32), ROWS, COLUMNS // 8)
