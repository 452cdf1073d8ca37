"""Few tokens on a CPU: the formula in torch's operators, with the gradients torch has for them.

There the host's calls are most of the time. torch's own nodes of the graph are C++, while a
Function of ours calls Python twice and its masks take ten more operators. What a Function saves is
memory, and with few tokens there is none to save: x has at most `problem.FEW` elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra.operands import Operands, Settings
from ..algebra.packs import Pack, first_of
from ..strategies import problem
from .function import as_rows, refuse_second_derivative

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def takes(x: Tensor, operands: Operands, settings: Settings, autocast: bool) -> bool:
    """Whether a call is one for this file: `auto` on a CPU, of few tokens and plain dtypes.

    In a pack each adapter has few tokens. Adapters of another dtype than x pass where autocast
    casts them, as it casts eager code's.
    """
    pack = settings.pack
    few = x.numel() <= problem.FEW if pack is None else not few_and_many(pack, x.shape[-1])[1]
    if torch.compiler.is_compiling():  # asked so, a dynamic shape gets no guard: it has many tokens
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        few = statically_known_true(few)
    if (
        not few
        or settings.strategy != "auto"
        or settings.columns is not None
        or x.device.type != "cpu"
        or x.dtype not in _DTYPES
    ):
        return False
    if autocast:
        return True
    dtype, bias = x.dtype, operands.bias[0]
    return (
        first_of(operands.lora_A).dtype is first_of(operands.lora_B).dtype is dtype
        and (bias is None or bias.dtype is dtype)
    )  # fmt: skip


def few_and_many(pack: Pack, K: int) -> tuple[list[int], list[int]]:
    """The adapters of few tokens, or without LoRA in this layer, and those of many tokens."""
    parts: tuple[list[int], list[int]] = [], []
    for c, (count, rank) in enumerate(zip(pack.counts, pack.ranks, strict=True)):
        parts[rank > 0 and count * K > problem.FEW].append(c)
    return parts


def few_linears(x: Tensor, operands: Operands, settings: Settings) -> tuple[Tensor, ...]:
    """y [..., N] of each layer that reads x [..., K]."""
    rows, scale, dropout = as_rows(x), settings.scale, settings.dropout
    ys = []
    for weight, bias, lora_A, lora_B in zip(*operands):  # noqa: B905 (as many of each)
        own = F.dropout(rows, dropout) if dropout else rows
        y = _added(F.linear(rows, weight, bias), own, lora_A, lora_B, scale)
        ys.append(_result(y, x))
    return tuple(ys)


def few_packed(
    x: Tensor, operands: Operands, settings: Settings, generators: Sequence[torch.Generator | None]
) -> tuple[Tensor, ...]:
    """The same of a pack: one frozen product for all rows, and each adapter's on its own.

    An adapter's masks come from its generator: those of `few_linears` if that were torch's own.
    """
    pack, rows = settings.pack, as_rows(x)
    assert pack is not None
    C, own, ys = len(pack.ranks), rows.split(pack.counts), []
    for g, (weight, bias) in enumerate(zip(operands.weight, operands.bias, strict=True)):
        blocks = list(F.linear(rows, weight, bias).split(pack.counts))
        for c, block in enumerate(own):
            lora_A, lora_B = operands.lora_A[g * C + c], operands.lora_B[g * C + c]
            if lora_A is None:
                continue
            if pack.dropouts[c] and len(block):
                block = _dropped(block, pack.dropouts[c], generators[c])
            blocks[c] = _added(blocks[c], block, lora_A, lora_B, pack.scales[c])
        ys.append(_result(torch.cat(blocks), x))
    return tuple(ys)


def _dropped(x: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """F.dropout, operator by operator, by another generator than torch's own."""
    kept = torch.empty_like(x).bernoulli_(1 - dropout, generator=generator)
    return x * kept.div_(1 - dropout)


def _added(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """y + scale * x lora_A^T lora_B^T.

    Casts are made here: those that autocast keeps are stale where `layer.to(dtype)` exchanges the
    numbers of a parameter.
    """
    if lora_A.dtype is not x.dtype:
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    added = F.linear(F.linear(x, lora_A), lora_B)
    if torch.compiler.is_compiling():  # Inductor of torch 2.13 drops the alpha of such a sum
        return y + scale * added
    return y.add(added, alpha=scale)


def _result(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] in the shape of x [..., K]."""
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(lambda dy: refuse_second_derivative())
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[1])
