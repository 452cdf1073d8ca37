"""LoRA added to a y that another library has computed: its frozen product, and its gradient, stay.

    y + scale * D(x) lora_A^T lora_B^T

Saved for backward are x by reference, h [M, R] and the packed mask: nothing of the frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra import masks
from ..algebra.operands import Operands, Settings, Wanted, rank_dtype
from ..strategies.library import add_low_rank, library_backward
from .autocast import without_autocast
from .function import as_rows, refuse_second_derivative


def add_lora_to(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, settings: Settings) -> Tensor:
    """y [..., N] plus the low-rank product of x [..., K]; y itself is used up, where it can be.

    A y that is a view of another tensor, or one that no graph has made, is left as it is.

    Backward raises RuntimeError where x wants a gradient and the library gave y none: that of the
    low-rank part alone would be wrong. torch.compile's graph raises it at once.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        wide = rank_dtype(y.dtype, lora_A.dtype)
        h = F.linear(F.dropout(x, settings.dropout).to(wide), lora_A.to(wide))
        return y + settings.scale * F.linear(h, lora_B.to(wide)).to(y.dtype)
    if y._is_view() or y.is_inference() or not y.is_contiguous() or (y.requires_grad and y.is_leaf):
        y = y.clone()
    seed = masks.draw_seed(x.device) if settings.dropout else None
    with without_autocast(x.device):
        result: Tensor = _Addition.apply(y, x.to(y.dtype), lora_A, lora_B, settings, seed)
    return result


_NO_GRADIENT = (
    "the frozen layer below LoRA gives no gradient of its input, since it quantises that as well: "
    "what lies before it would train on a wrong gradient. Quantise the weight alone, or compute "
    "under torch.no_grad()"
)


class _Addition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, settings: Settings,
        seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        _, *needs = ctx.needs_input_grad[:4]
        wanted = Wanted(*needs)
        operands = Operands((), (), (lora_A,), (lora_B,))
        _, h, mask = add_low_rank(as_rows(y), as_rows(x), operands, settings, seed)
        ctx.mark_dirty(y)
        ctx.save_for_backward(
            x if wanted.dlora_A else None,
            h if wanted.dlora_B else None,
            mask if wanted.dx or wanted.dlora_A else None,
            lora_A,
            lora_B,
        )
        ctx.settings, ctx.wanted = settings, wanted
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        refuse_second_derivative()
        if ctx.wanted.dx and not ctx.needs_input_grad[0]:
            raise RuntimeError(_NO_GRADIENT)
        (dy,) = gradients
        x, h, mask, lora_A, lora_B = ctx.saved_tensors
        operands = Operands((), (), (lora_A,), (lora_B,))
        rows = None if x is None else as_rows(x)
        with without_autocast(dy.device):
            dx, dlora_A, dlora_B = library_backward(
                (as_rows(dy),), rows, operands, h, mask, ctx.settings, ctx.wanted, None
            )
        dx = None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1])
        return (
            dy if ctx.needs_input_grad[0] else None,
            dx,
            dlora_A and dlora_A[0],
            dlora_B and dlora_B[0],
            None,
            None,
        )
