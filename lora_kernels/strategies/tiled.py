"""The strategies that launch our Triton kernels: `split`, `fused`, `hybrid`.

Each is a forward and a backward over the same arguments, as `library` is:

    forward(x, operands, settings, seed, tiles)
        -> Forward(y of each layer, h [G, M, R], mask [G, M, ceil(K / 8)])
    backward(dy, x, operands, h, mask, settings, wanted, tiles)
        -> Backward(dx, dlora_A, dlora_B)

x is [M, K]; `operands` and `settings` are those of `algebra.operands`. `seed` (int64 [1], on the
device; None without dropout) decides the masks, so both are pure functions. `wanted` names the
gradients to compute: x, h, mask and the weights may be None where no wanted gradient reads them.
The algebra is that of `algebra.reference`, the format of the masks that of `algebra.masks`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..algebra.columns import complement
from ..algebra.operands import (
    Backward,
    Forward,
    Operands,
    Settings,
    Tensors,
    Wanted,
    segments_of,
)
from ..algebra.packs import first_of, gradients_of, places
from ..hardware.tiles import Tile, Tiles, parts_for, splits_for
from .library import add_frozen
from .problem import processors, triton_kernels


def _adapters(
    operands: Operands, settings: Settings, device: torch.device
) -> tuple[Tensors, Tensors, Any]:
    """lora_A and lora_B of every segment; of a pack the first adapter's, and where the others are.

    The last is a `kernels.Packed`, or None.
    """
    if settings.pack is None:
        return *operands.adapters(settings.columns), None
    lora_A, lora_B = operands.packed(settings.columns, len(settings.pack.ranks))
    found = triton_kernels().Packed(settings.pack, places(lora_A), places(lora_B), device)
    return tuple(map(first_of, lora_A)), tuple(map(first_of, lora_B)), found


def _project(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """h of every segment, or parts of it, and the masks; one launch."""
    lora_A, _, pack = _adapters(operands, settings, x.device)
    parts = _parts(x.device, x.shape[0], len(lora_A), x.shape[1], tiles.project)
    return triton_kernels().project(
        x,
        lora_A,
        tile=tiles.project,
        precision=tiles.precision,
        dropout=settings.dropout,
        seed=seed,
        parts=parts,
        pack=pack,
    )


def _seeded_gemm(
    x: Tensor, h: Tensor, operands: Operands, settings: Settings, tile: Tile, precision: str,
    gemm: bool = True,
) -> tuple[Tensors, Tensor]:  # fmt: skip
    """(y of each layer, h in one part); without `gemm`, y is only its bias and low-rank product.

    One launch.
    """
    weight, bias, outs, y = operands.weight, operands.biases(), None, None
    if settings.columns is not None:
        # The kernel sees segments of one weight: first those with LoRA, then the columns between.
        N = weight[0].shape[0]
        ranges = (*settings.columns, *complement(settings.columns, N))
        y = (x.new_empty(x.shape[0], N),)
        outs = tuple(y[0][:, start:stop] for start, stop in ranges)
        weight = tuple(weight[0][start:stop] for start, stop in ranges)
        bias = None if bias is None else tuple(bias[0][start:stop] for start, stop in ranges)
    _, lora_B, pack = _adapters(operands, settings, x.device)
    outs, h = triton_kernels().low_rank_gemm(
        (x,), weight, h, lora_B, scale=settings.scale, bias=bias, gemm=gemm, outs=outs,
        tile=tile, precision=precision, pack=pack,
    )  # fmt: skip
    return outs if y is None else y, h


def split_forward(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None, tiles: Tiles | None
) -> Forward:
    """Two launches: h and the masks, then the GEMMs, each seeded with h lora_B^T."""
    assert tiles is not None
    h, mask = _project(x, operands, settings, seed, tiles)
    y, h = _seeded_gemm(x, h, operands, settings, tiles.low_rank_gemm, tiles.precision)
    return Forward(y, h, mask)


def fused_forward(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None, tiles: Tiles | None
) -> Forward:
    """One launch: every tile of x feeds both the frozen product and h.

    With dropout every column block would draw the masks anew; forward is then that of `split`.
    """
    if seed is not None:
        return split_forward(x, operands, settings, seed, tiles)
    assert tiles is not None
    lora_A, lora_B, pack = _adapters(operands, settings, x.device)
    y, h = triton_kernels().fused_gemm(
        (x,), operands.weight, lora_A, lora_B, h_scale=1.0, scale=settings.scale,
        bias=operands.biases(), tile=tiles.fused_gemm, precision=tiles.precision, pack=pack,
    )  # fmt: skip
    return Forward(y, h, None)


def hybrid_forward(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None, tiles: Tiles | None
) -> Forward:
    """Bias and low-rank products are written first; the vendor's GEMMs accumulate onto them."""
    assert tiles is not None
    h, mask = _project(x, operands, settings, seed, tiles)
    y, h = _seeded_gemm(x, h, operands, settings, tiles.low_rank, tiles.precision, gemm=False)
    for y_g, weight in zip(y, operands.weight, strict=True):
        add_frozen(y_g, x, weight.T)
    return Forward(y, h, mask)


