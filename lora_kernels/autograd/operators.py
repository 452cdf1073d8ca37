"""What torch.compile sees of a layer: two opaque operators with fake and autograd registrations.

    lora_kernels::forward(x, weights, lora_A, lora_B, biases, ...) -> [h, mask, y of each layer]
    lora_kernels::backward(dy, x, weights, lora_A, lora_B, h, mask, ...) -> [dx, dlora_A, dlora_B]

They compute what the autograd Function of `functional` computes, by the same strategies. Eager code
uses that Function, which costs the host less; a compiled graph holds these, so there is no break in
it. The strategy is chosen when the operator runs, not when it is traced, so a graph with dynamic
shapes stays one graph. Gradients that are not wanted, and the mask without dropout, are empty.
`columns` holds the adapted ranges of a weight's columns end to end; it is empty without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra import masks
from ..algebra.operands import Layers, Wanted
from ..strategies.choose import decide


def _layers(
    weights: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
    biases: Sequence[Tensor], columns: Sequence[int],
) -> Layers:  # fmt: skip
    ranges = tuple(zip(columns[::2], columns[1::2], strict=True)) or None
    return Layers(tuple(weights), tuple(biases) or None, tuple(lora_A), tuple(lora_B), ranges)


def _decide(x: Tensor, layers: Layers, N: int, dropout: float, strategy: str) -> Any:
    lora_A, _ = layers.adapters()
    (R, K), G = lora_A[0].shape, len(lora_A)
    sliced = layers.columns is not None
    return decide(x.device, x.shape[0], N, K, R, x.dtype, dropout > 0, G, sliced, strategy)


@torch.library.custom_op("lora_kernels::forward", mutates_args=())
def forward(
    x: Tensor, weights: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
    biases: Sequence[Tensor], seed: Tensor | None, columns: Sequence[int], scale: float,
    dropout: float, strategy: str,
) -> list[Tensor]:  # fmt: skip
    """[h, mask, *y] of a group of layers, a pure function of its inputs; see `strategies`."""
    layers = _layers(weights, lora_A, lora_B, biases, columns)
    N = max(weight.shape[0] for weight in weights)
    row, tiles = _decide(x, layers, N, dropout, strategy)
    y, h, mask = row.forward(x, layers, scale, dropout, seed, tiles)
    return [h, x.new_empty(0, dtype=torch.uint8) if mask is None else mask, *y]


@forward.register_fake
def _(x, weights, lora_A, lora_B, biases, seed, columns, scale, dropout, strategy):  # type: ignore[no-untyped-def]
    M, K, G = x.shape[0], x.shape[1], len(columns) // 2 or len(weights)
    shape = (G, M, masks.packed_width(K)) if dropout else (0,)
    h = x.new_empty(G, M, lora_B[0].shape[1])
    mask = x.new_empty(shape, dtype=torch.uint8)
    return [h, mask, *(x.new_empty(M, weight.shape[0]) for weight in weights)]


@torch.library.custom_op("lora_kernels::backward", mutates_args=())
def backward(
    dy: Sequence[Tensor], x: Tensor | None, weights: Sequence[Tensor], lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor], h: Tensor, mask: Tensor, columns: Sequence[int], scale: float,
    dropout: float, strategy: str, want_x: bool, want_A: bool, want_B: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, *dlora_A, *dlora_B] of a group of layers; see `strategies`."""
    layers = _layers(weights, lora_A, lora_B, (), columns)
    row, tiles = _decide(dy[0], layers, max(each.shape[1] for each in dy), dropout, strategy)
    dx, dlora_A, dlora_B = row.backward(
        tuple(dy), x, layers, h, mask if dropout else None, scale, dropout,
        Wanted(want_x, want_A, want_B), tiles,
    )  # fmt: skip
    return [
        dy[0].new_empty(0) if dx is None else dx,
        *map(_apart, dlora_A or (A.new_empty(0) for A in lora_A)),
        *map(_apart, dlora_B or (B.new_empty(0) for B in lora_B)),
    ]


def _apart(gradient: Tensor) -> Tensor:
    """A group's gradients are parts of one buffer, of which an operator may return one view."""
    return gradient.clone() if gradient._is_view() else gradient


@backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, x, weights, lora_A, lora_B, h, mask, columns, scale, dropout, strategy, want_x, want_A,
    want_B,
):  # fmt: skip
    M, K = dy[0].shape[0], lora_A[0].shape[1]
    return [
        dy[0].new_empty((M, K) if want_x else 0),
        *(A.new_empty(A.shape if want_A else 0) for A in lora_A),
        *(B.new_empty(B.shape if want_B else 0) for B in lora_B),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, lora_A, lora_B, biases, _, *call = inputs
    G, needs = len(weights), ctx.needs_input_grad  # flat here, the lists laid end to end
    ctx.wanted = needs[0], any(needs[1 + G : 1 + 2 * G]), any(needs[1 + 2 * G : 1 + 3 * G])
    ctx.needs_weight = needs[1 : 1 + G]
    ctx.needs_bias, ctx.G, ctx.call = needs[1 + 3 * G : 1 + 3 * G + len(biases)], G, call
    needs_x = ctx.wanted[1] or any(ctx.needs_weight)
    ctx.save_for_backward(x if needs_x else None, *output[:2], *weights, *lora_A, *lora_B)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, h, mask, *parameters = ctx.saved_tensors
    G, dy = ctx.G, gradients[2:]
    parts = [parameters[i * G : (i + 1) * G] for i in range(3)]
    dx, *dlora = backward(dy, x, *parts, h, mask, *ctx.call, *ctx.wanted)
    wanted_x, wanted_A, wanted_B = ctx.wanted
    nothing = [None] * G
    return (
        dx if wanted_x else None,
        [d.T @ x if needed else None for d, needed in zip(dy, ctx.needs_weight, strict=True)],
        dlora[:G] if wanted_A else nothing,
        dlora[G:] if wanted_B else nothing,
        [d.sum(0) if needed else None for d, needed in zip(dy, ctx.needs_bias, strict=False)],
        None,
        None if ctx.call[0] else [],  # torch takes an empty list for one of tensors
        *(None for _ in ctx.call[1:]),
    )


forward.register_autograd(_backward, setup_context=_setup)
