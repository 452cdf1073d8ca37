"""out = sum of x w^T + scale * D(u v^T), plus bias: a GEMM that starts from a low-rank product.

    x [M, K]   w [N, K]   bias [N]   u [M, R]   v [N, R]   mask [M, N / 8] bytes   out [M, N]

Forward, for G segments: out_g from x, weight_g, bias_g, h_g, lora_B_g; one launch for all of them.
Segments past the last v have no low-rank product: the columns of a weight that LoRA leaves alone.
Gradient of x: one out, the sum over segments of (dy_g, weight_g^T, dh_g, lora_A_g^T) under the
forward's masks, in one accumulator; the same kernel with swapped strides. Seeding the accumulator
costs one rank-R dot a tile, R / K of the GEMM, and no extra pass over out.

With GEMM off only the low-rank part is written, for a vendor's GEMM to accumulate onto.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..hardware.tiles import Tile, rank_block
from .launch import Out, Plan, launch, planned
from .tiles import cast, divisor, dot, index_type, load_keep, locate, multiple, of_term, pick


@triton.jit(do_not_specialize=["M"])
def _low_rank_gemm(
    x_ptrs, w_ptrs, bias_ptrs, u_ptr, v_ptrs, mask_ptr, out_ptrs,
    M, Ns, Ks, R,
    stride_xms, stride_xks, stride_wn, stride_wk, stride_vn, stride_vr, stride_mask, stride_oms,
    scale,
    GEMM: tl.constexpr, INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    R_BY: tl.constexpr, VN_BY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    segment, block_m, block_n = locate(Ns, M, BLOCK_M, BLOCK_N)
    R, stride_vn = multiple(R, R_BY), multiple(stride_vn, VN_BY)
    N = pick(Ns, segment)
    rows = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    columns = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    ranks = tl.arange(0, BLOCK_R).to(INDEX)
    row_inside = (rows < M)[:, None]
    column_inside = (columns < N)[None, :]
    # Either many outputs of one term each, or one output that sums all terms.
    TERMS: tl.constexpr = len(Ks)
    LOW_RANK_TERMS: tl.constexpr = len(v_ptrs) if len(Ns) == 1 else 1
    if len(Ns) > len(v_ptrs):
        rank_inside = ranks < tl.where(segment < len(v_ptrs), R, 0)
    else:
        rank_inside = ranks < R

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for term in tl.static_range(LOW_RANK_TERMS):
        at = segment if LOW_RANK_TERMS == 1 else term
        u_tile_ptrs = u_ptr + (at * M + rows)[:, None] * R + ranks[None, :]
        u = tl.load(u_tile_ptrs, mask=row_inside & rank_inside[None, :], other=0.0)
        v_ptr = of_term(v_ptrs, segment, term, LOW_RANK_TERMS)
        v_tile_ptrs = v_ptr + columns[None, :] * stride_vn + ranks[:, None] * stride_vr
        v = tl.load(v_tile_ptrs, mask=column_inside & rank_inside[:, None], other=0.0)
        if HAS_MASK:
            term_mask_ptr = mask_ptr + at * M.to(tl.int64) * stride_mask
            keep = load_keep(
                term_mask_ptr, rows, block_n * BLOCK_N, M, N, stride_mask, BLOCK_M, BLOCK_N
            )
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            acc += tl.where(keep, dot(u, cast(v, u.dtype), product, PRECISION), 0.0)
        else:
            acc = dot(u, cast(v, u.dtype), acc, PRECISION)
    acc *= scale

    # Exact float32 rounds at every step, and the more the larger the sum is: there each product
    # starts from zero, as the vendor's does.
    EXACT: tl.constexpr = (PRECISION == "ieee") and (x_ptrs[0].dtype.element_ty == tl.float32)
    if GEMM:
        ks = tl.arange(0, BLOCK_K).to(INDEX)
        step = tl.full((), BLOCK_K, INDEX)
        for term in tl.static_range(TERMS):
            K = Ks[term]
            stride_xk = stride_xks[term]
            x_tile_ptrs = x_ptrs[term] + rows[:, None] * stride_xms[term] + ks[None, :] * stride_xk
            w_ptr = of_term(w_ptrs, segment, term, TERMS)
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
                w = tl.load(w_tile_ptrs, mask=w_inside, other=0.0)
                acc = dot(x, w, acc, PRECISION)
                x_tile_ptrs += step * stride_xk
                w_tile_ptrs += step * stride_wk
            if EXACT:
                acc += before

    if HAS_BIAS:
        bias = tl.load(pick(bias_ptrs, segment) + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(
        pick(out_ptrs, segment) + rows[:, None] * pick(stride_oms, segment) + columns[None, :],
        cast(acc, out_ptrs[0].dtype.element_ty),
        mask=row_inside & column_inside,
    )


def low_rank_gemm(
    x: tuple[Tensor, ...], w: tuple[Tensor, ...], u: Tensor, v: tuple[Tensor, ...], *,
    scale: float, tile: Tile, precision: str, bias: tuple[Tensor, ...] | None = None,
    mask: Tensor | None = None, gemm: bool = True, transposed: bool = False,
    outs: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """An out [M, N_g] for each w if there is one x, else the single out that sums all terms.

    All in the dtype of x; w and v may be any strided views (each of one layout), v of any dtype.
    u is [G, M, R] for the G of v, mask [G, M, ceil(N / 8)]. `outs` are written if given (columns
    side by side), else allocated. `gemm=False` leaves out the products x w^T. `transposed` says
    that w and v are given as [K, N] and [R, N]: two .T cost the host as much as a launch.
    """
    given = (x, w, bias, u, v, mask)
    settings = (scale, tile, precision, gemm, transposed)
    if outs is None:
        (outs,) = launch(_plan, given, None, *settings)
    else:
        launch(_plan, (*given, outs), *settings)
    return outs


def _plan(
    x: tuple[Tensor, ...], w: tuple[Tensor, ...], bias: tuple[Tensor, ...] | None,
    u: Tensor, v: tuple[Tensor, ...], mask: Tensor | None, outs: tuple[Tensor, ...] | None,
    scale: float, tile: Tile, precision: str, gemm: bool, transposed: bool,
) -> Plan:  # fmt: skip
    if transposed:
        w, v = (tuple(t.T for t in each) for each in (w, v))
    M, R = x[0].shape[0], u.shape[2]
    sizes = tuple(t.shape[0] for t in w)
    Ns = sizes if len(x) == 1 else sizes[:1]
    Ks = tuple(t.shape[1] for t in x)
    allocated = tuple(Out((M, N), x[0].dtype) for N in Ns) if outs is None else ()
    written = outs or allocated
    blocks = triton.cdiv(M, tile.m) * sum(triton.cdiv(N, tile.n) for N in Ns)
    return planned(
        _low_rank_gemm, (blocks, 1, 1), (allocated,) if outs is None else (),
        M, Ns, Ks, R,
        tuple(t.stride(0) for t in x), tuple(t.stride(1) for t in x),
        *w[0].stride(), *v[0].stride(), 0 if mask is None else mask.stride(1),
        tuple(t.stride()[0] for t in written),
        scale,
        GEMM=gemm, INDEX=index_type((*x, *w, u, v[0], *written)), HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None, EVEN_K=all(K % tile.k == 0 for K in Ks),
        PRECISION=precision, R_BY=divisor(R), VN_BY=divisor(v[0].stride()[0]),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=rank_block(R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
