"""How layers are computed: each strategy is a forward and a backward over the same arguments.

    forward(x, layers, scale, dropout, seed, tiles)
        -> (y of each layer, h [G, M, R], mask [G, M, K / 8])
    backward(dy of each, x, layers, h, mask, scale, dropout, wanted, tiles)
        -> (dx, dlora_A, dlora_B)

`layers` are G >= 1 layers that read the same x [M, K] at one rank, scale and dropout probability (a
single layer is a group of one): weights [N_g, K] of any strides, lora_A [R, K], lora_B [N_g, R]. Or
they are one weight [N, K] with LoRA on G ranges of its columns of y, each as a layer of its own.
`seed` (int64 [1], on the device; None without dropout) decides the masks, so each is a pure
function. h and the packed mask are what backward gets besides the inputs. `wanted` names the
gradients to compute; x, h and the weights may be None where no wanted gradient reads them. The
algebra is that of `reference`, the mask format that of `masks`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..algebra.columns import complement
from ..algebra.operands import Backward, Forward, Layers, Tensors, Wanted
from ..hardware.tiles import Tile, Tiles, splits_for
from .problem import triton_kernels


def _project(
    x: Tensor, layers: Layers, dropout: float, seed: Tensor | None, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    return triton_kernels().project(
        x,
        layers.adapters()[0],
        tile=tiles.project,
        precision=tiles.precision,
        dropout=dropout,
        seed=seed,
    )


def _seeded_gemm(
    x: Tensor, h: Tensor, layers: Layers, scale: float, tile: Tile, precision: str,
    gemm: bool = True,
) -> Tensors:  # fmt: skip
    """y of each layer, or without `gemm` only bias and rank-R product of it; one launch."""
    weight, bias, outs, y = layers.weight, layers.bias, None, None
    if layers.columns is not None:  # the ranges as segments, then those that LoRA leaves alone
        N = weight[0].shape[0]
        ranges = (*layers.columns, *complement(layers.columns, N))
        y = (x.new_empty(x.shape[0], N),)
        outs = tuple(y[0][:, start:stop] for start, stop in ranges)
        weight = tuple(weight[0][start:stop] for start, stop in ranges)
        bias = None if bias is None else tuple(bias[0][start:stop] for start, stop in ranges)
    outs = triton_kernels().low_rank_gemm(
        (x,), weight, h, layers.adapters()[1], scale=scale, bias=bias, gemm=gemm, outs=outs,
        tile=tile, precision=precision,
    )  # fmt: skip
    return outs if y is None else y


def split_forward(
    x: Tensor, layers: Layers, scale: float, dropout: float, seed: Tensor | None,
    tiles: Tiles | None,
) -> Forward:  # fmt: skip
    """Two launches: h and the masks, then the GEMMs, each seeded with h lora_B^T."""
    assert tiles is not None
    h, mask = _project(x, layers, dropout, seed, tiles)
    y = _seeded_gemm(x, h, layers, scale, tiles.low_rank_gemm, tiles.precision)
    return Forward(y, h, mask)


def fused_forward(
    x: Tensor, layers: Layers, scale: float, dropout: float, seed: Tensor | None,
    tiles: Tiles | None,
) -> Forward:  # fmt: skip
    """One launch: every tile of x feeds both the frozen product and h.

    With dropout each tile would need a second, dropped form, drawn anew for every column block:
    then forward is that of `split`.
    """
    if seed is not None:
        return split_forward(x, layers, scale, dropout, seed, tiles)
    assert tiles is not None
    y, h = triton_kernels().fused_gemm(
        (x,), layers.weight, layers.lora_A, layers.lora_B, h_scale=1.0, scale=scale,
        bias=layers.bias, tile=tiles.fused_gemm, precision=tiles.precision,
    )  # fmt: skip
    return Forward(y, h, None)


def hybrid_forward(
    x: Tensor, layers: Layers, scale: float, dropout: float, seed: Tensor | None,
    tiles: Tiles | None,
) -> Forward:  # fmt: skip
    """Bias and rank-R products are written first; the vendor's GEMMs accumulate onto them."""
    assert tiles is not None
    h, mask = _project(x, layers, dropout, seed, tiles)
    y = _seeded_gemm(x, h, layers, scale, tiles.low_rank, tiles.precision, gemm=False)
    for y_g, weight in zip(y, layers.weight, strict=True):
        y_g.addmm_(x, weight.T)
    return Forward(y, h, mask)


# dx, given everything else: (dy, layers, dh, mask, dropout, tiles) -> dx
InputGradient = Callable[[Tensors, Layers, Tensor, Tensor | None, float, Tiles], Tensor]


def _seeded_dx(
    dy: Tensors, layers: Layers, dh: Tensor, mask: Tensor | None, dropout: float, tile: Tile,
    precision: str, gemm: bool = True,
) -> Tensor:  # fmt: skip
    """dx of all layers, or without `gemm` only its rank-R products; one launch."""
    (dx,) = triton_kernels().low_rank_gemm(
        dy, layers.weight, dh, layers.adapters()[0], transposed=True, mask=mask, gemm=gemm,
        scale=1 / (1 - dropout), tile=tile, precision=precision,
    )  # fmt: skip
    return dx


