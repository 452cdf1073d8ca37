"""What torch.compile sees of a layer: two opaque operators with fake and autograd registrations.

    lora_kernels::forward(x, operands, ...) -> [h, mask, y of each layer]
    lora_kernels::backward(dy, x, operands, h, mask, ...) -> [dx, dlora_A of each, dlora_B of each]

They compute what the autograd Function of `function` computes, by the same strategies. Eager code
uses that Function, which costs the host less. A compiled graph holds these operators, so there is
no break in it. The strategy is chosen when the operator runs, not when it is traced, so a graph
with dynamic shapes stays one graph.

An operator takes tensors, lists and numbers only. So `operands` travel flattened, field by field,
and `present` says which fields are there at all. The settings travel one by one, `columns` as the
count of ranges and then their edges, end to end; [0] stands for None, since AOTInductor turns an
empty list into None. A gradient that is not wanted, and the mask without dropout, come out
empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra import masks
from ..algebra.operands import Operands, Settings, Wanted, rank_dtype
from ..strategies.choose import decide
from ..strategies.library import frozen_gradients


def call(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None
) -> tuple[Tensor, ...]:
    """y [M, N] of each layer, of x [M, K]."""
    scale, dropout, strategy, columns, _ = settings
    edges = [0] if columns is None else [len(columns), *(e for each in columns for e in each)]
    flat, present = flattened(operands)
    return tuple(forward(x, flat, present, seed, scale, dropout, strategy, edges)[2:])


def flattened(operands: Operands) -> tuple[list[Tensor], list[bool]]:
    """The tensors of the fields that are there, end to end, and which fields these are."""
    present = [field[0] is not None for field in operands]
    return [each for each in operands.flatten() if each is not None], present


def _operands(flat: Sequence[Any], present: Sequence[bool], missing: Any = None) -> Operands:
    """The operands again; `missing` stands for each tensor of a field that is not there."""
    layers, rest = len(flat) // sum(present), iter(flat)
    fields: Any = [
        tuple(next(rest) if here else missing for _ in range(layers)) for here in present
    ]
    return Operands(*fields)


def _settings(scale: float, dropout: float, strategy: str, edges: Sequence[int]) -> Settings:
    columns = tuple(zip(edges[1::2], edges[2::2], strict=True)) or None
    return Settings(scale, dropout, strategy, columns)


@torch.library.custom_op("lora_kernels::forward", mutates_args=())
def forward(
    x: Tensor, operands: Sequence[Tensor], present: Sequence[bool], seed: Tensor | None,
    scale: float, dropout: float, strategy: str, columns: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """[h, mask, *y] of a layer or a group, a pure function of its inputs."""
    given = _operands(operands, present)
    settings = _settings(scale, dropout, strategy, columns)
    chosen, tiles = decide(x, given, settings)
    y, h, mask = chosen.forward(x, given, settings, seed, tiles)
    return [h, x.new_empty(0, dtype=torch.uint8) if mask is None else mask, *y]


@forward.register_fake
def _(x, operands, present, seed, scale, dropout, strategy, columns):  # type: ignore[no-untyped-def]
    weight, _, lora_A, lora_B = _operands(operands, present)
    M, K, G = x.shape[0], x.shape[1], len(columns) // 2 or len(weight)
    shape = (G, M, masks.packed_width(K)) if dropout else (0,)
    h = x.new_empty(G, M, lora_B[0].shape[1], dtype=rank_dtype(x.dtype, lora_A[0].dtype))
    mask = x.new_empty(shape, dtype=torch.uint8)
    return [h, mask, *(x.new_empty(M, each.shape[0]) for each in weight)]


@torch.library.custom_op("lora_kernels::backward", mutates_args=())
def backward(
    dy: Sequence[Tensor], x: Tensor | None, operands: Sequence[Tensor], present: Sequence[bool],
    h: Tensor, mask: Tensor, scale: float, dropout: float, strategy: str,
    columns: Sequence[int], want_dx: bool, want_dlora_A: bool, want_dlora_B: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, *dlora_A, *dlora_B] of a layer or a group."""
    given = _operands(operands, present)
    settings = _settings(scale, dropout, strategy, columns)
    chosen, tiles = decide(dy[0], given, settings)
    dx, dlora_A, dlora_B = chosen.backward(
        tuple(dy), x, given, h, mask if dropout else None, settings,
        Wanted(want_dx, want_dlora_A, want_dlora_B), tiles,
    )  # fmt: skip
    return [
        dy[0].new_empty(0) if dx is None else dx,
        *map(_own_copy, dlora_A or (A.new_empty(0) for A in given.lora_A)),
        *map(_own_copy, dlora_B or (B.new_empty(0) for B in given.lora_B)),
    ]


def _own_copy(gradient: Tensor) -> Tensor:
    """A copy of what is a view: a group's gradients share one buffer, outputs may not."""
    return gradient.clone() if gradient._is_view() else gradient


@backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, x, operands, present, h, mask, scale, dropout, strategy, columns, want_dx, want_dlora_A,
    want_dlora_B,
):  # fmt: skip
    _, _, lora_A, lora_B = _operands(operands, present)
    M, K = dy[0].shape[0], lora_A[0].shape[1]
    return [
        dy[0].new_empty((M, K) if want_dx else 0),
        *(A.new_empty(A.shape if want_dlora_A else 0) for A in lora_A),
        *(B.new_empty(B.shape if want_dlora_B else 0) for B in lora_B),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, flat, ctx.present, _, *ctx.settings = inputs
    flags = ctx.needs_input_grad  # of x, then of every operand, then of the rest
    needs: Any = _operands(flags[1 : 1 + len(flat)], ctx.present, missing=False)
    ctx.wanted = Wanted(flags[0], any(needs.lora_A), any(needs.lora_B))
    ctx.needs = needs.weight, needs.bias
    needs_x = ctx.wanted.dlora_A or any(needs.weight)
    ctx.save_for_backward(x if needs_x else None, *output[:2], *flat)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, h, mask, *flat = ctx.saved_tensors
    dy, layers = gradients[2:], len(gradients) - 2
    dx, *dlora = backward(dy, x, flat, ctx.present, h, mask, *ctx.settings, *ctx.wanted)
    none = [None] * layers
    of_operands: Any = (
        *frozen_gradients(tuple(dy), x, *ctx.needs),
        dlora[:layers] if ctx.wanted.dlora_A else none,
        dlora[layers:] if ctx.wanted.dlora_B else none,
    )
    there = [each for here, each in zip(ctx.present, of_operands, strict=True) if here]
    of_rest = (None,) * (2 + len(ctx.settings))
    return dx if ctx.wanted.dx else None, [t for field in there for t in field], *of_rest


forward.register_autograd(_backward, setup_context=_setup)
