"""The autograd Function behind `lora_linear`: one node of the graph for a layer or a group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.columns import Ranges
from ..algebra.operands import Layers, Wanted
from ..hardware.tiles import Tiles
from ..strategies.table import Strategy
from .autocast import autocast_dtype, without_autocast


class _Call(NamedTuple):
    """What a call has besides tensors; one argument, because every argument of apply costs time."""

    scale: float
    dropout: float
    seed: Tensor | None
    strategy: Strategy
    tiles: Tiles | None
    G: int  # how many weights; with `columns`, one
    columns: Ranges | None


class _LoRALinears(torch.autograd.Function):
    """One graph node a group; saves x by reference, h and the packed masks, no copy of anything.

    apply(x, call, *weights, *lora_A, *lora_B, *biases) -> the output of each layer. x [..., K] is
    seen as rows here rather than outside, where each view would be a node of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *parameters: Tensor) -> tuple[Tensor, ...]:
        scale, dropout, seed, strategy, tiles, G, columns = call
        layers = _layers(G, parameters, columns)
        y, h, mask = strategy.forward(_rows(x), layers, scale, dropout, seed, tiles)
        needs = ctx.needs_input_grad
        first_A, first_B = _FIRST + G, _FIRST + 2 * G
        wants_dA, wants_dB = True in needs[first_A:first_B], True in needs[first_B : first_B + G]
        wants_dx, wants_dweight = needs[0], True in needs[_FIRST:first_A]
        ctx.save_for_backward(
            x if wants_dA or wants_dweight else None,
            h if wants_dB else None,
            mask if wants_dx or wants_dA else None,
            *(parameters[:G] if wants_dx else (None,) * G),
            *parameters[G : 3 * G],
        )
        ctx.call, ctx.wanted = call, Wanted(wants_dx, wants_dA, wants_dB)
        return y if x.dim() == 2 else tuple([_shaped(each, x.shape[:-1]) for each in y])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            # once_differentiable would raise only where a second backward passes through this
            # node; a Hessian that does not find its way here would come out as zero.
            raise RuntimeError(
                "lora_linear has no second derivative: call backward without create_graph=True"
            )
        if autocast_dtype(dy[0].device) is None:
            return _gradients(ctx, *dy)
        with without_autocast(dy[0].device):  # dtypes are as forward left them
            return _gradients(ctx, *dy)


def _gradients(ctx: Any, *dy: Tensor) -> Any:
    saved = ctx.saved_tensors
    x, h, mask = saved[:3]
    scale, dropout, _, strategy, tiles, G, columns = ctx.call
    shape = dy[0].shape[:-1]
    dy = tuple([_rows(each) for each in dy])
    rows = None if x is None else _rows(x)
    dx = dlora_A = dlora_B = None
    if True in ctx.wanted:
        layers = _layers(G, saved[3:], columns)
        dx, dlora_A, dlora_B = strategy.backward(
            dy, rows, layers, h, mask, scale, dropout, ctx.wanted, tiles
        )
    if dx is not None and len(shape) != 1:
        dx = _shaped(dx, shape)
    nothing, needs = (None,) * G, ctx.needs_input_grad[_FIRST:]
    dweight: Any = nothing
    if rows is not None and True in needs[:G]:  # LoRA's are frozen
        dweight = [d.T @ rows if needed else None for d, needed in zip(dy, needs[:G], strict=True)]
    dbias: Any = needs[3 * G :]
    if dbias:
        dbias = [d.sum(0) if needed else None for d, needed in zip(dy, dbias, strict=True)]
    return dx, None, *dweight, *(dlora_A or nothing), *(dlora_B or nothing), *dbias


# Function.apply, but for its look at torch.func, which `lora_linears` has taken: 4 us a call.
_apply = super(torch.autograd.Function, _LoRALinears).apply


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    # Unsafe only in that torch does not count the rows, which nobody else has, as sharing memory:
    # a view that is made inside a Function could not be changed in place.
    return torch.ops.aten._unsafe_view.default(rows, (*shape, rows.shape[1]))


_FIRST = 2  # the place of the first parameter among the arguments of apply


def _layers(G: int, parameters: tuple[Tensor, ...], columns: Ranges | None) -> Layers:
    weight, lora_A, lora_B = parameters[:G], parameters[G : 2 * G], parameters[2 * G : 3 * G]
    return Layers(weight, parameters[3 * G :] or None, lora_A, lora_B, columns)
