"""dlora_B and dh in one read of dy; dlora_A in one read of x; for every segment of a group.

    g [P, R] = D(t)^T s          t [M, P], s [M, R]: (dy, h) gives dlora_B, (x, dh) gives dlora_A^T
    d [M, R] = t b               b [P, R]: (dy, lora_B) gives dh, from the same tile of dy

Sums over M are split over programs and added up in a second, ordered pass: no atomics, so the same
bits every time. A program owns BLOCK_P columns of one segment and one of `splits` ranges of rows;
its share of g stays in registers over the whole range, its share of d leaves once a row block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Tile, rank_block
from .launch import Out, Plan, launch, planned
from .tiles import cast, dot, index_type, load_keep, pick


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _column_gradient(
    t_ptrs, s_ptr, b_ptrs, mask_ptr, d_ptr, g_ptr,
    M, Ps, R, rows_per_split,
    stride_tms, stride_tp, stride_bp, stride_br, stride_mask,
    INDEX: tl.constexpr, HAS_MASK: tl.constexpr, WANT_G: tl.constexpr, WANT_D: tl.constexpr,
    RANK_MAJOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Segments are neighbours in the grid: where they share t, all but the first read it from L2.
    segment = tl.program_id(0)
    block_p = tl.program_id(1)
    split = tl.program_id(2)
    P = pick(Ps, segment)
    t_ptr = pick(t_ptrs, segment)
    stride_tm = pick(stride_tms, segment)
    columns = (block_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(INDEX)
    column_inside = columns < P
    ranks = tl.arange(0, BLOCK_R).to(INDEX)
    rank_inside = ranks < R
    gradient_inside = column_inside[:, None] & rank_inside[None, :]
    if WANT_D:
        b_tile_ptrs = pick(b_ptrs, segment) + columns[:, None] * stride_bp
        b_tile = tl.load(b_tile_ptrs + ranks[None, :] * stride_br, mask=gradient_inside, other=0.0)
        b = cast(b_tile, t_ptrs[0].dtype.element_ty)
    g = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, M), BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(INDEX)
        row_inside = rows < M
        segment_rows = (segment.to(INDEX) * M + rows)[:, None]
        rank_tile_inside = row_inside[:, None] & rank_inside[None, :]
        t = tl.load(
            t_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tp,
            mask=row_inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        if WANT_D:
            d = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            d = dot(t, b, d, PRECISION)
            d_rows = block_p.to(INDEX) * tl.num_programs(0) * M + segment_rows
            tl.store(d_ptr + d_rows * R + ranks[None, :], d, mask=rank_tile_inside)
        if WANT_G:
            s = tl.load(s_ptr + segment_rows * R + ranks[None, :], mask=rank_tile_inside, other=0.0)
            if HAS_MASK:
                segment_mask_ptr = mask_ptr + segment.to(tl.int64) * M * stride_mask
                keep = load_keep(
                    segment_mask_ptr, rows, block_p * BLOCK_P, M, P, stride_mask, BLOCK_M, BLOCK_P
                )
                t = tl.where(keep, t, 0.0)
            g = dot(tl.trans(t), s, g, PRECISION)
    if WANT_G:
        before = 0  # columns of the segments before this one, and of all
        every = 0
        for i in tl.static_range(len(Ps)):
            before = tl.where(i < segment, before + Ps[i], before)
            every += Ps[i]
        g_ptr += (split.to(INDEX) * every + before) * R
        if RANK_MAJOR:
            offsets = columns[:, None] + ranks[None, :] * P
        else:
            offsets = columns[:, None] * R + ranks[None, :]
        tl.store(g_ptr + offsets, g, mask=gradient_inside)


@triton.jit(do_not_specialize=["parts", "lengths"])
def _add_parts(
    part_ptrs, out_ptrs, parts, lengths, scale, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    for job in tl.static_range(len(lengths)):
        if tl.program_id(1) == job:
            length = lengths[job].to(INDEX)
            index = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            inside = index < length
            acc = tl.zeros((BLOCK,), dtype=tl.float32)
            for part in range(0, parts[job]):
                acc += tl.load(part_ptrs[job] + part * length + index, mask=inside, other=0.0)
            tl.store(
                out_ptrs[job] + index,
                cast(acc * scale, out_ptrs[job].dtype.element_ty),
                mask=inside,
            )


def output_gradients(
    dy: tuple[Tensor, ...], h: Tensor | None, lora_B: tuple[Tensor, ...], *, scale: float,
    want_dh: bool, tile: Tile, precision: str, splits: int,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dh [G, M, R] in dy's dtype if wanted; dlora_B [sum N_g, R] in lora_B's if `h` is given."""
    if len(dy) > 1 and len({each.stride(1) for each in dy}) > 1:
        # A stride of 1 must be known to the compiler.
        dy = tuple(each.contiguous() for each in dy)
    B = lora_B[0]
    (sums,) = launch(
        _plan, (dy, h, lora_B if want_dh else None, None), B.shape[1], B.dtype, False, scale,
        tile, precision, splits,
    )  # fmt: skip
    return sums[0] if want_dh else None, sums[-1] if h is not None else None


