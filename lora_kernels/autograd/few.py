"""Few tokens on a CPU: the formula in torch's operators, with the gradients torch has for them.

There the host's calls are most of the time. torch's own nodes of the graph are C++, while a
Function of ours calls Python twice and its masks take ten more operators. What a Function saves is
memory, and with few tokens there is none to save: x has at most `masks.FEW` elements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra import masks
from ..algebra.operands import Operands, Settings
from ..algebra.packs import first_of
from .function import as_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def takes(x: Tensor, operands: Operands, settings: Settings, autocast: bool) -> bool:
    """Whether a call is one for this file: `auto` on a CPU, of few tokens and plain dtypes.

    In a pack each adapter has few tokens. Adapters of another dtype than x pass where autocast
    casts them, as it casts eager code's.
    """
    pack = settings.pack
    elements = x.numel() if pack is None else max(pack.counts) * x.shape[-1]
    few = elements <= masks.FEW
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


def few_linears(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None
) -> tuple[Tensor, ...]:
    """y [..., N] of each layer that reads x [..., K].

    `seed` is None without dropout, and in code that torch.compile traces: the masks are torch's own
    there, since a generator cannot be traced.
    """
    rows, G = as_rows(x), len(operands.weight)
    scale, dropped = settings.scale, (rows,) * G
    if seed is not None:
        scale, dropped = _dropped(rows, G, seed, scale, settings.dropout)
    elif settings.dropout:
        dropped = tuple([F.dropout(rows, settings.dropout) for _ in dropped])
    ys = []
    for own, weight, bias, lora_A, lora_B in zip(dropped, *operands):  # noqa: B905 (as many of each)
        y = _added(F.linear(rows, weight, bias), own, lora_A, lora_B, scale)
        ys.append(_result(y, x))
    return tuple(ys)


def few_packed(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None
) -> tuple[Tensor, ...]:
    """The same of a pack: one frozen product for all rows, and each adapter's on its own."""
    pack, rows, G = settings.pack, as_rows(x), len(operands.weight)
    assert pack is not None
    C = len(pack.ranks)
    own = []  # of each adapter the scale, and x for each layer
    for c, block in enumerate(rows.split(pack.counts)):
        scale, dropout = pack.scales[c], pack.dropouts[c]
        if seed is None or not dropout:
            own.append((scale, (block,) * G))
        else:
            own.append(_dropped(block, G, seed[c : c + 1], scale, dropout))
    ys = []
    for g, (weight, bias) in enumerate(zip(operands.weight, operands.bias, strict=True)):
        blocks = list(F.linear(rows, weight, bias).split(pack.counts))
        for c, (scale, dropped) in enumerate(own):
            lora_A, lora_B = operands.lora_A[g * C + c], operands.lora_B[g * C + c]
            if lora_A is not None:
                blocks[c] = _added(blocks[c], dropped[g], lora_A, lora_B, scale)
        ys.append(_result(torch.cat(blocks), x))
    return tuple(ys)


def _dropped(
    rows: Tensor, layers: int, seed: Tensor, scale: float, dropout: float
) -> tuple[float, tuple[Tensor, ...]]:
    """The scale with dropout's factor, and the rows as each layer keeps them, without it."""
    kept = masks.draw_few(seed, (layers, *rows.shape), dropout, rows.dtype)
    return scale / (1 - dropout), tuple([rows * each for each in kept.unbind()])


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
        y.register_hook(_once)
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[1])


def _once(dy: Tensor) -> None:
    """Refuses a second derivative, as every other strategy has to."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lora_linear has no second derivative: call backward without create_graph=True"
        )
