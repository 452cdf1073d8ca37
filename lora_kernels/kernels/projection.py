"""h = D(x) A^T for every segment of a group, and the packed dropout masks on the way.

    x [M, K]   A_g [R, K]   h [G, M, R], or parts of it [S, G, M, R]   mask [G, M, K / 8] bytes

A segment is one layer of the group, with its own A_g and its own mask. A program owns BLOCK_M rows
of one segment and walks over K once. The programs of the G segments of the same rows follow one
another, so the first reads x from memory and the others find it in the L2 cache.

Few rows make few programs, which leave most of a large card idle. Then K is divided into S ranges,
and a program walks over one of them: its h is a part of a sum over K, in fp32. The next launch adds
the parts as it loads them, always in the same order (`low_rank.py`).

The random numbers of a mask are drawn once, here: the later kernels read its bits, which take 1/16
of the bytes of a half-precision x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import masks
from ..algebra.operands import rank_dtype
from ..hardware.tiles import Tile, rank_block
from .launch import launch
from .packs import Packed, Shared, Tables, project_tables
from .plan import Out, Plan, planned
from .tiles import (
    cast,
    divisor,
    draw_keep,
    index_type,
    interleave,
    multiple,
    own,
    pack,
    pick,
    placed,
    rank_dot,
    run_of,
)


@triton.jit(do_not_specialize=["M", "threshold", "steps"])
def _project(
    x_ptr, A_ptrs, seed_ptr, pack_ptrs, h_ptr, mask_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_mask,
    scale, threshold, steps,
    PACKED: tl.constexpr, INDEX: tl.constexpr, DRAW: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, R_BY: tl.constexpr, AT_BY: tl.constexpr, MASK_BY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    R, stride_mask = multiple(R, R_BY), multiple(stride_mask, MASK_BY)
    # The grid's first axis has G * ceil(M / BLOCK_M) programs; the segment changes fastest. Its
    # second axis has the S parts, each of which makes `steps` steps of BLOCK_K along K.
    segment = tl.program_id(0) % len(A_ptrs)
    A_ptr = pick(A_ptrs, segment)
    block_m = tl.program_id(0) // len(A_ptrs)
    first_row, last_row, adapter, edge, own_rank = run_of(
        pack_ptrs, block_m, BLOCK_M, M, R, PACKED, R_BY
    )
    A_ptr = placed(A_ptr, pack_ptrs, 2, adapter * len(A_ptrs) + segment, AT_BY, PACKED)
    scale = own(scale, pack_ptrs, 3, adapter, PACKED)
    rows = (first_row + tl.arange(0, BLOCK_M)).to(INDEX)
    row_inside = rows < last_row
    # R is padded to BLOCK_R, what a matrix instruction takes; the padding is loaded as zeros.
    ranks = tl.arange(0, BLOCK_R).to(INDEX)
    rank_inside = ranks < own_rank
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)  # h before its scale and its rounding
    if DRAW:
        seed = tl.load(seed_ptr + adapter)
        threshold = own(threshold, pack_ptrs, 4, adapter, PACKED)
        drawn = rows - edge  # the rows as the adapter counts them where it is alone
        mask_ptr += segment.to(tl.int64) * M * stride_mask
    part = tl.program_id(1)
    first = part * steps * BLOCK_K
    for start in range(first, min(first + steps * BLOCK_K, K), BLOCK_K):
        # x [BLOCK_M, BLOCK_K]. Past column K zeros are read; EVEN_K says that no tile gets there.
        ks = (start + tl.arange(0, BLOCK_K)).to(INDEX)
        x_inside = row_inside[:, None]
        A_inside = rank_inside[None, :]
        if not EVEN_K:
            x_inside = x_inside & (ks < K)[None, :]
            A_inside = A_inside & (ks < K)[:, None]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=x_inside, other=0.0)
        if DRAW:
            # The mask of this tile, [BLOCK_M, BLOCK_K / 8] bytes: stored for the backward, and
            # spread over the tile of x, whose dropped elements become zero.
            columns = start // 8 + tl.arange(0, BLOCK_K // 8)
            flags = draw_keep(seed, drawn, columns, segment, threshold)
            tl.store(
                mask_ptr + rows[:, None] * stride_mask + columns[None, :],
                pack(flags).to(tl.uint8),
                mask=row_inside[:, None] & (columns < stride_mask)[None, :],
            )
            x = tl.where(interleave(flags, BLOCK_M, BLOCK_K // 8), x, 0.0)
        # A^T [BLOCK_K, BLOCK_R]: A lies as [R, K] and is read with its strides swapped.
        A_tile_ptrs = A_ptr + ks[:, None] * stride_ak + ranks[None, :] * stride_ar
        A = tl.load(A_tile_ptrs, mask=A_inside, other=0.0)
        acc = rank_dot(x, A, acc, x.dtype, PRECISION)
    # `scale` is dropout's 1 / (1 - p): applied to h [BLOCK_M, R] once, not to every tile of x.
    layer = (part * len(A_ptrs) + segment).to(INDEX)
    tl.store(
        h_ptr + (layer * M + rows)[:, None] * R + ranks[None, :],
        cast(acc * scale, h_ptr.dtype.element_ty),
        mask=row_inside[:, None] & (ranks < R)[None, :],
    )


def project(
    x: Tensor, lora_A: tuple[Tensor, ...], *, tile: Tile, precision: str,
    dropout: float = 0.0, seed: Tensor | None = None, parts: int = 1, pack: Packed | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """h [G, M, R]; with a `seed` (int64 [1]), also the packed masks [G, M, K / 8].

    h has its `rank_dtype`. With `parts` above 1 it is float32 [parts, G, M, R], to be summed over
    the first axis; there are fewer where K has not that many steps. Without a seed nothing is
    dropped, and the mask returned is None.

    With a `pack` there is a seed for each adapter, int64 [C], and the numbers of the pack count
    instead of `dropout`.
    """
    tables, shared = project_tables(pack, tile)
    h, mask = launch(_plan, (x, lora_A, seed, tables), dropout, tile, precision, parts, shared)
    return h, mask


def _plan(
    x: Tensor, lora_A: tuple[Tensor, ...], seed: Tensor | None, tables: Tables | None,
    dropout: float, tile: Tile, precision: str, parts: int, shared: Shared | None,
) -> Plan:  # fmt: skip
    M, K = x.shape
    G, R = len(lora_A), lora_A[0].shape[0] if shared is None else shared.rank
    blocks = triton.cdiv(M, tile.m) if tables is None else len(tables[0])
    steps = triton.cdiv(triton.cdiv(K, tile.k), parts)
    parts = triton.cdiv(K, steps * tile.k)
    if parts > 1:
        h = Out((parts, G, M, R), torch.float32)
    else:
        h = Out((G, M, R), rank_dtype(x.dtype, lora_A[0].dtype))
    mask, scale, stride_mask = None, 1.0, 0
    if seed is not None:
        stride_mask = masks.packed_width(K)
        mask = Out((G, M, stride_mask), torch.uint8)
        scale = 1 / (1 - dropout)
    return planned(
        _project, (G * blocks, parts, 1), (h, mask),
        M, K, R,
        *x.stride(), *lora_A[0].stride(), stride_mask,
        scale, masks.threshold(dropout), steps,
        PACKED=shared is not None, INDEX=index_type((x, lora_A[0], h)), DRAW=seed is not None,
        EVEN_K=K % tile.k == 0, PRECISION=precision,
        R_BY=divisor(R) if shared is None else shared.rank_by,
        AT_BY=1 if shared is None else shared.A_by, MASK_BY=divisor(stride_mask),
        BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=rank_block(R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
