"""Few tokens on a CPU: the formula in torch's operators, with the gradients torch has for them.

There the host's calls are most of the time. torch's own nodes of the graph are C++, while a
Function of ours calls Python twice and its masks take some twenty operators. What a Function saves
is memory, and with few tokens there is none to save: x has at most `FEW_ELEMENTS` elements.

Products of rank R are float32 where x is bfloat16. For few tokens oneDNN takes 25 us and more for
such a product in bfloat16, MKL 3 to 16 in float32. Under autocast and up to `FEW_ROWS` rows the
frozen product is float32 too, and y is rounded once: to cast a float32 weight reads and writes more
than the product reads. With more rows the frozen product is rounded, and the sum again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algebra.operands import Operands, PackWeights, Settings, Weights
from ..algebra.packs import Pack, first_of
from ..strategies import problem
from .autocast import casting_off
from .function import TRANSFORMS, as_rows

_NOTHING = nullcontext()
FEW_ROWS = 16  # rows up to which a frozen weight is not cast
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_CAST = (torch.float32, torch.bfloat16)  # what autocast makes bfloat16 of, and we take


def is_few(x: Tensor, settings: Settings) -> bool:
    """Whether `auto` has few tokens on a CPU here; in a pack, each adapter.

    Siblings then run one by one: to read x once saves nothing, and a frozen weight that was just
    cast is still in the cache for its own product.
    """
    if settings.strategy != "auto" or settings.columns is not None or x.device.type != "cpu":
        return False
    few = x.numel() <= problem.FEW_ELEMENTS
    if settings.pack is not None:
        few = not few_and_many(settings.pack, x.shape[-1])[1]
    if torch.compiler.is_compiling():  # asked so, a dynamic shape gets no guard: it has many tokens
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(few)
    return few


def takes(x: Tensor, layers: Sequence[Weights | PackWeights], settings: Settings) -> bool:
    """Whether a call is one for this file: of few tokens, and nothing in it float16."""
    if not is_few(x, settings) or x.dtype not in _DTYPES:
        return False
    if TRANSFORMS is None and not torch.compiler.is_compiling():
        return False  # whether torch.func is at work is not known: `LoRALinears` refuses it
    for _, bias, lora_A, lora_B in layers:
        for tensors in (bias, lora_A, lora_B):
            first = first_of(tensors) if isinstance(tensors, tuple) else tensors
            if first is not None and first.dtype not in _DTYPES:
                return False
    return True


def computed_in(
    x: Tensor, layers: Sequence[Weights | PackWeights], settings: Settings, dtype: torch.dtype
) -> torch.dtype:
    """What x and the frozen weights are cast to under autocast to `dtype`.

    float32 for a call of at most `FEW_ROWS` rows that passes `takes`, if the weights are float32;
    else `dtype`. In a pack each adapter must have so few rows, and LoRA in this layer.
    """
    if dtype is not torch.bfloat16 or x.dtype not in _CAST:
        return dtype
    if any(each.weight.dtype is not torch.float32 for each in layers):
        return dtype
    if not takes(x, layers, settings):
        return dtype
    pack = settings.pack
    if pack is None:
        few = x.numel() <= FEW_ROWS * x.shape[-1]
    else:
        few = max(pack.counts) <= FEW_ROWS and min(pack.ranks) > 0
    return torch.float32 if few else dtype


def few_layer(x: Any, layer: Any) -> Tensor | None:
    """y of a `FusedLoRALinear` by the shortest way, for a call that `takes` and `check` would pass.

    None for any other call. The checks of those two and the calls to reach them take a third of the
    operators' time.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return None
    if torch.jit.is_tracing():  # in which x.numel() is a tensor
        return None
    if x.numel() > problem.FEW_ELEMENTS or layer.strategy != "auto" or not layer.is_plain:
        return None
    own, K, N = layer._parameters.get, layer.in_features, layer.out_features
    weight, bias, lora_A, lora_B = own("weight"), own("bias"), own("lora_A"), own("lora_B")
    dropout = layer.dropout if layer.training else 0.0
    if (
        not type(weight) is type(lora_A) is type(lora_B) is nn.Parameter
        or not (weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu)
        or weight.requires_grad
        or x.shape[-1:] != (K,)
        or weight.shape != ((K, N) if layer.conv1d else (N, K))
        or lora_A.shape != (layer.rank, K)
        or lora_B.shape != (N, layer.rank)
        or lora_A.dtype not in _DTYPES
        or lora_B.dtype not in _DTYPES
        or not 0 <= dropout < 1
        or TRANSFORMS is None
        or TRANSFORMS() is not None
    ):
        return None
    if bias is not None and (
        bias.requires_grad
        or bias.shape != (N,)
        or not bias.is_cpu
        or bias.dtype not in _DTYPES
    ):  # fmt: skip
        return None
    half, dtype = torch.is_autocast_enabled("cpu"), weight.dtype
    if half:
        dtype = torch.get_autocast_dtype("cpu")
        if dtype is not torch.bfloat16 or x.dtype not in _CAST or weight.dtype not in _CAST:
            return None
        few = weight.dtype is torch.float32 and x.numel() <= FEW_ROWS * K
        computed = torch.float32 if few else dtype
        x, weight = x.to(computed), weight.to(computed)
    elif x.dtype is not dtype or dtype not in _DTYPES:
        return None
    if layer.conv1d:
        weight = weight.t()
    with casting_off() if half else _NOTHING:
        y = _one(as_rows(x), weight, bias, lora_A, lora_B, layer.scale, dropout)
    return _result(y, x, dtype)


