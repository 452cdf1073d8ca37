"""Parameters that a call does not use, and whose gradient shall be zero instead of missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def with_zero_gradients(y: Tensor, absent: Iterable[Tensor]) -> Tensor:
    """A copy of y whose backward gives each of `absent` a gradient of zero; y if none trains.

    Processes that train together need it. FSDP2 sends the gradients that there are: where one
    process lacks one, their messages differ in length.
    """
    trained = [p for p in absent if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return y
    result: Tensor = _Absent.apply(y, *trained)
    return result


class _Absent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *absent: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in absent]
        return y.clone()  # a view could not be changed in place by whoever gets it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        zeros = [torch.zeros(shape, dtype=dtype, device=where) for shape, dtype, where in ctx.like]
        return (*gradients, *zeros)
