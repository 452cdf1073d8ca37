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
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import masks
from .columns import Ranges, complement, widths
from .tuning import Tile, Tiles, splits_for

Tensors = tuple[Tensor, ...]


class Layers(NamedTuple):
    """The parameters of G layers that share x, a tuple each; bias is None if they have none.

    With `columns`, G ranges of the columns of y that are adapted, there is one weight, one bias,
    and one lora_A [G R, K] and lora_B [sum of widths, R] that hold the ranges' adapters stacked.
    """

    weight: Tensors
    bias: Tensors | None
    lora_A: Tensors
    lora_B: Tensors
    columns: Ranges | None = None

    def adapters(self) -> tuple[Tensors, Tensors]:
        """lora_A [R, K] and lora_B [N_g, R] of each of the G."""
        if self.columns is None:
            return self.lora_A, self.lora_B
        (lora_A,), (lora_B,) = self.lora_A, self.lora_B
        return lora_A.split(lora_B.shape[1]), lora_B.split(widths(self.columns))

    def adapted(self, y: Tensors) -> Tensors:
        """The [M, N_g] that each adapter adds to, of the outputs or of their gradients."""
        if self.columns is None:
            return y
        return tuple(y[0][:, start:stop] for start, stop in self.columns)


class Wanted(NamedTuple):
    """Which gradients autograd asks for."""

    dx: bool
    dlora_A: bool
    dlora_B: bool


class Forward(NamedTuple):
    """What forward gives: the outputs, and what backward needs besides the inputs."""

    y: Tensors
    h: Tensor
    mask: Tensor | None


class Backward(NamedTuple):
    """What backward gives; None where it was not wanted."""

    dx: Tensor | None
    dlora_A: Tensors | None
    dlora_B: Tensors | None


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`: a tenth of the host time of t.to where nothing is to be done."""
    return t if t.dtype is dtype else t.to(dtype)


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b with one rounding: beta = 0 means that the output's memory is never read."""
    if alpha == 1:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def _launches_masks(device: torch.device) -> bool:
    """Whether masks are drawn and applied by Triton: elementwise kernels run from sm_75 on."""
    if device.type != "cuda" or not has_triton():
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (7, 5)


def _draw(seed: Tensor, groups: int, rows: int, columns: int, dropout: float) -> Tensor:
    draw = _kernels().draw_masks if _launches_masks(seed.device) else masks.draw
    return draw(seed, groups, rows, columns, dropout)


def _keep(mask: Tensor | None, g: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """The mask of one layer as `_drop` takes it: packed bytes for Triton, else factors 0 and 1."""
    if mask is None:
        return None
    if _launches_masks(mask.device):
        return mask[g]
    return masks.unpack(mask[g], columns, dtype)


def _drop(t: Tensor, keep: Tensor | None) -> Tensor:
    """D(t) without its scale."""
    if keep is None:
        return t
    return _kernels().apply_mask(t, keep) if keep.dtype is torch.uint8 else t * keep


def _add_dropped(out: Tensor, t: Tensor, keep: Tensor) -> None:
    """out += D(t), without its scale."""
    if keep.dtype is torch.uint8:
        _kernels().apply_mask(t, keep, onto=out)
    else:
        out.addcmul_(t, keep)


def library_forward(
    x: Tensor, layers: Layers, scale: float, dropout: float, seed: Tensor | None,
    tiles: Tiles | None,
) -> Forward:  # fmt: skip
    """cuBLAS or oneDNN: the frozen GEMM, then the rank-R product added in place."""
    (M, K), dtype = x.shape, x.dtype
    lora_A, lora_B = layers.adapters()
    mask = None if seed is None else _draw(seed, len(lora_A), M, K, dropout)
    y = []
    for g, weight in enumerate(layers.weight):
        bias = None if layers.bias is None else _as(layers.bias[g], dtype)
        y.append(torch.nn.functional.linear(x, weight, bias))
    h = []
    for g, y_g in enumerate(layers.adapted(tuple(y))):
        dropped_x = _drop(x, _keep(mask, g, K, dtype))
        h.append(_product(dropped_x, _as(lora_A[g], dtype).T, 1 / (1 - dropout)))
        y_g.addmm_(h[g], _as(lora_B[g], dtype).T, alpha=scale)
    return Forward(tuple(y), torch.stack(h) if len(h) > 1 else h[0][None], mask)


def library_backward(
    dy: Tensors, x: Tensor | None, layers: Layers, h: Tensor | None, mask: Tensor | None,
    scale: float, dropout: float, wanted: Wanted, tiles: Tiles | None,
) -> Backward:  # fmt: skip
    """The same products by hand: dy W lands in dx, and the rank-R product is added in place."""
    dtype, kept_scale = dy[0].dtype, scale / (1 - dropout)
    dx: Tensor | None = None
    if wanted.dx:
        for dy_g, weight in zip(dy, layers.weight, strict=True):
            dx = dy_g @ weight if dx is None else dx.addmm_(dy_g, weight)
    dlora_A, dlora_B = [], []
    for g, (dy_g, lora_A, lora_B) in enumerate(
        zip(layers.adapted(dy), *layers.adapters(), strict=True)
    ):
        if wanted.dx or wanted.dlora_A:
            dh = dy_g @ _as(lora_B, dtype)  # scaled where it is used, at no cost
            keep = _keep(mask, g, lora_A.shape[1], dtype)
            if dx is not None and keep is None:
                dx.addmm_(dh, _as(lora_A, dtype), alpha=scale)
            if dx is not None and keep is not None:
                _add_dropped(dx, _product(dh, _as(lora_A, dtype), kept_scale), keep)
            if wanted.dlora_A:
                assert x is not None
                dlora_A.append(_as(_product(dh.T, _drop(x, keep), kept_scale), lora_A.dtype))
        if wanted.dlora_B:
            assert h is not None
            # Transposed: oneDNN's dy^T h takes 7.6 ms, h^T dy 0.44 (EPYC, N = 3072, fp32).
            dlora_B.append(_as(_product(h[g].T, dy_g, scale).T, lora_B.dtype).contiguous())
    if layers.columns is not None:
        dlora_A, dlora_B = ([torch.cat(each)] if each else [] for each in (dlora_A, dlora_B))
    return Backward(dx, tuple(dlora_A) or None, tuple(dlora_B) or None)


@cache
def _kernels() -> Any:
    """The Triton launchers, imported at the first launch: importing the package needs no Triton."""
    from . import kernels

    return kernels


def _project(
    x: Tensor, layers: Layers, dropout: float, seed: Tensor | None, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    return _kernels().project(
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
    outs = _kernels().low_rank_gemm(
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
    y, h = _kernels().fused_gemm(
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
    (dx,) = _kernels().low_rank_gemm(
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
    (dx,), dh = _kernels().fused_gemm(
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
    dh, dlora_B = _kernels().output_gradients(
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
    dlora_A = _kernels().input_gradients(
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
