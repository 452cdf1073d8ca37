"""What the kernels share: helpers that find a tile, multiply tiles, draw a mask and read one.

A kernel runs as a grid of programs, each of which computes one tile of the output. A tile is a
value in registers; its addresses are a pointer plus a block of offsets, made with `tl.arange`. The
sides of a tile are powers of two, so it may reach past the edge of its tensor: every load and store
is masked by what lies inside.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl

# Triton's interpreter multiplies bf16 tiles as if their bits were integers. There, and only there,
# operands are made fp32 first, in which the products of bf16 numbers are exact.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# How many blocks of rows walk over the blocks of columns side by side (`locate`).
GROUP_M = tl.constexpr(8)


def index_type(tensors: Iterable[Any]) -> Any:
    """The integer type of offsets into `tensors`: int32 if it holds them all, else int64.

    int64 costs registers. `tensors` are tensors, `Out`s (shape and stride() are read) or None.
    """
    for t in tensors:
        if t is not None and sum(map(operator.mul, t.shape, t.stride())) >= 1 << 31:
            return tl.int64
    return tl.int32


def divisor(n: int) -> int:
    """The largest of 1, 2, 4 and 8 that divides n: what `multiple` tells the compiler of n."""
    return math.gcd(n, 8)


@triton.jit
def multiple(value, BY: tl.constexpr):
    """`value`, which the compiler then knows to be a multiple of BY: loads along it can be wide.

    By itself Triton notes of an integer argument only whether 16 divides it, and ranks are often 8.
    Dividing and multiplying changes no value, but the compiler's analysis follows it: a product
    with BY is a multiple of BY. `tl.multiple_of` on a number does not do it: in low_rank_gemm at
    R = 8 on sm_86 (Triton 3.7.1) a thread then makes 16 loads of 2 bytes instead of 2 of 16.
    """
    if BY == 1:
        return value
    else:
        return value // BY * BY


@triton.jit
def pick(values, index):
    """values[index] of a tuple of pointers or sizes, for an index known only at run time.

    A tuple exists only while the kernel is compiled; what is left of it is a comparison an entry.
    """
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        if index == i:
            chosen = values[i]
    return chosen


@triton.jit
def of_term(values, segment, term: tl.constexpr, TERMS: tl.constexpr):
    """The value of the segment where each output is one term, else the value of the term.

    Forward, each segment has an output of its own (TERMS is 1). As the gradient of x, one output is
    the sum of a term for each segment.
    """
    if TERMS == 1:
        return pick(values, segment)
    else:
        return values[term]


@triton.jit
def run_of(pack_ptrs, run, length, M, R, PACKED: tl.constexpr, R_BY: tl.constexpr):
    """(first row, end, adapter, its first row, its rank) of a run of rows.

    Without a pack a run is `length` rows, and the end is that of all rows, M: one number less to
    keep. With a pack, tables say whose rows it has and where they end (`packs.py`).
    """
    if PACKED:
        at = pack_ptrs[0] + run * 4
        adapter = tl.load(at)
        rank = multiple(tl.load(pack_ptrs[1] + adapter), R_BY)
        return tl.load(at + 1), tl.load(at + 2), adapter, tl.load(at + 3), rank
    else:
        return run * length, M, 0, 0, R


@triton.jit
def own(value, pack_ptrs, TABLE: tl.constexpr, adapter, PACKED: tl.constexpr):
    """A number of the adapter's own, from a table of the pack; without a pack, `value`."""
    if PACKED:
        return tl.load(pack_ptrs[TABLE] + adapter)
    else:
        return value


@triton.jit
def placed(ptr, pack_ptrs, TABLE: tl.constexpr, place, BY: tl.constexpr, PACKED: tl.constexpr):
    """Where the adapter's own tensor lies, for a `ptr` to the first adapter's."""
    if PACKED:
        return ptr + multiple(tl.load(pack_ptrs[TABLE] + place), BY)
    else:
        return ptr


@triton.jit
def blocks_of_rows(Ns, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr):
    """How many blocks of rows there are, in a grid that `locate` reads."""
    if PACKED:
        blocks_n = tl.cdiv(Ns[0], BLOCK_N)
        for i in tl.static_range(1, len(Ns)):
            blocks_n += tl.cdiv(Ns[i], BLOCK_N)
        return tl.num_programs(0) // blocks_n
    else:
        return tl.cdiv(M, BLOCK_M)


