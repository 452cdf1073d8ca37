"""The strategy `library`: the vendor's GEMMs, each added in place to a low-rank product.

It takes every problem: on a CPU, on a card that Triton's matrix products do not serve, in float64.

The low-rank product is written first, because then the sum costs nothing: a GEMM adds in registers
to what it stores anyway, while a low-rank product added to y would read and write y once more. On
an EPYC with one thread, 512 x 768 x 768 in bf16, the sum takes 0.1 ms of 3.0, and 0.3 ms the other
way round. dh is made as its transpose [R, M]: in float32 MKL takes 0.18 ms for it instead of 0.47,
and rounds less. h is not: there the transpose rounds more than eager code at ranks below 8.

float16 x under float32 adapters is made float32 for every rank-sized product and for the gradients
of the parameters, a block of rows at a time: what is copied is never all of x, y, dx or dy.

Masks are drawn and applied by Triton where a GPU has it, else by plain torch (`algebra.masks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    rank_dtype,
    segments_of,
)
from ..algebra.packs import Pack, first_of
from ..hardware.tiles import Tiles
from .problem import has_triton, triton_kernels


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`. Where it is so already, this takes the host a tenth of the time of t.to."""
    return t if t.dtype is dtype else t.to(dtype)


# How many rows of a float16 tensor are made float32 at a time.
_BLOCK = 2048