# dx, once dh is known: (dy, operands, dh, mask, settings, tiles) -> dx [M, K]
InputGradient = Callable[[Tensors, Operands, Tensor, Tensor | None, Settings, Tiles], Tensor]


def _seeded_dx(
    dy: Tensors, operands: Operands, dh: Tensor, mask: Tensor | None, settings: Settings,
    tile: Tile, precision: str, gemm: bool = True,
) -> Tensor:  # fmt: skip
    """dx of all layers; without `gemm`, only its low-rank products. One launch."""
    lora_A, _, pack = _adapters(operands, settings, dy[0].device)
    (dx,), _ = triton_kernels().low_rank_gemm(
        dy, operands.weight, dh, lora_A, transposed=True, mask=mask, gemm=gemm,
        scale=1 / (1 - settings.dropout), tile=tile, precision=precision, pack=pack,
    )  # fmt: skip
    return dx


def _split_dx(
    dy: Tensors, operands: Operands, dh: Tensor, mask: Tensor | None, settings: Settings,
    tiles: Tiles,
) -> Tensor:  # fmt: skip
    return _seeded_dx(dy, operands, dh, mask, settings, tiles.low_rank_gemm_dx, tiles.precision)


def _hybrid_dx(
    dy: Tensors, operands: Operands, dh: Tensor, mask: Tensor | None, settings: Settings,
    tiles: Tiles,
) -> Tensor:  # fmt: skip
    low_rank, precision = tiles.low_rank, tiles.precision
    dx = _seeded_dx(dy, operands, dh, mask, settings, low_rank, precision, gemm=False)
    for dy_g, weight in zip(dy, operands.weight, strict=True):
        add_frozen(dx, dy_g, weight)
    return dx


def _column_gradients(input_gradient: InputGradient) -> Callable[..., Backward]:
    """A backward: dh and dlora_B from one read of dy, dlora_A from one of x, then dx."""

    def backward(
        dy: Tensors, x: Tensor | None, operands: Operands, h: Tensor | None, mask: Tensor | None,
        settings: Settings, wanted: Wanted, tiles: Tiles | None,
    ) -> Backward:  # fmt: skip
        assert tiles is not None
        if not (wanted.dx or wanted.dlora_A):
            return _parameter_gradients(dy, None, None, operands, h, mask, settings, tiles)
        dy_segments, tile = segments_of(dy, settings.columns), tiles.output_gradients
        _, lora_B, pack = _adapters(operands, settings, dy[0].device)
        dh, dlora_B = triton_kernels().output_gradients(
            dy_segments, h if wanted.dlora_B else None, lora_B, scale=settings.scale, tile=tile,
            precision=tiles.precision, splits=_splits(dy_segments, tile), pack=pack,
        )  # fmt: skip
        found = Backward(None, None, _each(dlora_B, operands.lora_B, lora_B, settings))
        if wanted.dlora_A:
            of_x = _parameter_gradients(None, x, dh, operands, None, mask, settings, tiles)
            found = found._replace(dlora_A=of_x.dlora_A)
        if wanted.dx:
            found = found._replace(dx=input_gradient(dy, operands, dh, mask, settings, tiles))
        return found

    return backward


