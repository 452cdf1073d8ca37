"""dlora_A from x and dh, dlora_B from dy and h, dh from dy: the sums over M, for a whole group.

    g [P, R] = D(t)^T s          t [M, P], s [M, R]: (x, dh) gives dlora_A^T, (dy, h) gives dlora_B
    d [M, R] = t b               b [P, R]: (dy, lora_B) gives dh, from the same tile of dy

A segment is the x or the dy of one layer of the group. A launch takes first the segments that read
x, then those that read dy. Where dh is known, one launch thus makes every parameter's gradient.

The rows are divided into `splits` runs of equal length, so that there are programs enough to fill
the card. A program owns BLOCK_P columns of one segment and one split. It keeps its g in registers
over all its rows and stores it at the end: a partial sum over M, one for each split. It stores d
for each block of rows: a partial sum over P, one for each block of columns.

A second launch adds the partial sums up, always in the same order. There are no atomics, so the
same call gives the same bits every time.

Of a pack each split lies within the rows of one adapter, and its g is [P, R_c] of that adapter. The
first launch scales what it stores, since scales differ, and the second adds each adapter's splits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra.operands import rank_dtype
from ..hardware.tiles import Tile, rank_block
from .launch import has_asynchronous_products, launch
from .packs import Packed, Shared, Tables, gradient_tables
from .plan import Given, Out, Plan, planned
from .tiles import (
    cast,
    divisor,
    index_type,
    load_keep,
    multiple,
    own,
    pick,
    placed,
    rank_dot,
    run_of,
)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _column_gradients(
    t_ptrs, dh_ptr, h_ptr, b_ptrs, mask_ptr, pack_ptrs, d_ptr, dlora_A_ptr, dlora_B_ptr,
    M, Ps, R, rows_per_split,
    stride_tms, stride_tp, stride_bp, stride_br, stride_mask,
    PACKED: tl.constexpr, INPUTS: tl.constexpr, INDEX: tl.constexpr, HAS_MASK: tl.constexpr,
    WANT_G: tl.constexpr, WANT_D: tl.constexpr, PRECISION: tl.constexpr,
    R_BY: tl.constexpr, B_BY: tl.constexpr, BP_BY: tl.constexpr, MASK_BY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    R, stride_bp = multiple(R, R_BY), multiple(stride_bp, BP_BY)
    stride_mask = multiple(stride_mask, MASK_BY)
    # The segment changes fastest from program to program: where segments share their t (x of a
    # group), all but the first find it in the L2 cache.
    segment = tl.program_id(0)
    block_p = tl.program_id(1)
    split = tl.program_id(2)
    # The first INPUTS segments read x, with s = dh and g = dlora_A; the others read dy, with s = h
    # and g = dlora_B. In a launch of one kind alone the compiler knows which: nothing is chosen.
    if (INPUTS > 0) and (len(Ps) > INPUTS):
        of_x = segment < INPUTS
        s_ptr, g_ptr = h_ptr, dlora_B_ptr
        if of_x:
            s_ptr, g_ptr = dh_ptr, dlora_A_ptr
    elif INPUTS > 0:
        of_x = tl.full((), 1, tl.int1)
        s_ptr, g_ptr = dh_ptr, dlora_A_ptr
    else:
        of_x = tl.full((), 0, tl.int1)
        s_ptr, g_ptr = h_ptr, dlora_B_ptr
    layer = tl.where(of_x, segment, segment - INPUTS)  # the place in s, d and mask: [G, M, ...]
    P = pick(Ps, segment)
    t_ptr = pick(t_ptrs, segment)
    stride_tm = pick(stride_tms, segment)
    columns = (block_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(INDEX)
    column_inside = columns < P
    ranks = tl.arange(0, BLOCK_R).to(INDEX)
    rank_inside = ranks < R  # R is padded by zeros to BLOCK_R
    # rows_per_split is a multiple of BLOCK_M: only the last block of the last split passes M.
    first, end, adapter, _, own_rank = run_of(pack_ptrs, split, rows_per_split, M, R, PACKED, R_BY)
    last = end if PACKED else min(first + rows_per_split, end)
    gradient_inside = column_inside[:, None] & (ranks < own_rank)[None, :]
    # The grid has as many blocks of columns as the widest segment needs. In a narrower one the
    # blocks past its P have nothing to add to g, and get no rows; but the sum over P reads a d of
    # every block, so with WANT_D they go through their rows and store zeros.
    if WANT_D:  # b [BLOCK_P, BLOCK_R] is the same for all rows: it is loaded once
        place = adapter * len(b_ptrs) + segment
        b_ptr = placed(pick(b_ptrs, segment), pack_ptrs, 2, place, B_BY, PACKED)
        stride_bp = own_rank if PACKED else stride_bp  # an adapter's b [P, its rank] is contiguous
        b_tile_ptrs = b_ptr + columns[:, None] * stride_bp
        b = tl.load(b_tile_ptrs + ranks[None, :] * stride_br, mask=gradient_inside, other=0.0)
    else:
        last = tl.where(block_p * BLOCK_P < P, last, first)
    # g is kept transposed, [BLOCK_R, BLOCK_P] = s^T t. As t^T s, the tile t would have to pass
    # through registers to be transposed; so it is multiplied as it lies in shared memory.
    g = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(INDEX)
        row_inside = rows < end
        layer_rows = (layer.to(INDEX) * M + rows)[:, None]
        rank_tile_inside = row_inside[:, None] & rank_inside[None, :]
        # t [BLOCK_M, BLOCK_P], a tile of x or of dy: the only large load, for both products.
        t = tl.load(
            t_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tp,
            mask=row_inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        if WANT_D:
            # d [BLOCK_M, BLOCK_R], stored in fp32 as [blocks of columns, G, M, R]. All segments
            # read dy here, so the grid's first axis is G.
            d = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            d = rank_dot(t, b, d, t.dtype, PRECISION)
            d *= own(1.0, pack_ptrs, 4, adapter, PACKED)
            d_rows = block_p.to(INDEX) * tl.num_programs(0) * M + layer_rows
            tl.store(d_ptr + d_rows * R + ranks[None, :], d, mask=rank_tile_inside)
        if WANT_G:
            # s [BLOCK_M, BLOCK_R]; dropout is applied to t, after d has read it.
            s = tl.load(s_ptr + layer_rows * R + ranks[None, :], mask=rank_tile_inside, other=0.0)
            if HAS_MASK:
                layer_mask_ptr = mask_ptr + layer.to(tl.int64) * M * stride_mask
                # Of dy nothing is dropped: a mask of no rows, which keeps everything.
                masked_rows = tl.where(of_x, M, 0)
                keep = load_keep(
                    layer_mask_ptr, rows, block_p * BLOCK_P, masked_rows, stride_mask,
                    BLOCK_M, BLOCK_P,
                )  # fmt: skip
                t = tl.where(keep, t, 0.0)
            g = rank_dot(tl.trans(s), t, g, t.dtype, PRECISION)
    if WANT_G:
        # A split's partial sums of dlora_A hold all segments that read x, one after another, and
        # those of dlora_B all that read dy: [splits, columns_total, R] each, where columns_total
        # counts the columns of the segments of this kind, columns_before those before this one.
        columns_before = 0
        columns_total = 0
        for i in tl.static_range(len(Ps)):
            alike = of_x == (i < INPUTS)
            columns_before += tl.where(alike & (i < segment), Ps[i], 0)
            columns_total += tl.where(alike, Ps[i], 0)
        if PACKED:  # asked again, so that it takes no register during the loop
            own_rank = multiple(tl.load(pack_ptrs[1] + adapter, volatile=True), R_BY)
        # Within a segment dlora_A lies as [R, K], dlora_B as [N, R].
        stride_gp, stride_gr = tl.where(of_x, 1, own_rank), tl.where(of_x, P, 1)
        of_input = own(1.0, pack_ptrs, 3, adapter, PACKED)
        g *= tl.where(of_x, of_input, own(1.0, pack_ptrs, 4, adapter, PACKED))
        g_ptr += split.to(INDEX) * columns_total * R + columns_before * own_rank
        offsets = columns[None, :] * stride_gp + ranks[:, None] * stride_gr
        tl.store(g_ptr + offsets, g, mask=column_inside[None, :] & (ranks < own_rank)[:, None])


@triton.jit
def _sum(ptr, first, last, stride, index, inside, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Partials first to last - 1, each `stride` elements after the one before, added in order."""
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    # AHEAD loads wait for the memory together; they are added one after another.
    for i in range(first, last, AHEAD):
        for j in tl.static_range(AHEAD):
            here = tl.where(i + j < last, inside, False)
            acc += tl.load(ptr + (i + j) * stride + index, mask=here, other=0.0)
    return acc