@triton.jit
def locate(Ns, blocks_m, BLOCK_N: tl.constexpr):
    """(segment, block_m, block_n): which tile of the outputs [M, Ns[0]], [M, Ns[1]], ... is ours.

    M is `blocks_m` blocks of rows.

    The grid is one long axis: the tiles of segment 0, then those of segment 1, and so on. Programs
    with neighbouring ids run at the same time, so they are given tiles that share what they read:
    GROUP_M blocks of rows walk over the blocks of columns side by side. All but the first of them
    then find their tile of the weight in the L2 cache. (Triton's matrix multiplication tutorial.)

        pid, for GROUP_M = 2 and a segment of 4 x 3 tiles:    0 2 4
                                                              1 3 5
                                                              6 8 10
                                                              7 9 11
    """
    pid = tl.program_id(0)
    # Go from segment to segment, taking the tiles of each off pid while pid lies past them.
    segment = 0
    for i in tl.static_range(len(Ns) - 1):
        tiles = blocks_m * tl.cdiv(Ns[i], BLOCK_N)
        past = (segment == i) & (pid >= tiles)
        pid = tl.where(past, pid - tiles, pid)
        segment = tl.where(past, i + 1, segment)
    # A band is GROUP_M blocks of rows over all columns; the last band of a segment may be lower.
    band = GROUP_M * tl.cdiv(pick(Ns, segment), BLOCK_N)
    first = pid // band * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    return segment, first + pid % band % height, pid % band // height


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32; PRECISION says how tensor cores take fp32 operands ("ieee", "tf32")."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rank_dot(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b in fp32, for a product in which R is one of the sides; `dtype` is that of x and dy.

    The operands are multiplied in `dtype`. But where that is fp16 and one of them has more range
    (an adapter, h or dh), both are multiplied in fp32, by tensor cores as TF32: it holds fp16
    numbers exactly, and fp32 ones with their range and the eleven significant bits of fp16.
    """
    if dtype == tl.float16 and (a.dtype != tl.float16 or b.dtype != tl.float16):
        return dot(wide(a, PRECISION), wide(b, PRECISION), acc, PRECISION)
    else:
        return dot(cast(a, dtype), cast(b, dtype), acc, PRECISION)


@triton.jit
def wide(x, PRECISION: tl.constexpr):
    """x in fp32, rounded to what TF32 holds if PRECISION is "tf32".

    Tensor cores cut the lower 13 bits off, which makes every number smaller, by up to 0.1 %. So
    half of the last bit kept is added first; not to NaN, some of which would become 0.
    """
    if x.dtype == tl.float16 or PRECISION != "tf32":
        return cast(x, tl.float32)
    else:
        x = cast(x, tl.float32)
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even; an fp64 x is rounded to fp32 first."""
    if x.dtype == tl.float64 and dtype != tl.float64:
        x = x.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # The interpreter's own cast truncates: add just under half of the last kept bit, and that
        # bit itself, which sends ties to even.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def draw_keep(seed, rows, byte_columns, segment, threshold):
    """The mask that (seed, segment) stands for: eight flags [rows, byte_columns], one a bit.

    Flag j of byte column q says whether element 8 q + j is kept (`pack`, `interleave`).

    Philox 4x32 turns a counter of four 32-bit numbers into four random ones, 128 bits: eight times
    16 bits, one for each of the eight elements of a byte. An element is kept where its 16 bits are
    `threshold` or more. The counter is (row, byte column, segment, 0): a byte is the same in a tile
    of any shape, and no product of sizes is computed that could overflow.

    Seven rounds pass BigCrush (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
    """
    # Zeros of the shape of the tile: philox wants all four of its counters in that shape.
    zero = (rows[:, None] * 0 + byte_columns[None, :] * 0).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed,
        zero + rows[:, None].to(tl.uint32),
        zero + byte_columns[None, :].to(tl.uint32),
        zero + segment.to(tl.uint32),
        zero,
        n_rounds=7,
    )
    # A half of r is compared where it lies highest: what is below it decides nothing, because the
    # lower half of `least` is zero. That is one instruction less than to cut the half out.
    least = threshold.to(tl.uint32) << 16
    low, high = (r0 << 16, r1 << 16, r2 << 16, r3 << 16), (r0, r1, r2, r3)
    return (
        low[0] >= least, high[0] >= least, low[1] >= least, high[1] >= least,
        low[2] >= least, high[2] >= least, low[3] >= least, high[3] >= least,
    )  # fmt: skip


@triton.jit
def pack(flags):
    """The byte of eight flags, flag j in bit j."""
    packed = flags[0].to(tl.int32)
    for j in tl.static_range(1, 8):
        packed |= flags[j].to(tl.int32) << j
    return packed


@triton.jit
def interleave(flags, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Keep flags [ROWS, 8 * BYTES] of eight times [ROWS, BYTES]: column 8 q + j is flag j of q.

    Each `join` adds a last axis of two: after three of them element [q, a, b, c] is flag
    4 a + 2 b + c. A thread holds the eight elements of a byte before and after, so no number moves.
    """
    even = tl.join(tl.join(flags[0], flags[4]), tl.join(flags[2], flags[6]))
    odd = tl.join(tl.join(flags[1], flags[5]), tl.join(flags[3], flags[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, 8 * BYTES))


@triton.jit
def spread_bits(packed, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Keep flags [ROWS, 8 * BYTES] of the packed bytes [ROWS, BYTES]."""
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, 8 * BYTES)) != 0


@triton.jit
def load_keep(
    mask_ptr, rows, first_column, M, stride_mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Keep flags [ROWS, COLUMNS] of a tile, from a packed mask [M, stride_mask] in memory.

    Bytes outside of the mask are not loaded: there every element counts as kept. A byte is loaded
    once and spread in registers; a load for each element would cost as much as a step of the K
    loop. The mask's own width bounds its columns: of that number the compiler knows what divides
    it, so it sees that neighbouring bytes are inside together, and loads them together.
    """
    columns = first_column // 8 + tl.arange(0, COLUMNS // 8)
    packed = tl.load(
        mask_ptr + rows[:, None] * stride_mask + columns[None, :],
        mask=(rows < M)[:, None] & (columns < stride_mask)[None, :],
        other=0xFF,
    )
    return spread_bits(packed.to(tl.int32), ROWS, COLUMNS // 8)