split_backward = _column_gradients(_split_dx)
hybrid_backward = _column_gradients(_hybrid_dx)


def fused_backward(
    dy: Tensors, x: Tensor | None, operands: Operands, h: Tensor | None, mask: Tensor | None,
    settings: Settings, wanted: Wanted, tiles: Tiles | None,
) -> Backward:  # fmt: skip
    """dx computes dh on the way, from the tiles of dy that it reads anyway; then all the rest."""
    if not wanted.dx:
        return split_backward(dy, x, operands, h, mask, settings, wanted, tiles)
    assert tiles is not None
    lora_A, lora_B, pack = _adapters(operands, settings, dy[0].device)
    (dx,), dh = triton_kernels().fused_gemm(
        dy, operands.weight, lora_B, lora_A, transposed=True, h_scale=settings.scale,
        scale=1 / (1 - settings.dropout), mask=mask, tile=tiles.fused_gemm_dx,
        precision=tiles.precision, pack=pack,
    )  # fmt: skip
    if not (wanted.dlora_A or wanted.dlora_B):
        return Backward(dx, None, None)
    return _parameter_gradients(
        dy if wanted.dlora_B else None, x if wanted.dlora_A else None, dh, operands, h, mask,
        settings, tiles,
    )._replace(dx=dx)  # fmt: skip


def _parameter_gradients(
    dy: Tensors | None, x: Tensor | None, dh: Tensor | None, operands: Operands, h: Tensor | None,
    mask: Tensor | None, settings: Settings, tiles: Tiles,
) -> Backward:  # fmt: skip
    """dlora_A if x is given, dlora_B if dy is, from the dh and h that are known: one launch."""
    kernels, tile = triton_kernels(), tiles.parameter_gradients
    device = x.device if dy is None else dy[0].device  # type: ignore[union-attr]
    lora_A, lora_B, pack = _adapters(operands, settings, device)
    dy_segments = None if dy is None else segments_of(dy, settings.columns)
    read = (() if x is None else (x,) * len(lora_A)) + (dy_segments or ())
    dlora_A, dlora_B = kernels.parameter_gradients(
        x, dh, dy_segments, h,
        dlora_A=kernels.Gradient(lora_A[0].dtype, 1 / (1 - settings.dropout)),
        dlora_B=kernels.Gradient(lora_B[0].dtype, settings.scale),
        mask=mask, tile=tile, precision=tiles.precision, splits=_splits(read, tile), pack=pack,
    )  # fmt: skip
    return Backward(
        None,
        _each(dlora_A, operands.lora_A, lora_A, settings),
        _each(dlora_B, operands.lora_B, lora_B, settings),
    )


def _each(
    gradient: Tensor | None, parameters: Tensors, adapters: Tensors, settings: Settings
) -> Tensors | None:
    """The gradients of all segments, one below the other, as those of the layers' parameters."""
    if gradient is not None and settings.pack is not None:
        return gradients_of(gradient, parameters, len(settings.pack.ranks))  # type: ignore[no-any-return]
    if gradient is None or len(parameters) == 1:
        return None if gradient is None else (gradient,)
    return gradient.split_with_sizes([each.shape[0] for each in adapters])


def _splits(read: Tensors, tile: Tile) -> int:
    """The ranges of rows that a sum over M is cut in, for the columns of all that is read."""
    first = read[0]
    return _splits_on(first.device, first.shape[0], sum([t.shape[1] for t in read]), tile)


@lru_cache(maxsize=4096)
def _splits_on(device: torch.device, M: int, columns: int, tile: Tile) -> int:
    return splits_for(M, columns, tile, processors(device) or 2)  # 2: the interpreter


@lru_cache(maxsize=4096)
def _parts(device: torch.device, M: int, segments: int, K: int, tile: Tile) -> int:
    """The ranges of K that h is summed in."""
    return parts_for(M, segments, K, tile, processors(device) or 2)
