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
from ..autograd.gain import launches_gain, scaled_columns

# The elements of the sum that there are at a time: on a CPU, and elsewhere.
CACHED, BLOCK = 1 << 18, 1 << 24


class Dora(NamedTuple):
    """What DoRA adds to a layer's parts, whose bias is None and whose dropout 0."""

    magnitude: Tensor
    bias: Tensor | None
    dropout: float = 0.0


def dora_layer(
    x: Tensor, parts: Parts, dora: Dora, product: Callable[[Tensor, Parts], Tensor]
) -> Tensor:
    """y [..., N] of x [..., K]; `product` is the LoRA product of an x that siblings may share."""
    if not dora.dropout:
        return _scaled(product(x, parts), parts, dora)
    dropped = F.dropout(x, dora.dropout)
    y = _scaled(lora_layer(dropped, parts), parts, dora)
    return y + F.linear(x - dropped, parts.weights.weight)


def _scaled(p: Tensor, parts: Parts, dora: Dora) -> Tensor:
    """bias + g * p [..., N], in the dtype of p."""
    weights, scale = parts.weights, parts.settings.scale
    if launches_gain(p, weights):
        return scaled_columns(p, weights, scale, dora.magnitude, dora.bias)
    scaled = p * (dora.magnitude / row_norms(weights, scale))
    return (scaled if dora.bias is None else scaled + dora.bias).to(p.dtype)


@torch.no_grad()
def row_norms(weights: Weights, scale: float) -> Tensor:
    """|weight + scale lora_B lora_A| of each row, [N], in float32 at least.

    The sum is formed for a block of rows at a time, which a CPU still has in its cache when it is
    squared. It is computed anew in every call, since a weight may change unseen (PEFT merges
    through `weight.data`); for M tokens it takes R / M of the time of the frozen product.
    """
    weight, _, lora_A, lora_B = weights
    wide = torch.promote_types(weight.dtype, torch.float32)
    cached = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, (CACHED if cached else BLOCK) // max(1, weight.shape[1]))
    with without_autocast(weight.device):
        lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
        lengths = [
            torch.linalg.vector_norm(torch.addmm(block.to(wide), B, lora_A, alpha=scale), dim=1)
            for block, B in zip(weight.split(rows), lora_B.split(rows), strict=True)
        ]
        return lengths[0] if len(lengths) == 1 else torch.cat(lengths)
