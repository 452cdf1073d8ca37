"""lora_linear: the fused layer as a function of tensors, and the check of what it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import masks
from ..algebra.columns import Ranges, check_columns, widths
from ..strategies.choose import decide
from ..strategies.table import check_strategy
from . import operators
from .autocast import autocast_dtype
from .function import _apply, _Call, _rows


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    strategy: str = "auto",
) -> Tensor:
    """A frozen linear layer plus its low-rank update, forward and backward fused.

        y = x weight^T + bias + scale * D(x) lora_A^T lora_B^T

    x [..., K], weight [N, K] (any strides, so a Conv1D weight is passed as `weight.T`), bias [N],
    lora_A [R, K], lora_B [N, R] -> y [..., N]. D is dropout with probability `dropout`, on the
    low-rank branch alone and only if `training`. x and weight share one of fp16, bf16, fp32, fp64;
    lora_A and lora_B may be of any floating dtype and get their gradients in it. Under
    torch.autocast x and weight are cast to its dtype. LoRA freezes weight; one that asks for a
    gradient gets it, by a plain product.

    Raises ValueError for shapes that do not fit, a rank below 1, mixed devices, a dropout outside
    [0, 1) or an unknown strategy; TypeError for dtypes that do not fit; RuntimeError under
    torch.func. Source: Hu et al., 2021 (LoRA), section 4.1; dropout as in Hugging Face PEFT.

    >>> y = lora_linear(x, layer.weight, lora_A, lora_B, bias=layer.bias, scale=2.0, dropout=0.1)
    """
    parts = Parts(weight, bias, lora_A, lora_B, scale, dropout, training, strategy)
    return lora_layer(x, parts)


class Parts(NamedTuple):
    """One layer, as a call needs it: the arguments of `lora_linear` besides x."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout: float
    training: bool
    strategy: str


def lora_layer(x: Tensor, parts: Parts, columns: Ranges | None = None) -> Tensor:
    """`lora_linear` of a layer's parts."""
    weight, bias, lora_A, lora_B, scale, dropout, training, strategy = parts
    (y,) = lora_linears(
        x, (weight,), (lora_A,), (lora_B,), () if bias is None else (bias,), scale=scale,
        dropout=dropout, training=training, strategy=strategy, columns=columns,
    )  # fmt: skip
    return y


def lora_linears(
    x: Tensor, weights: tuple[Tensor, ...], lora_A: tuple[Tensor, ...], lora_B: tuple[Tensor, ...],
    biases: tuple[Tensor, ...], *, scale: float, dropout: float, training: bool, strategy: str,
    columns: Ranges | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`lora_linear` for a group of layers that read the same x at one rank, scale and dropout.

    `biases` has one for each layer, or is empty. One read of x serves all, and one dx sums over
    all; every layer draws a dropout mask of its own. Layers that differ in rank or layout run
    one by one. With `columns`, ascending (start, stop), the only weight has LoRA on those ranges of
    its N columns: lora_A [G R, K] and lora_B [sum of widths, R] hold the ranges' adapters stacked,
    and each range draws a mask of its own.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.is_floating_point() and x.dtype is not torch.float64:
        x, weights = x.to(dtype), tuple(weight.to(dtype) for weight in weights)
    G = len(weights)
    for g in range(G):
        check(x, weights[g], biases[g] if biases else None, lora_A[g], lora_B[g], dropout, columns)
    if any(bias.stride(0) != 1 for bias in biases):
        biases = tuple(bias.contiguous() for bias in biases)
    if G > 1 and not _one_layout(weights, lora_A, lora_B, biases):
        options: Any = {
            "scale": scale,
            "dropout": dropout,
            "training": training,
            "strategy": strategy,
        }
        one = (slice(g, g + 1) for g in range(G))
        alone = (
            lora_linears(x, weights[g], lora_A[g], lora_B[g], biases[g], **options) for g in one
        )
        return tuple(y for (y,) in alone)
    R, K = lora_B[0].shape[1], lora_A[0].shape[1]
    N = max(weight.shape[0] for weight in weights) if G > 1 else weights[0].shape[0]
    count, sliced = (G, False) if columns is None else (len(columns), True)
    if not training:
        dropout = 0.0
    check_strategy(strategy)
    seed = masks.draw_seed(x.device) if dropout else None
    if torch.compiler.is_compiling():
        flat = [edge for each in columns or () for edge in each]
        y = operators.forward(
            _rows(x), weights, lora_A, lora_B, biases, seed, flat, scale, dropout, strategy
        )[2:]
        return (
            tuple(y)
            if x.dim() == 2
            else tuple(each.view(*x.shape[:-1], each.shape[1]) for each in y)
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "lora_linear has no rules for torch.func transforms (vmap, grad, jvp): call it outside"
        )
    M = x.shape[0] if x.dim() == 2 else x.numel() // K if K else 0
    drops = dropout > 0
    row, tiles = decide(x.device, M, N, K, R, x.dtype, drops, count, sliced, strategy)
    call = _Call(scale, dropout, seed, row, tiles, G, columns)
    return _apply(x, call, *weights, *lora_A, *lora_B, *biases)


def _one_layout(
    weights: tuple[Tensor, ...], lora_A: tuple[Tensor, ...], lora_B: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
) -> bool:  # fmt: skip
    """Whether kernels may take the strides, the dtypes and the rank of the first for all.

    Each layer has passed `check`: its shapes follow from x, its rank and its N.
    """
    layouts = [
        (A.shape[0], weight.stride(), A.stride(), B.stride(), A.dtype, B.dtype)
        for weight, A, B in zip(weights, lora_A, lora_B, strict=True)
    ]
    return layouts.count(layouts[0]) == len(layouts) and len({b.dtype for b in biases}) < 2


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout: float,
    columns: Ranges | None = None,
) -> None:  # fmt: skip
    """One error that names the values, for inputs that do not fit."""
    if x.dim() < 1 or weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"x needs at least one dimension and weight, lora_A, lora_B two: got "
            f"{_shape(x)}, {_shape(weight)}, {_shape(lora_A)}, {_shape(lora_B)}"
        )
    N, K = weight.shape
    R, rows, width = lora_A.shape[0], lora_A.shape[0], N
    if columns is not None:
        check_columns(columns, N)
        R, width = lora_B.shape[1], sum(widths(columns))
        rows = len(columns) * R
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features, but weight {_shape(weight)} takes K = {K}")
    if R < 1:
        raise ValueError(f"the rank must be at least 1: lora_A is {_shape(lora_A)}")
    if lora_A.shape != (rows, K) or lora_B.shape != (width, R):
        where = "" if columns is None else f" with LoRA on columns {list(columns)}"
        raise ValueError(
            f"for weight {_shape(weight)} and rank {R}{where}, lora_A must be [{rows}, {K}] and "
            f"lora_B [{width}, {R}]: got {_shape(lora_A)} and {_shape(lora_B)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"bias must be [{N}]: got {_shape(bias)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1): got {dropout}")
    if not (x.is_floating_point() and lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise TypeError(
            f"x, lora_A and lora_B must be of a floating dtype: got {x.dtype}, {lora_A.dtype}, "
            f"{lora_B.dtype}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}: cast one, or use torch.autocast"
        )
    device = x.device
    if not (device == weight.device == lora_A.device == lora_B.device) or (
        bias is not None and bias.device != device
    ):
        devices = [str(t.device) for t in (x, weight, bias, lora_A, lora_B) if t is not None]
        raise ValueError(
            f"x, weight, (bias,) lora_A and lora_B must share one device: got {devices}"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