def few_and_many(pack: Pack, K: int) -> tuple[list[int], list[int]]:
    """The adapters of few tokens, or without LoRA in this layer, and those of many tokens."""
    parts: tuple[list[int], list[int]] = [], []
    for c, (count, rank) in enumerate(zip(pack.counts, pack.ranks, strict=True)):
        parts[rank > 0 and count * K > problem.FEW_ELEMENTS].append(c)
    return parts


def few_linears(
    x: Tensor, operands: Operands, settings: Settings, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """y [..., N] of each layer that reads x [..., K], in `dtype` (default: that of x)."""
    rows, scale, dropout = as_rows(x), settings.scale, settings.dropout
    layers = zip(*operands)  # noqa: B905 (as many of each)
    with _as_they_are():
        ys = [_one(rows, *layer, scale, dropout) for layer in layers]
    return tuple([_result(y, x, dtype) for y in ys])


def _one(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """y [M, N] of one layer that reads x [M, K]."""
    own = F.dropout(x, dropout) if dropout else x
    return _added(_frozen(x, weight, bias), own, lora_A, lora_B, scale)


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias if bias is None else _as(bias, x.dtype))


def _as_they_are() -> AbstractContextManager[Any]:
    """Inside, autocast leaves operators alone; in compiled code `_linear` alone sees to that."""
    return _NOTHING if torch.compiler.is_compiling() else casting_off()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in the dtype of x and weight."""
    if torch.compiler.is_compiling() and torch.is_autocast_enabled("cpu"):
        y: Tensor = _Uncast.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class _Uncast(torch.autograd.Function):
    """apply(x [M, K], weight [N, K]) -> x weight^T, for compiled code under autocast.

    torch.compile traces backward under the autocast of the forward. So it would cast what a product
    of torch's own has saved, the frozen weight too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            dx = dy @ weight if ctx.needs_input_grad[0] else None
            return dx, dy.t() @ x if ctx.needs_input_grad[1] else None


def few_packed(
    x: Tensor, operands: Operands, settings: Settings,
    generators: Sequence[torch.Generator | None], dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same of a pack: one frozen product for all rows, and each adapter's on its own.

    An adapter's masks come from its generator: those of `few_linears` if that were torch's own.
    """
    pack, rows = settings.pack, as_rows(x)
    assert pack is not None
    C, own, ys = len(pack.ranks), rows.split(pack.counts), []
    with _as_they_are():
        for g, (weight, bias) in enumerate(zip(operands.weight, operands.bias, strict=True)):
            blocks = list(_frozen(rows, weight, bias).split(pack.counts))
            for c, block in enumerate(own):
                lora_A, lora_B = operands.lora_A[g * C + c], operands.lora_B[g * C + c]
                if lora_A is None:
                    continue
                if pack.dropouts[c] and len(block):
                    block = _dropped(block, pack.dropouts[c], generators[c])
                blocks[c] = _added(blocks[c], block, lora_A, lora_B, pack.scales[c])
            ys.append(_result(torch.cat(blocks), x, dtype))
    return tuple(ys)


def _dropped(x: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """F.dropout, operator by operator, by another generator than torch's own."""
    kept = torch.empty_like(x).bernoulli_(1 - dropout, generator=generator)
    return x * kept.div_(1 - dropout)


def _added(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """y + scale * x lora_A^T lora_B^T in the dtype of y; the sum is rounded once."""
    wide = torch.float32 if x.dtype is torch.bfloat16 else x.dtype
    h = _linear(_as(x, wide), _as(lora_A, wide))
    if torch.compiler.is_compiling():  # Inductor of torch 2.13 drops the alpha of such a sum
        return _as(y + scale * _linear(h, _as(lora_B, wide)), y.dtype)
    return _as(torch.addmm(_as(y, wide), h, _as(lora_B, wide).t(), alpha=scale), y.dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`; itself if it is so already."""
    return t if t.dtype is dtype else t.to(dtype)


def _result(y: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """y [M, N] in the shape of x [..., K]."""
    y = y if dtype is None else _as(y, dtype)
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[1])
