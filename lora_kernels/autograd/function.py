"""The autograd Function behind `lora_linear`: one node of the graph for a layer or a group.

It saves x and weight as it is given them, h [G, M, R] and the packed masks, and copies none. x
[..., K] is seen as rows [M, K] in here: outside, each view would be a node of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.operands import Operands, Settings, Wanted
from ..hardware.tiles import Tiles
from ..strategies.library import frozen_gradients
from ..strategies.table import Strategy
from .autocast import autocast_dtype, without_autocast


class Call(NamedTuple):
    """What a call has besides operands; one argument, since every argument of apply costs time."""

    settings: Settings
    seed: Tensor | None
    strategy: Strategy
    tiles: Tiles | None
    layers: int  # how many
    adapters: int = 1  # how many a layer has: those of a pack


class LoRALinears(torch.autograd.Function):
    """apply(x, call, *operands.flatten()) -> y [..., N] of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *flat: Any) -> tuple[Tensor, ...]:
        settings, seed, strategy, tiles, layers, adapters = call
        operands = Operands.unflatten(flat, layers, adapters)
        y, h, mask = strategy.forward(as_rows(x), operands, settings, seed, tiles)
        needs: Any = Operands.unflatten(ctx.needs_input_grad[_FIRST:], layers, adapters)
        wanted = Wanted(ctx.needs_input_grad[0], True in needs.lora_A, True in needs.lora_B)
        weight, _, *rest = operands
        unread = (None,) * layers  # the bias, and the weight unless dx is wanted
        ctx.save_for_backward(
            x if wanted.dlora_A or True in needs.weight else None,
            h if wanted.dlora_B else None,
            mask if wanted.dx or wanted.dlora_A else None,
            *(weight if wanted.dx else unread),
            *unread,
            *sum(rest, ()),
        )
        ctx.call, ctx.needs, ctx.wanted = call, needs, wanted
        return y if x.dim() == 2 else tuple([shaped(each, x.shape[:-1]) for each in y])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        refuse_second_derivative()
        if autocast_dtype(dy[0].device) is None:
            return _gradients(ctx, *dy)
        with without_autocast(dy[0].device):  # dtypes are as forward left them
            return _gradients(ctx, *dy)


def refuse_second_derivative() -> None:
    """In a backward: raise RuntimeError if it is to be differentiated itself.

    once_differentiable would raise only where a second backward passes through its node; a Hessian
    that does not find its way there would come out as zero.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a LoRA layer has no second derivative: call backward without create_graph=True"
        )


def transform_stack() -> Callable[[], object] | None:
    """torch's own answer to which transforms of torch.func are active (it gives None for none).

    It is private. None stands for a torch that has no such function.
    """
    return getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def fastest_apply(function: Any) -> Any:
    """`apply` of a Function without its look for a transform of torch.func: 4 us a call less.

    That is private, and for callers who have looked themselves. Where torch lacks either, it is the
    public `apply`, which looks and refuses by itself.
    """
    inner = getattr(super(torch.autograd.Function, function), "apply", None)
    return function.apply if inner is None or transform_stack() is None else inner


apply = fastest_apply(LoRALinears)
TRANSFORMS = transform_stack()


def refuse_transforms(who: str = "lora_linear") -> None:
    """Raises RuntimeError under torch.func; a torch that cannot be asked refuses in `apply`."""
    if TRANSFORMS is not None and TRANSFORMS() is not None:
        raise RuntimeError(
            f"{who} has no rules for torch.func transforms (vmap, grad, jvp): call it outside"
        )


_FIRST = 2  # the place of the first operand among the arguments of apply


def _gradients(ctx: Any, *dy: Tensor) -> Any:
    saved = ctx.saved_tensors
    x, h, mask = saved[:3]
    settings, _, strategy, tiles, layers, adapters = ctx.call
    shape = dy[0].shape[:-1]
    dy = tuple([as_rows(each) for each in dy])
    rows = None if x is None else as_rows(x)
    dx = dlora_A = dlora_B = None
    if True in ctx.wanted:
        operands = Operands.unflatten(saved[3:], layers, adapters)
        dx, dlora_A, dlora_B = strategy.backward(
            dy, rows, operands, h, mask, settings, ctx.wanted, tiles
        )
    if dx is not None and len(shape) != 1:
        dx = shaped(dx, shape)
    dweight = dbias = none = (None,) * layers
    if True in ctx.needs.weight or True in ctx.needs.bias:
        dweight, dbias = frozen_gradients(dy, rows, ctx.needs.weight, ctx.needs.bias)
    absent = none * adapters
    gradients: Any = Operands(dweight, dbias, dlora_A or absent, dlora_B or absent)
    return dx, None, *gradients.flatten()


def mask_of(y: Tensor) -> Tensor | None:
    """The packed masks [G, M, ceil(K / 8)] of the call that made y; None without dropout.

    None as well where no gradient needs them. To be asked before backward frees them.
    """
    node: Any = y.grad_fn
    return node.saved_tensors[2]


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


_UNSAFE_VIEW: Any = getattr(torch.ops.aten, "_unsafe_view", None)


def shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """[M, N] as [*shape, N], for a Function to return.

    A caller could not change a plain view in place, since it is made inside a Function. Unsafe
    means that torch does not count it as a view; nobody else has `rows`, so nothing is lost. A
    torch without this operator gets the view.
    """
    reshaped = _UNSAFE_VIEW or torch.Tensor.view
    return reshaped(rows, (*shape, rows.shape[1]))
