"""DoRA: the rows of weight + scale lora_B lora_A have a trained length, the magnitude m [N].

    y = bias + g * (x weight^T + scale * x lora_A^T lora_B^T)
    g = m / |weight + scale lora_B lora_A|, a row's length each; no gradient flows through it

So y is a LoRA product without bias, and g a scale of its columns. As in PEFT, dropout D concerns
both products, but not the frozen layer itself:

    y = x weight^T + bias + (g - 1) * D(x) weight^T + g * scale * D(x) lora_A^T lora_B^T

which is (x - D(x)) weight^T + bias + g * (the LoRA product of D(x)). Source: Liu et al., 2024
(DoRA), section 4; the norm as a constant is their section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra.operands import Parts, Weights
from ..autograd.autocast import without_autocast
from ..autograd.functional import lora_layer

BLOCK = 1 << 24  # elements of a half-precision weight that are wide at a time


class Dora(NamedTuple):
    """What DoRA adds to a layer's parts, whose bias is None and whose dropout 0."""

    magnitude: Tensor
    bias: Tensor | None
    dropout: float = 0.0


def dora_layer(
    x: Tensor, parts: Parts, dora: Dora, product: Callable[[Tensor, Parts], Tensor]
) -> Tensor:
    """y [..., N] of x [..., K]; `product` is the LoRA product of an x that siblings may share."""
    gain = dora.magnitude / row_norms(parts.weights, parts.settings.scale)
    if not dora.dropout:
        return _scaled(product(x, parts), gain, dora.bias)
    dropped = F.dropout(x, dora.dropout)
    y = _scaled(lora_layer(dropped, parts), gain, dora.bias)
    return y + F.linear(x - dropped, parts.weights.weight)


def _scaled(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    scaled = y * gain if bias is None else y * gain + bias
    return scaled.to(y.dtype)


@torch.no_grad()
def row_norms(weights: Weights, scale: float) -> Tensor:
    """|weight + scale lora_B lora_A| of each row, [N], in float32 at least.

    The sum is not formed: its square is |weight|^2 + 2 scale lora_B (weight lora_A^T) + scale^2
    lora_B (lora_A lora_A^T) lora_B^T, row by row. It is computed anew in every call, since a weight
    may change unseen (PEFT merges through `weight.data`); for M tokens it takes R / M of the time
    of the frozen product.
    """
    weight, _, lora_A, lora_B = weights
    wide = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device):
        lora_A, lora_B = lora_A.to(wide), scale * lora_B.to(wide)
        squares = (lora_B @ (lora_A @ lora_A.T)).mul_(lora_B).sum(1)
        rows = len(weight) if weight.dtype is wide else max(1, BLOCK // weight.shape[1])
        parts = []
        for block, B in zip(weight.split(rows), lora_B.split(rows), strict=True):
            block = block.to(wide)
            lengths = torch.linalg.vector_norm(block, dim=1).square_()
            parts.append(lengths.add_((block @ lora_A.T).mul_(B).sum(1), alpha=2))
        return squares.add_(torch.cat(parts)).clamp_(min=0).sqrt_()
