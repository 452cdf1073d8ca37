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
from typing import Any

import torch
from torch import Tensor

from .columns import complement
from .layers import Backward, Forward, Layers, Tensors, Wanted
from .library import triton_kernels
from .tuning import Tile, Tiles, splits_for


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
    """One launch: every tile of x feeds both the frozen product and h."""
    assert tiles is not None and not dropout
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
        dx = dlora_A = None
        dh, dlora_B = _output_gradients(
            dy, layers, h, scale, wanted.dx or wanted.dlora_A, wanted, tiles
        )
        if wanted.dlora_A:
            dlora_A = _input_gradients(x, dh, layers, mask, dropout, tiles)
        if wanted.dx:
            dx = input_gradient(dy, layers, dh, mask, dropout, tiles)
        return Backward(dx, dlora_A, dlora_B)

    return backward


split_backward = _column_gradients(_split_dx)
hybrid_backward = _column_gradients(_hybrid_dx)


def fused_backward(
    dy: Tensors, x: Tensor | None, layers: Layers, h: Tensor | None, mask: Tensor | None,
    scale: float, dropout: float, wanted: Wanted, tiles: Tiles | None,
) -> Backward:  # fmt: skip
    """dx computes dh on the way, from the tiles of dy that it reads anyway."""
    if not wanted.dx:
        return split_backward(dy, x, layers, h, mask, scale, dropout, wanted, tiles)
    assert tiles is not None
    dlora_A = dlora_B = None
    (dx,), dh = triton_kernels().fused_gemm(
        dy, layers.weight, layers.lora_B, layers.lora_A, transposed=True, h_scale=scale,
        scale=1 / (1 - dropout), mask=mask,
        tile=tiles.fused_gemm, precision=tiles.precision,
    )  # fmt: skip
    if wanted.dlora_B:
        _, dlora_B = _output_gradients(dy, layers, h, scale, False, wanted, tiles)
    if wanted.dlora_A:
        dlora_A = _input_gradients(x, dh, layers, mask, dropout, tiles)
    return Backward(dx, dlora_A, dlora_B)


def _output_gradients(
    dy: Tensors, layers: Layers, h: Tensor | None, scale: float, want_dh: bool, wanted: Wanted,
    tiles: Tiles,
) -> tuple[Any, Tensors | None]:  # fmt: skip
    dy, lora_B, tile = layers.adapted(dy), layers.adapters()[1], tiles.output_gradients
    splits = _splits(dy[0].device, dy[0].shape[0], sum([each.shape[1] for each in dy]), tile)
    dh, dlora_B = triton_kernels().output_gradients(
        dy, h if wanted.dlora_B else None, lora_B, scale=scale, want_dh=want_dh,
        tile=tile, precision=tiles.precision, splits=splits,
    )  # fmt: skip
    if dlora_B is None or len(layers.lora_B) == 1:
        return dh, None if dlora_B is None else (dlora_B,)
    return dh, dlora_B.split_with_sizes([each.shape[0] for each in lora_B])


def _input_gradients(
    x: Tensor | None, dh: Tensor, layers: Layers, mask: Tensor | None, dropout: float, tiles: Tiles
) -> Tensors:
    assert x is not None
    tile = tiles.input_gradients
    splits = _splits(x.device, x.shape[0], len(dh) * x.shape[1], tile)
    dlora_A = triton_kernels().input_gradients(
        x, dh, mask=mask, dropout=dropout, dtype=layers.lora_A[0].dtype,
        tile=tile, precision=tiles.precision, splits=splits,
    )  # fmt: skip
    G = len(layers.lora_A)
    return (dlora_A,) if G == 1 else dlora_A.split_with_sizes([dh.shape[2]] * G)


@lru_cache(maxsize=4096)
def _splits(device: torch.device, M: int, columns: int, tile: Tile) -> int:
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return splits_for(M, columns, tile, processors)