@triton.jit(do_not_specialize=["counts", "lengths"])
def _add_partials(
    partial_ptrs, out_ptrs, counts, lengths, scales,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # A job is one out of `length` elements, the sum of `counts[job]` partials of that length. The
    # second axis of the grid is the job; a program adds up BLOCK elements of its out.
    for job in tl.static_range(len(lengths)):
        if tl.program_id(1) == job:
            # Triton makes a constant of the integer 1, and a constant has no .to(): hence tl.full.
            length = tl.full((), lengths[job], INDEX)
            index = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            inside = index < length
            acc = _sum(partial_ptrs[job], 0, counts[job], length, index, inside, BLOCK, AHEAD)
            tl.store(
                out_ptrs[job] + index,
                cast(acc * scales[job], out_ptrs[job].dtype.element_ty),
                mask=inside,
            )


@triton.jit(do_not_specialize=["counts", "lengths"])
def _add_splits(
    partial_ptrs, sums_ptr, out_ptrs, counts, lengths,
    R: tl.constexpr, SPLIT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    # Job SPLIT[job] False: one out of `length` elements, as in `_add_partials`. True: for every
    # adapter, the third axis of the grid, an out of length * R_c elements, behind those of the
    # adapters before it; its partials, which have room for length * R, are those of its own splits.
    adapter = tl.program_id(2)
    at = sums_ptr + adapter * 4
    for job in tl.static_range(len(lengths)):
        if (tl.program_id(1) == job) & ((adapter == 0) | SPLIT[job]):
            length = tl.full((), lengths[job], INDEX)
            if SPLIT[job]:
                first, last = tl.load(at), tl.load(at + 1)
                stride = length * R
                out_ptr = out_ptrs[job] + tl.load(at + 2) * length
                length *= tl.load(at + 3)
            else:
                first, last = 0, counts[job]
                stride = length
                out_ptr = out_ptrs[job]
            index = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            inside = index < length
            acc = _sum(partial_ptrs[job], first, last, stride, index, inside, BLOCK, AHEAD)
            tl.store(out_ptr + index, cast(acc, out_ptr.dtype.element_ty), mask=inside)


class Gradient(NamedTuple):
    """How a parameter's gradient is stored: in the parameter's dtype, multiplied by `scale`."""

    dtype: torch.dtype
    scale: float


def output_gradients(
    dy: tuple[Tensor, ...], h: Tensor | None, lora_B: tuple[Tensor, ...], *, scale: float,
    tile: Tile, precision: str, splits: int, pack: Packed | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """From one read of dy: dh [G, M, R], and with `h` also dlora_B [sum N_g, R].

    dh has its `rank_dtype`, dlora_B lora_B's dtype; dlora_B is None without `h`. Of a `pack`
    dlora_B is flat: [sum N_g, R_c] of each adapter, one behind the other.
    """
    dlora_B = Gradient(lora_B[0].dtype, scale)
    given = _alike(dy), None, h, lora_B, None
    sums = _launch(given, 0, None, dlora_B, tile, precision, splits, pack)
    return sums[0], None if h is None else sums[1]


def parameter_gradients(
    x: Tensor | None, dh: Tensor | None, dy: tuple[Tensor, ...] | None, h: Tensor | None, *,
    dlora_A: Gradient, dlora_B: Gradient, mask: Tensor | None, tile: Tile, precision: str,
    splits: int, pack: Packed | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dlora_A [G R, K] and dlora_B [sum N_g, R]: dh_g^T D_g(x) and dy_g^T h_g of every layer g.

    dlora_A is None unless x and dh are given, dlora_B unless dy and h are. Of a `pack` both are
    flat: the gradients of each adapter, [G R_c, K] or [sum N_g, R_c], one behind the other.
    """
    inputs = 0 if x is None or dh is None else len(dh)
    t = _alike((() if x is None else (x,) * inputs) + (dy or ()))
    given = t, dh if inputs else None, h if dy else None, None, mask if inputs else None
    sums = _launch(given, inputs, dlora_A, dlora_B, tile, precision, splits, pack)
    return sums[0] if inputs else None, sums[-1] if dy else None


def _launch(
    given: tuple[Given, ...], inputs: int, dlora_A: Gradient | None, dlora_B: Gradient, tile: Tile,
    precision: str, splits: int, pack: Packed | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The two launches: partial sums, then their sums."""
    settings = inputs, dlora_A, dlora_B, tile, precision
    if pack is None:
        (sums,) = launch(_plan, (*given, None), *settings, splits, None)
        return sums
    t, _, _, b, _ = given
    tables, table = gradient_tables(pack, _rows_per_split(t[0].shape[0], splits, tile))  # type: ignore[index]
    d, of_A, of_B = launch(_plan, (*given, tables), *settings, len(tables[0]), pack.shared())
    partials = tuple(each for each in (d, of_A, of_B) if each is not None)
    dtypes = (
        None if d is None else rank_dtype(t[0].dtype, b[0].dtype),  # type: ignore[index]
        None if of_A is None else dlora_A.dtype,  # type: ignore[union-attr]
        None if of_B is None else dlora_B.dtype,
    )
    ranks = len(pack.pack.ranks), sum(pack.pack.ranks)
    (sums,) = launch(_plan_splits, (partials, table), tuple(filter(None, dtypes)), *ranks)
    return sums


def _rows_per_split(M: int, splits: int, tile: Tile) -> int:
    return triton.cdiv(triton.cdiv(M, splits), tile.m) * tile.m


def _alike(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, or contiguous copies of them where their columns lie at different strides.

    The kernel takes one stride for all. Triton compiles a stride of 1 as a constant, which makes
    loads wide; strides of different segments would be chosen at run time.
    """
    if len({each.stride(1) for each in tensors}) > 1:
        copies = {id(each): each.contiguous() for each in tensors}
        return tuple(copies[id(each)] for each in tensors)
    return tensors


def _plan(
    t: tuple[Tensor, ...], dh: Tensor | None, h: Tensor | None, b: tuple[Tensor, ...] | None,
    mask: Tensor | None, tables: Tables | None, inputs: int, dlora_A: Gradient, dlora_B: Gradient,
    tile: Tile, precision: str, splits: int, shared: Shared | None,
) -> Plan:  # fmt: skip
    """Partial sums d [blocks of columns, G, M, R] and g [splits, columns_total, R], then sums.

    Of a pack `splits` counts the runs of its table, and the sums are a launch of their own.
    """
    M = t[0].shape[0]
    Ps = tuple(each.shape[1] for each in t)
    stride_mask = 0 if mask is None else mask.stride(1)
    blocks_p = triton.cdiv(max(Ps), tile.n)
    rows_per_split = _rows_per_split(M, splits, tile)
    if shared is None:
        splits = triton.cdiv(M, rows_per_split)
    d = partials_A = partials_B = None
    sums = []
    if b is not None:
        R = b[0].shape[1] if shared is None else shared.rank
        d = Out((blocks_p, len(t), M, R), torch.float32)
        dh_dtype = rank_dtype(t[0].dtype, b[0].dtype)
        sums.append((d, Out((len(t), M, R), dh_dtype), dlora_B.scale))
    if dh is not None:
        R = dh.shape[2]
        partials_A = Out((splits, sum(Ps[:inputs]), R), torch.float32)
        out = Out((inputs * R, Ps[0]), dlora_A.dtype)
        sums.append((partials_A, out, dlora_A.scale))
    if h is not None:
        R = h.shape[2]
        partials_B = Out((splits, sum(Ps[inputs:]), R), torch.float32)
        sums.append((partials_B, Out((sum(Ps[inputs:]), R), dlora_B.dtype), dlora_B.scale))
    # A race on Hopper, found by tests/compiled/ptx.py. From rank 33 on, g is computed by wgmma: it
    # reads t from shared memory while the next t is being copied there. Where the product d reads
    # t too, Triton (3.6, 3.7) makes one buffer too few, and the copy overwrites the t that wgmma
    # still reads. With one stage nothing is copied ahead.
    stages = tile.stages
    if shared is not None:  # the adapter's numbers take registers: with three ptxas spills (sm_86)
        stages = min(stages, 2)
    if b is not None and rank_block(R) >= 64 and has_asynchronous_products():
        stages = 1
    return planned(
        _column_gradients, (len(t), blocks_p, splits), (d, partials_A, partials_B),
        M, Ps, R, rows_per_split,
        tuple(each.stride(0) for each in t), t[0].stride(1),
        *((0, 0) if b is None else b[0].stride()), stride_mask,
        PACKED=shared is not None,
        INPUTS=inputs, INDEX=index_type((*t, dh, h, *(b or ()), d, partials_A, partials_B)),
        HAS_MASK=mask is not None, WANT_G=dh is not None or h is not None, WANT_D=b is not None,
        PRECISION=precision, R_BY=divisor(R) if shared is None else shared.rank_by,
        B_BY=1 if shared is None else shared.B_by,
        BP_BY=1 if b is None or shared is not None else divisor(b[0].stride(0)),
        MASK_BY=divisor(stride_mask),
        BLOCK_M=tile.m, BLOCK_P=tile.n, BLOCK_R=rank_block(R),
        num_warps=tile.warps, num_stages=stages,
        then=_plan_sum(sums) if shared is None else None,
    )  # fmt: skip


def _plan_sum(sums: list[tuple[Out, Out, float]]) -> Plan:
    """out = scale * partials.sum(0) of each (partials, out, scale), added in order."""
    block = 256
    partials, outs, scales = zip(*sums, strict=True)
    lengths = tuple(math.prod(out.shape) for out in outs)
    return planned(
        _add_partials,
        (max(triton.cdiv(length, block) for length in lengths), len(sums), 1), (outs,),
        tuple(each.shape[0] for each in partials), lengths, scales,
        INDEX=index_type(partials), BLOCK=block, AHEAD=8,
    )  # fmt: skip


def _plan_splits(
    partials: tuple[Tensor, ...], sums: Tensor, dtypes: tuple[torch.dtype, ...], adapters: int,
    ranks: int,
) -> Plan:  # fmt: skip
    """dh [G, M, R] of a pack from d [blocks of columns, G, M, R]; and flat gradients, `ranks` times
    as long as a row of their partial sums [splits, columns_total, R].
    """
    block, R = 256, partials[0].shape[-1]
    split = tuple(each.dim() == 3 for each in partials)
    lengths = tuple(
        each.shape[1] if of_adapter else math.prod(each.shape[1:])
        for each, of_adapter in zip(partials, split, strict=True)
    )
    outs = tuple(
        Out((each.shape[1] * ranks,) if of_adapter else tuple(each.shape[1:]), dtype)
        for each, of_adapter, dtype in zip(partials, split, dtypes, strict=True)
    )
    longest = max(
        length * R if of_adapter else length
        for length, of_adapter in zip(lengths, split, strict=True)
    )
    several = adapters if True in split else 1
    return planned(
        _add_splits, (triton.cdiv(longest, block), len(partials), several), (outs,),
        tuple(each.shape[0] for each in partials), lengths,
        R=R, SPLIT=split, INDEX=index_type((*partials, *outs)), BLOCK=block, AHEAD=8,
    )  # fmt: skip
