"""What DoRA adds to a LoRA product p [M, N]: the gain of its columns, their scaling, its gradients.

    length = |weight + scale lora_B lora_A|, row by row     gain = magnitude / length
    y = p * gain + bias
    dp = dy * gain                                          dgain = sum over the rows of dy * p

    weight [N, K]   lora_A [R, K]   lora_B [N, R]   magnitude, length, gain, bias [N]   y, p [M, N]

Each line is one launch; the sum over the rows comes in parts. The sum of the first line is formed a
tile at a time, in registers, so the weight is read once and nothing of its size is written. For y
and p of half precision the second line moves 4 bytes an element and the last 6. Plain operators
take 13 launches for all, and move 20 and 34 bytes an element, and 18 for one of the weight instead
of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from .launch import launch
from .plan import Out, Plan, planned
from .tiles import cast, dot, index_type, wide

_ROWS = 64  # of dy and p that one program sums up


@triton.jit
def _row_gains(
    weight_ptr, a_ptr, b_ptr, magnitude_ptr, gain_ptr, length_ptr,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, scale,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # A program has BLOCK_N rows of the weight, and walks along K.
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    row_inside = rows < N
    squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = (start + tl.arange(0, BLOCK_K)).to(INDEX)
        k_inside = (ks < K)[None, :]
        weight_ptrs = weight_ptr + rows[:, None] * stride_wn + ks[None, :] * stride_wk
        weight = tl.load(weight_ptrs, mask=row_inside[:, None] & k_inside, other=0.0)
        total = weight.to(tl.float32)
        for first in range(0, R, BLOCK_R):
            ranks = (first + tl.arange(0, BLOCK_R)).to(INDEX)
            rank_inside = ranks < R
            a_ptrs = a_ptr + ranks[:, None] * stride_ar + ks[None, :] * stride_ak
            a = tl.load(a_ptrs, mask=rank_inside[:, None] & k_inside, other=0.0)
            b_ptrs = b_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
            scaled = b.to(tl.float32) * scale
            total = dot(wide(scaled, PRECISION), wide(a, PRECISION), total, PRECISION)
        squares += total * total
    length = tl.where(row_inside, tl.sqrt_rn(tl.sum(squares, axis=1)), 1.0)
    magnitude = tl.load(magnitude_ptr + rows, mask=row_inside, other=0.0).to(tl.float32)
    tl.store(length_ptr + rows, length, mask=row_inside)
    tl.store(gain_ptr + rows, tl.div_rn(magnitude, length), mask=row_inside)


@triton.jit(do_not_specialize=["M"])
def _scale_columns(
    p_ptr, gain_ptr, bias_ptr, out_ptr, M, N,
    INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A program scales a tile [BLOCK_M, BLOCK_N].
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    column_inside = columns < N
    inside = (rows < M)[:, None] & column_inside[None, :]
    offsets = rows[:, None] * N + columns[None, :]
    gain = tl.load(gain_ptr + columns, mask=column_inside, other=0.0)
    y = tl.load(p_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * gain[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0)
        y += bias.to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, cast(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _scale_columns_backward(
    dy_ptr, p_ptr, gain_ptr, dp_ptr, dgain_ptr, M, N, stride_dm, stride_dn,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A program has a tile of dy and p. dgain comes in parts [blocks of rows, N].
    block = tl.program_id(0)
    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    column_inside = columns < N
    inside = (rows < M)[:, None] & column_inside[None, :]
    offsets = rows[:, None] * N + columns[None, :]
    dy_ptrs = dy_ptr + rows[:, None] * stride_dm + columns[None, :] * stride_dn
    dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + columns, mask=column_inside, other=0.0)
    tl.store(dp_ptr + offsets, cast(dy * gain[None, :], dp_ptr.dtype.element_ty), mask=inside)
    dgain_ptrs = dgain_ptr + block.to(INDEX) * N + columns
    tl.store(dgain_ptrs, tl.sum(dy * p, axis=0), mask=column_inside)


def row_gains(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scale: float, *,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gain, length), fp32 [N] both; all given may have any strides but magnitude, and any dtype.

    `precision` is that of the product of fp32 lora_B and lora_A: "ieee", or "tf32".
    """
    given = weight, lora_A, lora_B, magnitude
    gain, length = launch(_plan_gains, given, scale, precision)
    return gain, length


def _plan_gains(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scale: float, precision: str
) -> Plan:
    (N, K), R, block_n = weight.shape, lora_A.shape[0], 32
    # 64 columns of float32 spilled registers where N and K are odd.
    block_k = 32 if weight.dtype is float32 else 64
    return planned(
        _row_gains, (triton.cdiv(N, block_n), 1, 1), (Out((N,), float32), Out((N,), float32)),
        N, K, R, *weight.stride(), *lora_A.stride(), *lora_B.stride(), scale,
        INDEX=index_type((weight, lora_A, lora_B)), PRECISION=precision,
        BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=16,
    )  # fmt: skip


def scale_columns(p: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] in the dtype of p, whose rows follow one another; gain is fp32."""
    return launch(_plan_scale, (p, gain, bias))[0]


def _plan_scale(p: Tensor, gain: Tensor, bias: Tensor | None) -> Plan:
    (M, N), out, block_m, block_n = p.shape, Out(tuple(p.shape), p.dtype), 16, 128
    return planned(
        _scale_columns, (triton.cdiv(M, block_m), triton.cdiv(N, block_n), 1), (out,), M, N,
        INDEX=index_type((p,)), HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def scale_columns_backward(dy: Tensor, p: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dp [M, N] in the dtype of p, dgain fp32 [parts, N], to be summed); dy has any strides."""
    dp, dgain = launch(_plan_scale_backward, (dy, p, gain))
    return dp, dgain


def _plan_scale_backward(dy: Tensor, p: Tensor, gain: Tensor) -> Plan:
    (M, N), block_n = p.shape, 64
    blocks = triton.cdiv(M, _ROWS)
    outs = Out((M, N), p.dtype), Out((blocks, N), float32)
    return planned(
        _scale_columns_backward, (blocks, triton.cdiv(N, block_n), 1), outs, M, N, *dy.stride(),
        INDEX=index_type((p, dy)), BLOCK_M=_ROWS, BLOCK_N=block_n,
    )  # fmt: skip