def _split_dx(
    dy: Tensors, layers: Layers, dh: Tensor, mask: Tensor | None, dropout: float, tiles: Tiles
) -> Tensor:
    return _seeded_dx(dy, layers, dh, mask, dropout, tiles.low_rank_gemm, tiles.precision)


def _hybrid_dx(
    dy: Tensors, layers: Layers, dh: Tensor, mask: Tensor | None, dropout: float, tiles: Tiles
) -> Tensor:
    dx = _seeded_dx(dy, layers, dh, mask, dropout, tiles.low_rank, tiles.precision, gemm=False)
    for dy_g, weight in zip(dy, layers.weight, strict=True):
        dx.addmm_(dy_g, weight)
    return dx


def _column_gradients(input_gradient: InputGradient) -> Callable[..., Backward]:
    """dh and dlora_B from one read of dy, dlora_A from one of x, then dx by `input_gradient`."""

    def backward(
        dy: Tensors, x: Tensor | None, layers: Layers, h: Tensor | None, mask: Tensor | None,
        scale: float, dropout: float, wanted: Wanted, tiles: Tiles | None,
    ) -> Backward:  # fmt: skip
        assert tiles is not None
        if not (wanted.dx or wanted.dlora_A):
            return _parameter_gradients(dy, None, None, layers, h, mask, scale, dropout, tiles)
        lora_B, adapted, tile = layers.adapters()[1], layers.adapted(dy), tiles.output_gradients
        dh, dlora_B = triton_kernels().output_gradients(
            adapted, h if wanted.dlora_B else None, lora_B, scale=scale, tile=tile,
            precision=tiles.precision, splits=_splits(adapted, tile),
        )  # fmt: skip
        found = Backward(None, None, _each(dlora_B, layers.lora_B, lora_B))
        if wanted.dlora_A:
            of_x = _parameter_gradients(None, x, dh, layers, None, mask, scale, dropout, tiles)
            found = found._replace(dlora_A=of_x.dlora_A)
        if wanted.dx:
            found = found._replace(dx=input_gradient(dy, layers, dh, mask, dropout, tiles))
        return found

    return backward


split_backward = _column_gradients(_split_dx)
hybrid_backward = _column_gradients(_hybrid_dx)


def fused_backward(
    dy: Tensors, x: Tensor | None, layers: Layers, h: Tensor | None, mask: Tensor | None,
    scale: float, dropout: float, wanted: Wanted, tiles: Tiles | None,
) -> Backward:  # fmt: skip
    """dx computes dh on the way, from the tiles of dy that it reads anyway; then all the rest."""
    if not wanted.dx:
        return split_backward(dy, x, layers, h, mask, scale, dropout, wanted, tiles)
    assert tiles is not None
    (dx,), dh = triton_kernels().fused_gemm(
        dy, layers.weight, layers.lora_B, layers.lora_A, transposed=True, h_scale=scale,
        scale=1 / (1 - dropout), mask=mask,
        tile=tiles.fused_gemm, precision=tiles.precision,
    )  # fmt: skip
    if not (wanted.dlora_A or wanted.dlora_B):
        return Backward(dx, None, None)
    return _parameter_gradients(
        dy if wanted.dlora_B else None, x if wanted.dlora_A else None, dh, layers, h, mask, scale,
        dropout, tiles,
    )._replace(dx=dx)  # fmt: skip


def _parameter_gradients(
    dy: Tensors | None, x: Tensor | None, dh: Tensor | None, layers: Layers, h: Tensor | None,
    mask: Tensor | None, scale: float, dropout: float, tiles: Tiles,
) -> Backward:  # fmt: skip
    """dlora_A if x is given, dlora_B if dy is, from the dh and h that are known: one launch."""
    kernels, tile = triton_kernels(), tiles.parameter_gradients
    lora_A, lora_B = layers.adapters()
    adapted = None if dy is None else layers.adapted(dy)
    read = (() if x is None else (x,) * len(lora_A)) + (adapted or ())
    dlora_A, dlora_B = kernels.parameter_gradients(
        x, dh, adapted, h,
        dlora_A=kernels.Gradient(lora_A[0].dtype, 1 / (1 - dropout)),
        dlora_B=kernels.Gradient(lora_B[0].dtype, scale),
        mask=mask, tile=tile, precision=tiles.precision, splits=_splits(read, tile),
    )  # fmt: skip
    return Backward(
        None, _each(dlora_A, layers.lora_A, lora_A), _each(dlora_B, layers.lora_B, lora_B)
    )


def _each(gradient: Tensor | None, parameters: Tensors, adapters: Tensors) -> Tensors | None:
    """The gradients of all adapters, one below the other, as those of the parameters."""
    if gradient is None or len(parameters) == 1:
        return None if gradient is None else (gradient,)
    return gradient.split_with_sizes([each.shape[0] for each in adapters])


def _splits(read: Tensors, tile: Tile) -> int:
    first = read[0]
    return _splits_on(first.device, first.shape[0], sum([t.shape[1] for t in read]), tile)


@lru_cache(maxsize=4096)
def _splits_on(device: torch.device, M: int, columns: int, tile: Tile) -> int:
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return splits_for(M, columns, tile, processors)
