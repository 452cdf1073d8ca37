"""Few tokens on a CPU: the formula in torch's operators, with the gradients torch has for them.

There the host's calls are most of the time. torch's own nodes of the graph are C++, while a
Function of ours calls Python twice and its masks take ten more operators. What a Function saves is
memory, and with few tokens there is none to save: the dropped copy of x has at most FEW elements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra.operands import Operands, Settings
from ..strategies.choose import FEW
from .function import as_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def takes(x: Tensor, operands: Operands, settings: Settings, autocast: bool) -> bool:
    """Whether a call is one for `few_linears`: `auto` on a CPU, of few tokens and plain dtypes.

    Adapters of another dtype than x pass where autocast casts them, as it casts eager code's.
    """
    if (
        x.numel() > FEW
        or settings.strategy != "auto"
        or settings.columns is not None
        or x.device.type != "cpu"
        or x.dtype not in _DTYPES
        or operands.lora_A[0].dim() != 2
    ):
        return False
    if autocast:
        return True
    dtype, bias = x.dtype, operands.bias[0]
    return (
        operands.lora_A[0].dtype is operands.lora_B[0].dtype is dtype
        and (bias is None or bias.dtype is dtype)
    )  # fmt: skip


def few_linears(x: Tensor, operands: Operands, settings: Settings) -> tuple[Tensor, ...]:
    """y [..., N] of each layer that reads x [..., K]."""
    scale, dropout = settings.scale, settings.dropout
    rows = as_rows(x)
    ys = []
    for weight, bias, lora_A, lora_B in zip(*operands):  # noqa: B905 (as many of each)
        h = F.linear(F.dropout(rows, dropout) if dropout else rows, lora_A)
        y = F.linear(rows, weight, bias)
        y = y.add(F.linear(h, lora_B), alpha=scale)
        if y.requires_grad:
            y.register_hook(_once)
        ys.append(y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[1]))
    return tuple(ys)


def _once(dy: Tensor) -> None:
    """Refuses a second derivative, as every other strategy has to."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lora_linear has no second derivative: call backward without create_graph=True"
        )