def input_gradients(
    x: Tensor, dh: Tensor, *, mask: Tensor | None, dropout: float, dtype: torch.dtype, tile: Tile,
    precision: str, splits: int,
) -> Tensor:  # fmt: skip
    """dlora_A [G R, K] of dlora_A_g = dh_g^T D_g(x), in `dtype`, that of the parameters."""
    G, _, R = dh.shape
    scale = 1.0 if mask is None else 1 / (1 - dropout)
    ((dlora_A,),) = launch(
        _plan, ((x,) * G, dh, None, mask), R, dtype, True, scale, tile, precision, splits
    )
    return dlora_A


def _plan(
    t: tuple[Tensor, ...], s: Tensor | None, b: tuple[Tensor, ...] | None, mask: Tensor | None,
    R: int, dtype: torch.dtype, rank_major: bool, scale: float, tile: Tile, precision: str,
    splits: int,
) -> Plan:  # fmt: skip
    """Partial sums g [splits, columns of all segments, R] and d [blocks of columns, G, M, R]."""
    G, M = len(t), t[0].shape[0]
    Ps = tuple(each.shape[1] for each in t)
    blocks_p = triton.cdiv(max(Ps), tile.n)
    rows_per_split = triton.cdiv(triton.cdiv(M, splits), tile.m) * tile.m
    splits = triton.cdiv(M, rows_per_split)
    g = d = None
    sums = []
    if b is not None:
        d = Out((blocks_p, G, M, R), torch.float32)
        sums.append((d, Out((G, M, R), t[0].dtype)))
    if s is not None:
        g = Out((splits, sum(Ps), R), torch.float32)
        sums.append((g, Out((G * R, Ps[0]) if rank_major else (sum(Ps), R), dtype)))
    return planned(
        _column_gradient, (G, blocks_p, splits), (d, g),
        M, Ps, R, rows_per_split,
        tuple(each.stride(0) for each in t), t[0].stride(1),
        *((0, 0) if b is None else b[0].stride()), 0 if mask is None else mask.stride(1),
        INDEX=index_type((*t, s, *(b or ()), g, d)), HAS_MASK=mask is not None,
        WANT_G=s is not None, WANT_D=b is not None, RANK_MAJOR=rank_major,
        PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_P=tile.n, BLOCK_R=rank_block(R),
        num_warps=tile.warps, num_stages=tile.stages,
        then=_plan_sum(sums, scale),
    )  # fmt: skip


def _plan_sum(sums: list[tuple[Out, Out]], scale: float) -> Plan:
    """out = scale * parts.sum(0) for each (parts, out) of one launch, in order of the parts."""
    block = 1024
    outs = tuple(out for _, out in sums)
    lengths = tuple(math.prod(out.shape) for out in outs)
    return planned(
        _add_parts, (max(triton.cdiv(length, block) for length in lengths), len(sums), 1), (outs,),
        tuple(parts.shape[0] for parts, _ in sums), lengths, scale,
        INDEX=index_type(parts for parts, _ in sums), BLOCK=block,
    )  # fmt: skip