def _product(
    a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """bias + alpha * a b in `dtype`, computed in the dtype of b and rounded once."""
    if a.dtype is b.dtype is dtype:
        return a @ b if alpha == 1 and bias is None else _sum(a, b, alpha, bias)
    out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    for rows, out_rows in _blocks(a, out):
        out_rows.copy_(_sum(_as(rows, b.dtype), b, alpha, bias))
    return out


def _sum(a: Tensor, b: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    """bias + alpha * a b in the dtype of both; with a bias, this is the dtype of x."""
    if bias is not None:  # under autocast x has its dtype
        return torch.addmm(_as(bias, a.dtype), a, b, alpha=alpha)
    # With an `out`, autocast leaves a product alone. At beta = 0 the first argument is not read.
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _row_sum(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """alpha * s^T t, a sum over the rows of both, in the dtype of s."""
    if s.dtype is t.dtype:
        return _product(s.T, t, alpha, s.dtype)
    out = s.new_zeros(s.shape[1], t.shape[1])
    for s_rows, t_rows in _blocks(s, t):
        out.addmm_(s_rows.T, _as(t_rows, s.dtype), alpha=alpha)
    return out


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """out + alpha * a b, in place; the product is computed in the dtype of b."""
    if out.dtype is b.dtype:
        return out.addmm_(a, b, alpha=alpha)
    for out_rows, rows in _blocks(out, a):
        out_rows.add_(_sum(_as(rows, b.dtype), b, alpha, None))
    return out


def add_frozen(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out + a b, in place; b is a frozen weight, or its transpose, in the dtype of out."""
    if out.dtype is torch.float32 and (b.shape[1] < 16 or out.shape[0] < 4):
        # For so few columns or rows MKL adds product after product to `out`, and rounds twice as
        # much as eager code, whose sum starts at zero.
        out.add_(a @ b)
    else:
        out.addmm_(a, b)


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors, _BLOCK rows at a time."""
    return zip(a.split(_BLOCK), b.split(_BLOCK), strict=True)


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
    dx: Tensor | None, dh: Tensor, lora_A: Tensor, scale: float, keep: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dx [M, K] of `dtype` (None: zero) + scale * D(dh lora_A)."""
    if keep is None and dx is not None:
        return _add_product(dx, dh, lora_A, scale)
    product = _product(dh, lora_A, scale, dtype)
    if keep is not None and keep.dtype is torch.uint8:
        return triton_kernels().apply_mask(product, keep, onto=dx)
    if keep is not None:
        product.view(keep.dtype).bitwise_and_(keep)
    return product if dx is None else dx.add_(product)


def _y(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: list[Tensor], lora_B: Tensors,
    settings: Settings,
) -> Tensor:  # fmt: skip
    """y [M, N] of one layer, of h and lora_B of its segments.

    For a whole layer the rank-R product is y at first, and the frozen product is added in place.
    Segments cannot start so. Nor may products in float32 under float16: they may be the larger
    part of y, which is rounded twice, and PEFT leaves them out the first time.
    """
    scale, columns = settings.scale, settings.columns
    wide = rank_dtype(x.dtype, lora_B[0].dtype)
    if columns is None and wide is x.dtype:
        y = _product(h[0], _as(lora_B[0], wide).T, scale, wide, bias)
        add_frozen(y, x, weight.T)
        return y
    y = _sum(x, weight.T, 1, bias)
    for y_g, h_g, B_g in zip(segments_of((y,), columns), h, lora_B, strict=True):
        _add_product(y_g, h_g, _as(B_g, wide).T, scale)
    return y


def library_forward(
    x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None, tiles: Tiles | None
) -> Forward:
    """cuBLAS or oneDNN, product by product."""
    if settings.pack is not None:
        return _pack_forward(x, operands, settings, settings.pack, seed)
    lora_A, lora_B = operands.adapters(settings.columns)
    h, mask = _projected(x, lora_A, settings.dropout, seed)
    own = len(h) // len(operands.weight)  # segments of a layer
    y = [
        _y(x, weight, bias, h[g : g + own], lora_B[g : g + own], settings)
        for g, (weight, bias) in enumerate(zip(operands.weight, operands.bias, strict=True))
    ]
    return Forward(tuple(y), torch.stack(h) if len(h) > 1 else h[0][None], mask)


def _projected(
    x: Tensor, lora_A: Tensors, dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """h [M, R] of each lora_A, and the packed masks."""
    (M, K), dtype = x.shape, x.dtype
    wide_A = rank_dtype(dtype, lora_A[0].dtype)
    mask = None if seed is None else _draw(seed, len(lora_A), M, K, dropout)
    h = []
    for g, each in enumerate(lora_A):
        dropped_x = _drop(x, _keep(mask, g, K, dtype))
        h.append(_product(dropped_x, _as(each, wide_A).T, 1 / (1 - dropout), wide_A))
    return h, mask


def add_low_rank(
    y: Tensor, x: Tensor, operands: Operands, settings: Settings, seed: Tensor | None
) -> Forward:
    """y + scale * D(x) lora_A^T lora_B^T in place, for one y [M, N] that another has computed.

    `operands` has no weight; `library_backward` takes it like that, and gives the dx of this part.
    """
    (lora_B,) = operands.lora_B
    (h,), mask = _projected(x, operands.lora_A, settings.dropout, seed)
    _add_product(y, h, _as(lora_B, rank_dtype(x.dtype, lora_B.dtype)).T, settings.scale)
    return Forward((y,), h[None], mask)


def library_backward(
    dy: Tensors, x: Tensor | None, operands: Operands, h: Tensor | None, mask: Tensor | None,
    settings: Settings, wanted: Wanted, tiles: Tiles | None,
) -> Backward:  # fmt: skip
    """The same products by hand: rank-R products are dx at first, and dy W is added in place."""
    if settings.pack is not None:
        return _pack_backward(dy, x, operands, h, mask, settings, settings.pack, wanted)
    scale, dropout, _, columns, _ = settings
    dtype, kept_scale = dy[0].dtype, 1 / (1 - dropout)
    dx: Tensor | None = None
    dlora_A, dlora_B = [], []
    for g, (dy_g, lora_A, lora_B) in enumerate(
        zip(segments_of(dy, columns), *operands.adapters(columns), strict=True)
    ):
        wide_A, wide_B = rank_dtype(dtype, lora_A.dtype), rank_dtype(dtype, lora_B.dtype)
        if wanted.dx or wanted.dlora_A:
            if wide_B is dtype:
                dh = _product(_as(lora_B, dtype).T, dy_g.T, scale, dtype).T
            else:
                dh = _product(dy_g, _as(lora_B, wide_B), scale, wide_B)
            dh = _as(dh, wide_A)
            keep = _keep(mask, g, lora_A.shape[1], dtype)
            if wanted.dx:
                dx = _add_dropped(dx, dh, _as(lora_A, wide_A), kept_scale, keep, dtype)
            if wanted.dlora_A:
                assert x is not None
                dlora_A.append(_as(_row_sum(dh, _drop(x, keep), kept_scale), lora_A.dtype))
        if wanted.dlora_B:
            assert h is not None
            # Transposed: oneDNN's dy^T h takes 7.6 ms, h^T dy 0.44 (EPYC, N = 3072, fp32).
            gradient = _row_sum(_as(h[g], wide_B), dy_g, scale).T
            dlora_B.append(_as(gradient, lora_B.dtype).contiguous())
    if dx is not None:
        for weight, dy_g in zip(operands.weight, dy, strict=bool(operands.weight)):
            add_frozen(dx, dy_g, weight)
    if columns is not None:
        dlora_A, dlora_B = ([torch.cat(each)] if each else [] for each in (dlora_A, dlora_B))
    return Backward(dx, tuple(dlora_A) or None, tuple(dlora_B) or None)


def _pack_forward(
    x: Tensor, operands: Operands, settings: Settings, pack: Pack, seed: Tensor | None
) -> Forward:
    """The low-rank product adapter by adapter, on its rows; the frozen one on all rows."""
    columns, C, (M, K) = settings.columns, len(pack.ranks), x.shape
    G = len(operands.weight if columns is None else columns)
    wide = rank_dtype(x.dtype, first_of(operands.lora_A).dtype)
    h = x.new_zeros(G, M, pack.rank, dtype=wide)
    mask = None
    if seed is not None:  # where an adapter has no dropout, all is kept
        mask = torch.full((G, M, masks.packed_width(K)), 255, dtype=torch.uint8, device=x.device)
    last = columns is None and wide is x.dtype  # whether the frozen product comes last (see `_y`)
    y = tuple(
        x.new_empty(M, weight.shape[0]) if last else _sum(x, weight.T, 1, bias)
        for weight, bias in zip(operands.weight, operands.bias, strict=True)
    )
    for c, rows in pack.rows():
        own = tuple(each[rows] for each in y)
        biases = operands.bias if last else (None,) * G
        if pack.ranks[c] == 0:
            for y_g, bias in zip(own if last else (), biases, strict=False):
                y_g.copy_(y_g.new_zeros(()) if bias is None else bias)
            continue
        lora_A, lora_B = _of_adapter(operands, c, C).adapters(columns)
        dropout = pack.dropouts[c]
        draws = seed[c : c + 1] if seed is not None and dropout else None
        own_h, own_mask = _projected(x[rows], lora_A, dropout, draws)
        for g, each in enumerate(own_h):
            h[g, rows, : pack.ranks[c]] = each
        if mask is not None and own_mask is not None:
            mask[:, rows] = own_mask
        y_segments = segments_of(own, columns)
        for y_g, h_g, B_g, bias in zip(y_segments, own_h, lora_B, biases, strict=True):
            B = _as(B_g, wide).T
            if last:
                onto, beta = (y_g, 0) if bias is None else (_as(bias, wide), 1)
                torch.addmm(onto, h_g, B, beta=beta, alpha=pack.scales[c], out=y_g)
            else:
                _add_product(y_g, h_g, B, pack.scales[c])
    if last:
        for y_g, weight in zip(y, operands.weight, strict=True):
            add_frozen(y_g, x, weight.T)
    return Forward(y, h, mask)


def _of_adapter(operands: Operands, c: int, adapters: int) -> Operands:
    """One adapter of a pack, without the frozen layers."""
    return Operands((), (), *operands.of_adapter(c, adapters))


def _pack_backward(
    dy: Tensors, x: Tensor | None, operands: Operands, h: Tensor | None, mask: Tensor | None,
    settings: Settings, pack: Pack, wanted: Wanted,
) -> Backward:  # fmt: skip
    """The gradients adapter by adapter, on its rows; dy W on all rows."""
    C = len(pack.ranks)
    dlora_A, dlora_B = (
        [None if p is None else torch.zeros_like(p) for p in parameters] if want else None
        for want, parameters in (
            (wanted.dlora_A, operands.lora_A),
            (wanted.dlora_B, operands.lora_B),
        )
    )
    pieces = []
    for c, rows in pack.rows():
        own_dy = tuple(each[rows] for each in dy)
        if pack.ranks[c] == 0:
            K = first_of(operands.lora_A).shape[1]
            pieces.append(dy[0].new_zeros(own_dy[0].shape[0], K))
            continue
        own_settings = Settings(pack.scales[c], pack.dropouts[c], "library", settings.columns)
        found = library_backward(
            own_dy,
            None if x is None else x[rows],
            _of_adapter(operands, c, C),
            None if h is None else h[:, rows, : pack.ranks[c]],
            None if mask is None or not pack.dropouts[c] else mask[:, rows],
            own_settings, wanted, None,
        )  # fmt: skip
        if found.dx is not None:
            pieces.append(found.dx)
        for all_of, own in ((dlora_A, found.dlora_A), (dlora_B, found.dlora_B)):
            if all_of is not None and own is not None:
                all_of[c::C] = own
    dx = None
    if wanted.dx:
        dx = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        for weight, dy_g in zip(operands.weight, dy, strict=True):
            add_frozen(dx, dy_g, weight)
    return Backward(dx, *(each if each is None else tuple(each) for each in (dlora_A, dlora_B)))  # type: ignore[arg-type]


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
