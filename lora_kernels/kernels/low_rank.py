"""out = sum of x w^T + scale * D(u v^T), plus bias: a GEMM that starts from a low-rank product.

    x [M, K]   w [N, K]   bias [N]   u [M, R]   v [N, R]   mask [M, N / 8] bytes   out [M, N]

Forward: one launch writes out_g of every segment g, from x, weight_g, bias_g, h_g and lora_B_g.
There may be more segments than v: those past the last v get no low-rank product. They are the
columns of a weight that LoRA leaves alone.

Gradient of x: one out, which sums a term for every segment: (dy_g, weight_g^T, dh_g, lora_A_g^T),
under the mask that the forward drew for g. All terms are added in one accumulator. It is the same
kernel, given w and v with swapped strides.

Where u = h comes in parts [S, G, M, R] (`projection.py`), each program adds them up, in their
order; the first block of columns also stores the sum, which the backward reads.

The accumulator starts as the low-rank product instead of zero. That costs one rank-R dot a tile,
R / K of the GEMM, and no extra pass over out. With GEMM off, only the low-rank part is written, and
a vendor's GEMM accumulates onto it.

A weight in NF4 is read as it lies (`nf4.py`): each tile of it becomes numbers on the way to its
product, once for every block of rows of out.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..algebra.nf4 import NF4
from ..algebra.operands import rank_dtype
from ..hardware.tiles import Tile, rank_block
from .launch import launch
from .nf4 import load_weight
from .packs import Packed, Shared, Tables, gemm_tables
from .plan import Out, Plan, planned
from .tiles import (
    blocks_of_rows,
    cast,
    divisor,
    dot,
    index_type,
    load_keep,
    locate,
    multiple,
    of_term,
    own,
    pick,
    placed,
    rank_dot,
    run_of,
)


@triton.jit
def _summed(ptrs, inside, stride, PARTS: tl.constexpr):
    """The sum of PARTS tiles, each `stride` elements after the one before."""
    total = tl.load(ptrs, mask=inside, other=0.0)
    for i in tl.static_range(1, PARTS):
        total += tl.load(ptrs + i * stride, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["M"])
def _low_rank_gemm(
    x_ptrs, w_ptrs, bias_ptrs, u_ptr, v_ptrs, mask_ptr, pack_ptrs, out_ptrs, sum_ptr,
    M, Ns, Ks, R,
    stride_xms, stride_xks, stride_wn, stride_wk, stride_vn, stride_vr, stride_mask, stride_oms,
    scale,
    PACKED: tl.constexpr, OWN_V: tl.constexpr, GEMM: tl.constexpr, PARTS: tl.constexpr,
    NF4: tl.constexpr, ACROSS: tl.constexpr,
    INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, R_BY: tl.constexpr, V_BY: tl.constexpr, VN_BY: tl.constexpr,
    MASK_BY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # A program computes one tile [BLOCK_M, BLOCK_N] of the out of one segment.
    blocks_m = blocks_of_rows(Ns, M, BLOCK_M, BLOCK_N, PACKED)
    segment, block_m, block_n = locate(Ns, blocks_m, BLOCK_N)
    R, stride_vn = multiple(R, R_BY), multiple(stride_vn, VN_BY)
    stride_mask = multiple(stride_mask, MASK_BY)
    N = pick(Ns, segment)
    first_row, last_row, adapter, _, own_rank = run_of(
        pack_ptrs, block_m, BLOCK_M, M, R, PACKED, R_BY
    )
    scale = own(scale, pack_ptrs, 3, adapter, PACKED)
    if OWN_V:  # an adapter's v [N, its rank] is contiguous
        stride_vn = own_rank
    rows = (first_row + tl.arange(0, BLOCK_M)).to(INDEX)
    row_inside = (rows < last_row)[:, None]
    columns = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    ranks = tl.arange(0, BLOCK_R).to(INDEX)
    column_inside = (columns < N)[None, :]
    # Either many outs of one term each (forward), or one out that sums all terms (dx). Where the
    # segments are columns of one weight, dx has one product x w^T and a low-rank term a segment.
    TERMS: tl.constexpr = len(Ks)
    LOW_RANK_TERMS: tl.constexpr = len(v_ptrs) if len(Ns) == 1 else 1
    # A segment without a v takes part with rank 0: its low-rank loads are all masked to zero.
    own_rank = tl.where(segment < len(v_ptrs), own_rank, 0) if len(Ns) > len(v_ptrs) else own_rank
    rank_inside = ranks < own_rank

    # The low-rank product: u [BLOCK_M, BLOCK_R] times v^T [BLOCK_R, BLOCK_N], R padded by zeros to
    # BLOCK_R. u lies as [G, M, R] and belongs to a segment or, where one out sums them, to a term.
    dtype: tl.constexpr = x_ptrs[0].dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for term in tl.static_range(LOW_RANK_TERMS):
        at = segment if LOW_RANK_TERMS == 1 else term
        u_offsets = (at * M + rows)[:, None] * R + ranks[None, :]
        u_inside = row_inside & rank_inside[None, :]
        u = _summed(u_ptr + u_offsets, u_inside, len(v_ptrs) * M.to(INDEX) * R, PARTS)
        if PARTS > 1:
            u = cast(u, sum_ptr.dtype.element_ty)
            # An adapter of a pack has zeros past its own rank, which are stored as well.
            whole = row_inside & ((ranks < R) & (at < len(v_ptrs)))[None, :] & (block_n == 0)
            tl.store(sum_ptr + u_offsets, u, mask=whole)
        v_ptr = of_term(v_ptrs, segment, term, LOW_RANK_TERMS)
        place = adapter * len(v_ptrs) + min(at, len(v_ptrs) - 1)
        v_ptr = placed(v_ptr, pack_ptrs, 2, place, V_BY, PACKED)
        v_tile_ptrs = v_ptr + columns[None, :] * stride_vn + ranks[:, None] * stride_vr
        v = tl.load(v_tile_ptrs, mask=column_inside & rank_inside[:, None], other=0.0)
        if HAS_MASK:
            # Each term has a mask of its own, so it is masked before it is added.
            term_mask_ptr = mask_ptr + at * M.to(tl.int64) * stride_mask
            keep = load_keep(
                term_mask_ptr, rows, block_n * BLOCK_N, M, stride_mask, BLOCK_M, BLOCK_N
            )
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            acc += tl.where(keep, rank_dot(u, v, product, dtype, PRECISION), 0.0)
        else:
            acc = rank_dot(u, v, acc, dtype, PRECISION)
    acc *= scale

    # Exact float32 products are summed by FMAs, each of which rounds: the larger the sum they are
    # added to, the more. So each GEMM starts from zero, as the vendor's does, and `before` is added
    # at its end. Elsewhere the operands' own rounding outweighs that: the GEMM goes on from `acc`.
    EXACT: tl.constexpr = (PRECISION == "ieee") and (dtype == tl.float32)
    # The GEMM: tiles x [BLOCK_M, BLOCK_K] and w^T [BLOCK_K, BLOCK_N] for each step along K. `step`
    # is of type INDEX, since step times a stride may not fit in 32 bits.
    if GEMM:
        ks = tl.arange(0, BLOCK_K).to(INDEX)
        step = tl.full((), BLOCK_K, INDEX)
        for term in tl.static_range(TERMS):
            K = Ks[term]
            stride_xk = stride_xks[term]
            x_tile_ptrs = x_ptrs[term] + rows[:, None] * stride_xms[term] + ks[None, :] * stride_xk
            w_ptr = w_ptrs[0] if NF4 else of_term(w_ptrs, segment, term, TERMS)
            w_tile_ptrs = w_ptr + columns[None, :] * stride_wn + ks[:, None] * stride_wk
            before = acc
            if EXACT:
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(0, K, BLOCK_K):
                x_inside = row_inside
                w_inside = column_inside
                if not EVEN_K:
                    x_inside = x_inside & (start + ks < K)[None, :]
                    w_inside = w_inside & (start + ks < K)[:, None]
                x = tl.load(x_tile_ptrs, mask=x_inside, other=0.0)
                w = load_weight(
                    w_tile_ptrs, w_inside, w_ptrs, columns, start + ks, N, K, block_n * BLOCK_N,
                    start, NF4, ACROSS, BLOCK_N, BLOCK_K, dtype,
                )  # fmt: skip
                acc = dot(x, w, acc, PRECISION)
                x_tile_ptrs += step * stride_xk
                w_tile_ptrs += step * stride_wk
            if EXACT:
                acc += before

    # The epilogue: bias [BLOCK_N] to every row, one rounding to out's dtype.
    if HAS_BIAS:
        bias = tl.load(pick(bias_ptrs, segment) + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(
        pick(out_ptrs, segment) + rows[:, None] * pick(stride_oms, segment) + columns[None, :],
        cast(acc, out_ptrs[0].dtype.element_ty),
        mask=row_inside & column_inside,
    )


def low_rank_gemm(
    x: tuple[Tensor, ...], w: tuple[Tensor, ...] | tuple[NF4], u: Tensor,
    v: tuple[Tensor, ...], *,
    scale: float, tile: Tile, precision: str, bias: tuple[Tensor, ...] | None = None,
    mask: Tensor | None = None, gemm: bool = True, transposed: bool = False,
    outs: tuple[Tensor, ...] | None = None, pack: Packed | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """(outs, u). With one x an out [M, N_g] for each w; with several, the one that sums all terms.

    u is [G, M, R] and mask [G, M, ceil(N / 8)], where G = len(v). x, w and outs have one dtype;
    bias, u and v may have others. w and v may have any strides, the same for all w and for all v.
    Parts of u, fp32 [S, G, M, R], are added up; the u returned is their sum in its `rank_dtype`.

    `outs`, if given, are written (their columns lie side by side); else outs are allocated.
    `gemm=False` leaves the products x w^T out. `transposed=True` takes w as [K, N] and v as [R, N]:
    to hand over two `.T` instead would cost the host as much as a launch. With a `pack` its scales
    count instead of `scale`. A lone w may be NF4; it stands for [N, K] whether `transposed` or not.
    """
    first, *_ = w
    nf4 = isinstance(first, NF4)
    read: Any = tuple(first) if nf4 else w
    tables, shared = gemm_tables(pack, tile, transposed)
    given = (x, read, bias, u, v, mask, tables)
    settings = (scale, tile, precision, gemm, transposed, shared, nf4)
    if outs is None:
        outs, whole = launch(_plan, given, None, *settings)
    else:
        (whole,) = launch(_plan, (*given, outs), *settings)
    return outs, u if whole is None else whole


def _plan(
    x: tuple[Tensor, ...], w: tuple[Tensor, ...], bias: tuple[Tensor, ...] | None,
    u: Tensor, v: tuple[Tensor, ...], mask: Tensor | None, tables: Tables | None,
    outs: tuple[Tensor, ...] | None, scale: float, tile: Tile, precision: str, gemm: bool,
    transposed: bool, shared: Shared | None, nf4: bool,
) -> Plan:  # fmt: skip
    if transposed:
        v = tuple(t.T for t in v)
        w = w if nf4 else tuple(t.T for t in w)
    sizes = tuple(t.shape[0] for t in w)
    if nf4:  # w is (packed, absmax, code) of one layer, and a byte of packed holds two weights
        sizes = (2 * w[0].shape[1] if transposed else w[0].shape[0],)
    M, R = u.shape[-2:]
    parts = u.shape[0] if u.dim() == 4 else 1
    whole = None if parts == 1 else Out((len(v), M, R), rank_dtype(x[0].dtype, v[0].dtype))
    Ns = sizes if len(x) == 1 else sizes[:1]
    Ks = tuple(t.shape[1] for t in x)
    stride_mask = 0 if mask is None else mask.stride(1)
    allocated = tuple(Out((M, N), x[0].dtype) for N in Ns) if outs is None else ()
    written = outs or allocated
    blocks_m = triton.cdiv(M, tile.m) if tables is None else len(tables[0])
    blocks = blocks_m * sum(triton.cdiv(N, tile.n) for N in Ns)
    rank_by, vn_by, v_by = divisor(R), divisor(v[0].stride()[0]), 1
    if shared is not None:
        rank_by, v_by = shared.rank_by, shared.A_by if transposed else shared.B_by
        vn_by = vn_by if transposed else 1  # not used
    return planned(
        _low_rank_gemm, (blocks, 1, 1), (allocated, whole) if outs is None else (whole,),
        M, Ns, Ks, R,
        tuple(t.stride(0) for t in x), tuple(t.stride(1) for t in x),
        *w[0].stride(), *v[0].stride(), stride_mask,
        tuple(t.stride()[0] for t in written),
        scale,
        PACKED=shared is not None, OWN_V=shared is not None and not transposed,
        GEMM=gemm, PARTS=parts, NF4=nf4, ACROSS=nf4 and transposed,
        INDEX=index_type((*x, *w, u, v[0], *written)),
        HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
        EVEN_K=all(K % tile.k == 0 for K in Ks), PRECISION=precision,
        R_BY=rank_by, V_BY=v_by, VN_BY=vn_by, MASK_BY=divisor(stride_mask),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=rank_block(R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
