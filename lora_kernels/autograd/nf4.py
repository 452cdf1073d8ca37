"""LoRA on a frozen weight in NF4, by `split`: one node of the graph for a layer.

    y = x weight^T + bias + scale * D(x) lora_A^T lora_B^T

Saved for backward are x, the packed weight, lora_A and lora_B by reference, h [1, M, R] and the
packed mask. No weight is dequantised outside of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..algebra import masks
from ..algebra.nf4 import NF4
from ..algebra.operands import Operands, Settings, Wanted
from ..hardware.tiles import Tiles
from ..strategies.library import frozen_gradients
from ..strategies.table import Strategy
from .autocast import without_autocast
from .function import Call, as_rows, refuse_second_derivative, refuse_transforms, shaped

# The NF4 of a packed weight. It is asked again in backward, so that an absmax which is quantised
# itself, as bitsandbytes' double quantisation has it, is never kept in float32.
Read = Callable[[Tensor], NF4]


def nf4_linear(
    x: Tensor, packed: Tensor, read: Read, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    settings: Settings, chosen: tuple[Strategy, Tiles | None],
) -> Tensor:  # fmt: skip
    """y [..., N] of x [..., K] in float16 or bfloat16; `packed` is uint8 [N, K / 2].

    Raises ValueError for an x of another K or on another device, RuntimeError under torch.func.
    """
    K = 2 * packed.shape[1]
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features, but the NF4 weight takes K = {K}")
    if not x.device == packed.device == lora_A.device == lora_B.device:
        devices = [str(t.device) for t in (x, packed, lora_A, lora_B)]
        raise ValueError(f"x, weight, lora_A and lora_B must share one device: got {devices}")
    refuse_transforms("LoRA on an NF4 weight")
    seed = masks.draw_seed(x.device) if settings.dropout else None
    call = Call(settings, seed, *chosen, 1)
    with without_autocast(x.device):
        y: Tensor = _Layer.apply(x, packed, bias, lora_A, lora_B, read, call)
    return y


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        read: Read, call: Call,
    ) -> Tensor:  # fmt: skip
        operands = _operands(read(packed), bias, lora_A, lora_B)
        settings, seed, strategy, tiles, *_ = call
        (y,), h, mask = strategy.forward(as_rows(x), operands, settings, seed, tiles)
        dx, _, ctx.dbias, dlora_A, dlora_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if dlora_A else None,
            h if dlora_B else None,
            mask if dx or dlora_A else None,
            packed if dx else None,
            lora_A,
            lora_B,
        )
        ctx.wanted, ctx.read, ctx.call = Wanted(dx, dlora_A, dlora_B), read, call
        return shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        refuse_second_derivative()
        (dy,) = gradients
        x, h, mask, packed, lora_A, lora_B = ctx.saved_tensors
        settings, _, strategy, tiles, *_ = ctx.call
        weight = None if packed is None else ctx.read(packed)
        rows, x = (as_rows(dy),), None if x is None else as_rows(x)
        dx = dlora_A = dlora_B = None
        if True in ctx.wanted:
            operands = _operands(weight, None, lora_A, lora_B)
            with without_autocast(dy.device):
                dx, dlora_A, dlora_B = strategy.backward(
                    rows, x, operands, h, mask, settings, ctx.wanted, tiles
                )
        if dx is not None:
            dx = shaped(dx, dy.shape[:-1])
        _, (dbias,) = frozen_gradients(rows, None, (False,), (ctx.dbias,))
        return dx, None, dbias, dlora_A and dlora_A[0], dlora_B and dlora_B[0], None, None


def _operands(weight: NF4 | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Operands:
    """The operands of one layer; its weight is what `low_rank_gemm` takes besides a tensor."""
    return Operands._make(((weight,), (bias,), (lora_A,), (lora_B,)))
