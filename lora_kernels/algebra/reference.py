"""LoRA's linear layer in plain PyTorch: the oracle that every kernel is judged against.

    y  = x weight^T + bias + scale * D(x) lora_A^T lora_B^T,      D(x) = x * keep / (1 - p)

x [M, K], weight [N, K], bias [N], lora_A [R, K], lora_B [N, R], keep [M, K] of bool.
Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.
Any floating dtype; the gradients are written out so that a kernel's launcher can be read beside
them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """What backward returns, in the order of the inputs."""

    dx: Tensor
    dlora_A: Tensor
    dlora_B: Tensor
    dbias: Tensor


def dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """D(x): x where `keep`, scaled by 1 / (1 - dropout); x itself without a mask."""
    return x if keep is None else x * keep / (1 - dropout)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y [M, N]; differentiable by autograd, so it is the oracle of the gradients as well."""
    h = dropped(x, keep, dropout) @ lora_A.T
    y = x @ weight.T + scale * (h @ lora_B.T)
    return y if bias is None else y + bias


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scale: float = 1.0,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Gradients:
    """The algebra of backward, one line a gradient."""
    dropped_x = dropped(x, keep, dropout)
    h = dropped_x @ lora_A.T
    dh = scale * (dy @ lora_B)
    return Gradients(
        dx=dy @ weight + dropped(dh @ lora_A, keep, dropout),
        dlora_A=dh.T @ dropped_x,
        dlora_B=scale * (dy.T @ h),
        dbias=torch.sum(dy, dim=0),
    )
