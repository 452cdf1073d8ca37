"""The strategy `library`: the vendor's GEMMs, each added in place to a low-rank product.

It takes every problem: on a CPU, on a card that Triton's matrix products do not serve, in float64.

The low-rank product is written first, because then the sum costs nothing: a GEMM adds in registers
to what it stores anyway, while a low-rank product added to y would read and write y once more. On
an EPYC with one thread, 512 x 768 x 768 in bf16, the sum takes 0.1 ms of 3.0, and 0.3 ms the other
way round. dh is made as its transpose [R, M]: in float32 MKL takes 0.18 ms for it instead of 0.47,
and rounds less. h is not: there the transpose rounds more than eager code at ranks below 8.

Masks are drawn and applied by Triton where a GPU has it, else by plain torch (`algebra.masks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..algebra import masks
from ..algebra.operands import (
    Backward,
    Forward,
    Operands,
    Settings,
    Tensors,
    Wanted,
    segments_of,
)
from ..hardware.tiles import Tiles
from .problem import has_triton, triton_kernels


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`. Where it is so already, this takes the host a tenth of the time of t.to."""
    return t if t.dtype is dtype else t.to(dtype)


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b, rounded once."""
    if alpha == 1:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)  # beta = 0: `out` is never read


@cache
def _launches_masks(device: torch.device) -> bool:
    """Whether masks are drawn and applied by Triton: elementwise kernels run from sm_75 on."""
    if device.type != "cuda" or not has_triton():
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (7, 5)


def _draw(seed: Tensor, groups: int, rows: int, columns: int, dropout: float) -> Tensor:
    draw = triton_kernels().draw_masks if _launches_masks(seed.device) else masks.draw
    return draw(seed, groups, rows, columns, dropout)


def _keep(mask: Tensor | None, g: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """The mask of one layer as `_drop` takes it: packed bytes for Triton, else lanes of bits."""
    if mask is None:
        return None
    return mask[g] if _launches_masks(mask.device) else masks.unpack_lanes(mask[g], columns, dtype)


def _drop(t: Tensor, keep: Tensor | None) -> Tensor:
    """D(t) without its scale; lanes are used up: it takes their memory, which is in the cache."""
    if keep is None:
        return t
    if keep.dtype is torch.uint8:
        return triton_kernels().apply_mask(t, keep)
    return keep.bitwise_and_(t.view(keep.dtype)).view(t.dtype)


def _add_dropped(
    dx: Tensor | None, dh: Tensor, lora_A: Tensor, scale: float, keep: Tensor | None
) -> Tensor:
    """dx (None: zero) + scale * D(dh lora_A)."""
    if keep is None and dx is not None:
        return dx.addmm_(dh, lora_A, alpha=scale)
    product = _product(dh, lora_A, scale)
    if keep is not None and keep.dtype is torch.uint8:
        return triton_kernels().apply_mask(product, keep, onto=dx)
    if keep is not None:
        product.view(keep.dtype).bitwise_and_(keep)
    return product if dx is None else dx.add_(product)


def _low_rank(h: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """bias + scale * h lora_B^T."""
    if bias is None:
        return _product(h, lora_B.T, scale)
    return torch.addmm(bias, h, lora_B.T, alpha=scale)


def library_forward(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None, tiles: Tiles | None
) -> Forward:
    """cuBLAS or oneDNN: the rank-R product is y at first, and the frozen one is added in place."""
    (M, K), dtype = x.shape, x.dtype
    scale, dropout, _, columns = settings
    lora_A, lora_B = operands.adapters(columns)
    mask = None if seed is None else _draw(seed, len(lora_A), M, K, dropout)
    h = []
    for g, each in enumerate(lora_A):
        dropped_x = _drop(x, _keep(mask, g, K, dtype))
        h.append(_product(dropped_x, _as(each, dtype).T, 1 / (1 - dropout)))
    y = []
    for g, (weight, bias) in enumerate(zip(operands.weight, operands.bias, strict=True)):
        bias = None if bias is None else _as(bias, dtype)
        if columns is None:
            y.append(_low_rank(h[g], _as(lora_B[g], dtype), bias, scale))
        else:
            y.append(x.new_zeros(M, len(weight)) if bias is None else bias.repeat(M, 1))
            for y_g, h_g, B_g in zip(segments_of(tuple(y), columns), h, lora_B, strict=True):
                y_g.addmm_(h_g, _as(B_g, dtype).T, alpha=scale)
        y[g].addmm_(x, weight.T)
    return Forward(tuple(y), torch.stack(h) if len(h) > 1 else h[0][None], mask)


def library_backward(
    dy: Tensors, x: Tensor | None, operands: Operands, h: Tensor | None, mask: Tensor | None,
    settings: Settings, wanted: Wanted, tiles: Tiles | None,
) -> Backward:  # fmt: skip
    """The same products by hand: rank-R products are dx at first, and dy W is added in place."""
    scale, dropout, _, columns = settings
    dtype, kept_scale = dy[0].dtype, scale / (1 - dropout)
    dx: Tensor | None = None
    dlora_A, dlora_B = [], []
    for g, (dy_g, lora_A, lora_B) in enumerate(
        zip(segments_of(dy, columns), *operands.adapters(columns), strict=True)
    ):
        if wanted.dx or wanted.dlora_A:
            dh_T = _as(lora_B, dtype).T @ dy_g.T  # scaled where it is used, at no cost
            keep = _keep(mask, g, lora_A.shape[1], dtype)
            if wanted.dx:
                dx = _add_dropped(dx, dh_T.T, _as(lora_A, dtype), kept_scale, keep)
            if wanted.dlora_A:
                assert x is not None
                dlora_A.append(_as(_product(dh_T, _drop(x, keep), kept_scale), lora_A.dtype))
        if wanted.dlora_B:
            assert h is not None
            # Transposed: oneDNN's dy^T h takes 7.6 ms, h^T dy 0.44 (EPYC, N = 3072, fp32).
            dlora_B.append(_as(_product(h[g].T, dy_g, scale).T, lora_B.dtype).contiguous())
    if dx is not None:
        for dy_g, weight in zip(dy, operands.weight, strict=True):
            dx.addmm_(dy_g, weight)
    if columns is not None:
        dlora_A, dlora_B = ([torch.cat(each)] if each else [] for each in (dlora_A, dlora_B))
    return Backward(dx, tuple(dlora_A) or None, tuple(dlora_B) or None)


def frozen_gradients(
    dy: Tensors, x: Tensor | None, needs_weight: Sequence[bool], needs_bias: Sequence[bool]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """dweight [N, K] = dy^T x and dbias [N] = the sum of dy over M, for the layers that need them.

    LoRA freezes both, so these are for what is trained besides, by plain products.
    """
    # x is there whenever a weight needs it.
    dweight = [d.T @ x if need else None for d, need in zip(dy, needs_weight, strict=True)]  # type: ignore[operator]
    dbias = [d.sum(0) if need else None for d, need in zip(dy, needs_bias, strict=True)]
    return tuple(dweight), tuple(dbias)
