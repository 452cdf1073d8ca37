"""A tile of a weight that lies in memory as NF4 (`algebra.nf4`).

A tile is read as bytes, a quarter of what it has in half precision, and becomes numbers in
registers. The 16 numbers of the code are looked up by `tl.gather`, which keeps them in shared
memory: a load of global memory for each weight would be copied and awaited like an operand, and a
tree of selections takes fifteen instructions a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import cast, multiple


@triton.jit
def load_weight(
    tile_ptrs, inside, w_ptrs, columns, ks, N, K, first_column, first_k,
    NF4: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The tile w^T [BLOCK_K, BLOCK_N] of a product's w [N, K]; outside are zeros.

    A plain w is read by `tile_ptrs`. `w_ptrs` are those of an NF4, [N, K] or, with ACROSS, [K, N]:
    as gradient of x the product's sum runs over the rows of the weight.
    """
    if not NF4:
        return tl.load(tile_ptrs, mask=inside, other=0.0)
    elif ACROSS:
        return _rows(w_ptrs, ks, K, first_column, N, BLOCK_K, BLOCK_N, dtype)
    else:
        return _rows(w_ptrs, columns, N, first_k, K, BLOCK_N, BLOCK_K, dtype).T


@triton.jit
def _rows(
    w_ptrs, rows, height, first, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights [ROWS, COLUMNS] of `rows`, from column `first` on, of an NF4 [height, width].

    `width` is a multiple of 64, and `first` one of COLUMNS.
    """
    width = multiple(width, 64)
    columns = first // 2 + tl.arange(0, COLUMNS // 2)  # of bytes
    packed = tl.load(
        w_ptrs[0] + rows[:, None] * (width // 2) + columns[None, :],
        mask=(rows < height)[:, None] & (columns < width // 2)[None, :],
        other=0,
    ).to(tl.int32)
    BLOCKS: tl.constexpr = max(COLUMNS // 64, 1)
    blocks = first // 64 + tl.arange(0, BLOCKS)
    absmax = tl.load(
        w_ptrs[1] + rows[:, None] * (width // 64) + blocks[None, :],
        mask=(rows < height)[:, None] & (blocks < width // 64)[None, :],
        other=0.0,
    )
    code = tl.load(w_ptrs[2] + tl.arange(0, 16))
    nibbles = tl.reshape(tl.join(packed >> 4, packed & 15), (ROWS * COLUMNS,))
    values = tl.reshape(tl.gather(code, nibbles, 0), (ROWS, BLOCKS, COLUMNS // BLOCKS))
    return cast(tl.reshape(values * absmax[:, :, None], (ROWS, COLUMNS)), dtype)
