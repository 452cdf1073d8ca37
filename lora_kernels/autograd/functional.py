"""lora_linear: the fused layer as a function of tensors, and the check of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments
from ..algebra import masks
from ..algebra.columns import check_columns, widths
from ..algebra.operands import Operands, Parts, Settings, Weights
from ..strategies.choose import decide
from ..strategies.table import check_strategy
from . import operators
from .autocast import autocast_dtype
from .few import computed_in, few_linears, takes
from .function import Call, apply, as_rows, refuse_transforms


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
    [0, 1) or an unknown strategy; TypeError for dtypes that do not fit, and for a DTensor;
    RuntimeError under torch.func and torch.jit.trace. Source: Hu et al., 2021 (LoRA), section 4.1;
    dropout as in Hugging Face PEFT.

    >>> y = lora_linear(x, layer.weight, lora_A, lora_B, bias=layer.bias, scale=2.0, dropout=0.1)
    """
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        arguments.tensor(name, value)
    if bias is not None:
        arguments.tensor("bias", bias)
    arguments.finite("scale", scale)
    arguments.probability("dropout", dropout)
    arguments.flag("training", training)
    weights = Weights(weight, bias, lora_A, lora_B)
    return lora_layer(x, Parts(weights, Settings(scale, dropout if training else 0.0, strategy)))


def lora_layer(x: Tensor, parts: Parts) -> Tensor:
    """`lora_linear` of a layer's parts."""
    (y,) = lora_linears(x, (parts.weights,), parts.settings)
    return y


def lora_linears(x: Tensor, layers: tuple[Weights, ...], settings: Settings) -> tuple[Tensor, ...]:
    """`lora_linear` for layers that read the same x with the same settings.

    One read of x serves all, one dx sums over all, and every layer draws a dropout mask of its own.
    Layers that differ in rank or layout run one by one. With `settings.columns` there is one layer,
    and each range of its columns draws a mask of its own.
    """
    if not isinstance(x, Tensor):
        arguments.tensor("x", x)
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record a LoRA layer: merge(model) first, or use torch.export "
            "or torch.compile"
        )
    dtype = autocast_dtype(x.device)
    if not x.is_floating_point() or x.dtype is torch.float64:
        dtype = None  # autocast leaves these alone
    if dtype is not None:
        computed = computed_in(x, layers, settings, dtype)
        x, layers = x.to(computed), tuple([_in_dtype(weights, computed) for weights in layers])
    for weights in layers:
        check(x, weights, settings)
    if len(layers) > 1 and not _one_layout(layers):
        return tuple([lora_linears(x, (weights,), settings)[0] for weights in layers])
    operands = Operands.of(layers)
    if any(map(_is_strided, operands.bias)):  # kernels read a bias as it lies
        operands = operands._replace(bias=tuple([bias.contiguous() for bias in operands.bias]))  # type: ignore[union-attr]
    check_strategy(settings.strategy)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        refuse_transforms()
    if takes(x, layers, settings):
        return few_linears(x, operands, settings, dtype)
    seed = masks.draw_seed(x.device) if settings.dropout else None
    if compiling:
        y = operators.call(as_rows(x), operands, settings, seed)
        return y if x.dim() == 2 else tuple([t.view(*x.shape[:-1], t.shape[1]) for t in y])
    strategy, tiles = decide(x, operands, settings)
    call = Call(settings, seed, strategy, tiles, len(layers))
    return apply(x, call, *operands.flatten())


def _in_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """The layer with its frozen weight in `dtype`; itself if it is so already."""
    weight = weights.weight
    return weights if weight.dtype is dtype else weights._replace(weight=weight.to(dtype))


def _is_strided(bias: Tensor | None) -> bool:
    return bias is not None and bias.stride(0) != 1


def _one_layout(layers: tuple[Weights, ...]) -> bool:
    """Whether kernels may take the strides, the dtypes and the rank of the first for all.

    Each layer has passed `check`: its shapes follow from x, its rank and its N.
    """
    layouts = [
        (
            lora_A.shape[0], weight.stride(), lora_A.stride(), lora_B.stride(), lora_A.dtype,
            lora_B.dtype, bias if bias is None else bias.dtype,
        )
        for weight, bias, lora_A, lora_B in layers
    ]  # fmt: skip
    return layouts.count(layouts[0]) == len(layouts)


def check(x: Tensor, weights: Weights, settings: Settings) -> None:
    """One error that names the values, for inputs that do not fit: ValueError, or TypeError."""
    (weight, bias, lora_A, lora_B), columns = weights, settings.columns
    if is_dtensor(x) or is_dtensor(weight) or is_dtensor(lora_A) or is_dtensor(lora_B):
        raise TypeError(
            "a LoRA layer takes no DTensor: tensor parallelism is not supported, and what FSDP2 "
            "shards is whole only in a forward of the unit that holds the layer"
        )
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
    if not 0 <= settings.dropout < 1:
        arguments.probability("dropout", settings.dropout)
    floating = x.is_floating_point() and lora_A.is_floating_point() and lora_B.is_floating_point()
    if not floating or not (bias is None or bias.is_floating_point()):
        dtypes = ", ".join(str(t.dtype) for t in (x, bias, lora_A, lora_B) if t is not None)
        raise TypeError(f"x, (bias,) lora_A and lora_B must be of a floating dtype: got {dtypes}")
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


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes, whatever shape it shows."""
    return type(tensor).__name__ == "DTensor"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
