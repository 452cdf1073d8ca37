"""DoRA's scale of the columns of a LoRA product p [..., N], on a GPU: one node of the graph.

    y = p * gain + bias,   gain = magnitude / |weight + scale lora_B lora_A|, a row's length each

No gradient flows through the length. Forward is two launches, backward one and two of torch's.
Saved for backward are p by reference, and gain and length, fp32 [N].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..algebra.operands import Weights
from ..strategies.problem import Problem, tf32_allowed, triton_kernels
from ..strategies.table import triton_supports
from .function import as_rows, refuse_second_derivative, shaped


def launches_gain(p: Tensor, weights: Weights) -> bool:
    """Whether `scaled_columns` takes this call: on a GPU that Triton multiplies on, in no float64.

    torch.compile fuses the plain operators itself.
    """
    if torch.compiler.is_compiling() or p.numel() == 0:
        return False
    weight, _, lora_A, lora_B = weights
    device, double = p.device, torch.float64
    return _takes(device, weight.dtype) and not (lora_A.dtype is double or lora_B.dtype is double)


@cache
def _takes(device: torch.device, dtype: torch.dtype) -> bool:
    least = Problem.on(device, 1, 1, 1, 1, dtype, dropout=False)
    return device.type == "cuda" and triton_supports(least) is None


def _precision(dtype: torch.dtype) -> str:
    """That of lora_B lora_A: TF32 rounds less than a half-precision weight beside it is rounded."""
    half = dtype is not torch.float32 and torch.version.hip is None
    return "tf32" if tf32_allowed() or half else "ieee"


def scaled_columns(
    p: Tensor, weights: Weights, scale: float, magnitude: Tensor, bias: Tensor | None
) -> Tensor:
    """y [..., N] of p [..., N], in its dtype."""
    weight, _, lora_A, lora_B = weights
    y: Tensor = _Scaled.apply(p, magnitude, bias, weight, lora_A, lora_B, scale)
    return y


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, magnitude: Tensor, bias: Tensor | None, weight: Tensor,
        lora_A: Tensor, lora_B: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        kernels = triton_kernels()
        gain, length = kernels.row_gains(
            weight, lora_A, lora_B, magnitude.contiguous(), scale,
            precision=_precision(weight.dtype),
        )  # fmt: skip
        rows = as_rows(p).contiguous()
        y = kernels.scale_columns(rows, gain, None if bias is None else bias.contiguous())
        wants = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows, gain, length if wants else None)
        ctx.dtypes = magnitude.dtype, None if bias is None else bias.dtype
        return shaped(y, p.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        refuse_second_derivative()
        (dy,) = gradients
        p, gain, length = ctx.saved_tensors
        rows = as_rows(dy)
        dp, dgain = triton_kernels().scale_columns_backward(rows, p, gain)
        dmagnitude = dbias = None
        of_magnitude, of_bias = ctx.dtypes
        if ctx.needs_input_grad[1]:
            dmagnitude = (dgain.sum(0) / length).to(of_magnitude)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0).to(of_bias)
        return shaped(dp, dy.shape[:-1]), dmagnitude, dbias, None, None, None, None
