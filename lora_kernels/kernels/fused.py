"""out = x w^T + scale * D(h v^T), plus bias, with h = h_scale * x a^T from the same tiles of x.

    x [M, K]   w [N, K]   bias [N]   a [R, K]   v [N, R]
    mask [M, N / 8] bytes   out [M, N]   h [M, R]

One launch does the work of `project` and `low_rank_gemm`: each tile of x feeds both products, and x
is read once. The price is R / BLOCK_N more matrix instructions, since each block of BLOCK_N columns
computes the same h. The first block of columns stores it.

Forward: out and h of each segment, from (x, weight_g, bias_g, lora_A_g, lora_B_g). Gradient of x:
one out, which sums a term (dy_g, weight_g^T, lora_B_g^T, lora_A_g^T) for every segment; the h of a
term is then dh_g, the gradient of h_g.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..algebra.operands import rank_dtype
from ..hardware.tiles import Tile, rank_block
from .launch import launch
from .packs import Packed, Shared, Tables, fused_tables
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


@triton.jit(do_not_specialize=["M"])
def _fused_gemm(
    x_ptrs, w_ptrs, bias_ptrs, a_ptrs, v_ptrs, mask_ptr, pack_ptrs, out_ptrs, h_ptr,
    M, Ns, Ks, R,
    stride_xms, stride_xks, stride_wn, stride_wk, stride_ar, stride_ak, stride_vn, stride_vr,
    stride_mask, h_scale, scale,
    PACKED: tl.constexpr, TRANSPOSED: tl.constexpr, INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    R_BY: tl.constexpr, A_BY: tl.constexpr, V_BY: tl.constexpr, AK_BY: tl.constexpr,
    VN_BY: tl.constexpr, MASK_BY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # A program computes a tile [BLOCK_M, BLOCK_N] of the out of one segment, and h [BLOCK_M, R].
    blocks_m = blocks_of_rows(Ns, M, BLOCK_M, BLOCK_N, PACKED)
    segment, block_m, block_n = locate(Ns, blocks_m, BLOCK_N)
    R, stride_mask = multiple(R, R_BY), multiple(stride_mask, MASK_BY)
    stride_ak, stride_vn = multiple(stride_ak, AK_BY), multiple(stride_vn, VN_BY)
    N = pick(Ns, segment)
    first_row, last_row, adapter, _, own_rank = run_of(
        pack_ptrs, block_m, BLOCK_M, M, R, PACKED, R_BY
    )
    h_scale = own(h_scale, pack_ptrs, 4, adapter, PACKED)
    scale = own(scale, pack_ptrs, 5, adapter, PACKED)
    if PACKED and TRANSPOSED:  # an adapter's lora_B [N, its rank] is contiguous
        stride_ak = own_rank
    elif PACKED:
        stride_vn = own_rank
    rows = (first_row + tl.arange(0, BLOCK_M)).to(INDEX)
    row_inside = (rows < last_row)[:, None]
    columns = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    ranks = tl.arange(0, BLOCK_R).to(INDEX)
    ks = tl.arange(0, BLOCK_K).to(INDEX)
    step = tl.full((), BLOCK_K, INDEX)
    column_inside = (columns < N)[None, :]
    rank_inside = ranks < own_rank

    # Many outs of one term each (forward), or one out that sums all terms (dx).
    TERMS: tl.constexpr = len(Ks)
    # As in `low_rank_gemm`: in exact float32 each GEMM starts from zero.
    dtype: tl.constexpr = x_ptrs[0].dtype.element_ty
    EXACT: tl.constexpr = (PRECISION == "ieee") and (dtype == tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for term in tl.static_range(TERMS):
        at = segment if TERMS == 1 else term  # the place in h and mask, both [G, M, ...]
        # Tiles of one step along K: x [BLOCK_M, BLOCK_K], w^T [BLOCK_K, BLOCK_N] and
        # a^T [BLOCK_K, BLOCK_R], R padded by zeros to BLOCK_R. Their addresses move on with K.
        K = Ks[term]
        stride_xk = stride_xks[term]
        x_tile_ptrs = x_ptrs[term] + rows[:, None] * stride_xms[term] + ks[None, :] * stride_xk
        w_ptr = of_term(w_ptrs, segment, term, TERMS)
        w_tile_ptrs = w_ptr + columns[None, :] * stride_wn + ks[:, None] * stride_wk
        a_ptr = of_term(a_ptrs, segment, term, TERMS)
        v_ptr = of_term(v_ptrs, segment, term, TERMS)
        place = adapter * len(v_ptrs) + at
        a_ptr = placed(a_ptr, pack_ptrs, 2, place, A_BY, PACKED)
        v_ptr = placed(v_ptr, pack_ptrs, 3, place, V_BY, PACKED)
        a_tile_ptrs = a_ptr + ranks[None, :] * stride_ar + ks[:, None] * stride_ak
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        before = acc
        if EXACT:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            x_inside = row_inside
            w_inside = column_inside
            a_inside = rank_inside[None, :]
            if not EVEN_K:
                x_inside = x_inside & (start + ks < K)[None, :]
                w_inside = w_inside & (start + ks < K)[:, None]
                a_inside = a_inside & (start + ks < K)[:, None]
            x = tl.load(x_tile_ptrs, mask=x_inside, other=0.0)
            w = tl.load(w_tile_ptrs, mask=w_inside, other=0.0)
            a = tl.load(a_tile_ptrs, mask=a_inside, other=0.0)
            acc = dot(x, w, acc, PRECISION)
            h = rank_dot(x, a, h, dtype, PRECISION)
            x_tile_ptrs += step * stride_xk
            w_tile_ptrs += step * stride_wk
            a_tile_ptrs += step * stride_ak
        # h is complete. It is rounded to its dtype first, so that this product takes the same
        # numbers that the backward will read.
        u = cast(h * h_scale, h_ptr.dtype.element_ty)
        tl.store(
            h_ptr + (at * M + rows)[:, None] * R + ranks[None, :],
            u,
            mask=tl.where(block_n == 0, row_inside & (ranks < R)[None, :], False),
        )
        # The low-rank product: u [BLOCK_M, BLOCK_R] times v^T [BLOCK_R, BLOCK_N].
        v_tile_ptrs = v_ptr + columns[None, :] * stride_vn + ranks[:, None] * stride_vr
        v = tl.load(v_tile_ptrs, mask=column_inside & rank_inside[:, None], other=0.0)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        product = rank_dot(u, v, product, dtype, PRECISION) * scale
        if HAS_MASK:
            term_mask_ptr = mask_ptr + at * M.to(tl.int64) * stride_mask
            keep = load_keep(
                term_mask_ptr, rows, block_n * BLOCK_N, M, stride_mask, BLOCK_M, BLOCK_N
            )
            product = tl.where(keep, product, 0.0)
        acc += product
        if EXACT:
            acc += before

    if HAS_BIAS:
        bias = tl.load(pick(bias_ptrs, segment) + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(
        pick(out_ptrs, segment) + rows[:, None] * N + columns[None, :],
        cast(acc, out_ptrs[0].dtype.element_ty),
        mask=row_inside & column_inside,
    )


def fused_gemm(
    x: tuple[Tensor, ...], w: tuple[Tensor, ...], a: tuple[Tensor, ...], v: tuple[Tensor, ...], *,
    h_scale: float, scale: float, tile: Tile, precision: str,
    bias: tuple[Tensor, ...] | None = None, mask: Tensor | None = None, transposed: bool = False,
    pack: Packed | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """(outs, h [G, M, R]): `low_rank_gemm` with u = h, computed from x and a on the way.

    a may have another dtype than x, as v may; h has its `rank_dtype`.
    `transposed=True` takes w as [K, N], a as [K, R] and v as [R, N]. With a `pack` its scales count
    instead of `h_scale` and `scale`.
    """
    tables, shared = fused_tables(pack, tile, transposed)
    given = (x, w, bias, a, v, mask, tables)
    outs, h = launch(_plan, given, h_scale, scale, tile, precision, transposed, shared)
    return outs, h


def _plan(
    x: tuple[Tensor, ...], w: tuple[Tensor, ...], bias: tuple[Tensor, ...] | None,
    a: tuple[Tensor, ...], v: tuple[Tensor, ...], mask: Tensor | None, tables: Tables | None,
    h_scale: float, scale: float, tile: Tile, precision: str, transposed: bool,
    shared: Shared | None,
) -> Plan:  # fmt: skip
    if transposed:
        w, a, v = (tuple(t.T for t in each) for each in (w, a, v))
    M, R = x[0].shape[0], a[0].shape[0] if shared is None else shared.rank
    sizes = tuple(t.shape[0] for t in w)
    Ns = sizes if len(x) == 1 else sizes[:1]
    Ks = tuple(t.shape[1] for t in x)
    stride_mask = 0 if mask is None else mask.stride(1)
    outs = tuple(Out((M, N), x[0].dtype) for N in Ns)
    h = Out((len(w), M, R), rank_dtype(x[0].dtype, a[0].dtype))
    blocks_m = triton.cdiv(M, tile.m) if tables is None else len(tables[0])
    blocks = blocks_m * sum(triton.cdiv(N, tile.n) for N in Ns)
    rank_by, ak_by, vn_by = divisor(R), divisor(a[0].stride()[1]), divisor(v[0].stride()[0])
    a_by = v_by = 1
    if shared is not None:
        rank_by = shared.rank_by
        a_by, v_by = (shared.A_by, shared.B_by)[:: -1 if transposed else 1]
        ak_by, vn_by = (1, vn_by) if transposed else (ak_by, 1)  # the adapter's own
    return planned(
        _fused_gemm, (blocks, 1, 1), (outs, h),
        M, Ns, Ks, R,
        tuple(t.stride(0) for t in x), tuple(t.stride(1) for t in x),
        *w[0].stride(), *a[0].stride(), *v[0].stride(), stride_mask,
        h_scale, scale,
        PACKED=shared is not None, TRANSPOSED=transposed,
        INDEX=index_type((*x, *w, a[0], v[0], h, *outs)), HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None, EVEN_K=all(K % tile.k == 0 for K in Ks),
        PRECISION=precision,
        R_BY=rank_by, A_BY=a_by, V_BY=v_by, AK_BY=ak_by, VN_BY=vn_by, MASK_BY=divisor(stride_mask),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=rank_block(R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
