"""The cost model: bytes and FLOPs of each launch of a strategy, and the time they take on a card.

    time = sum over launches of max(bytes / (memory * share), flops / (rate * share)) + gap

`choose` uses it for shapes that nobody has measured, and `bench roofline` prints it. A launch moves
each of its tensors once: what a kernel reads again is taken to come from cache. Partial sums are
written by one launch and read by another. The shares of the datasheet's memory and matrix rates are
assumptions until a card is measured. What stays in cache between launches is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .cards import Card
from .tiles import Tile, Tiles, rank_block, splits_for

GAP_US = 2.0  # from the end of one kernel to the start of the next, in a CUDA graph
MEMORY_SHARE = 0.85
VENDOR_SHARE = 0.80
# The rate of Triton's plain tl.dot loop over that of the vendor's GEMM: near 1 where tl.dot becomes
# mma.sync, less in exact fp32, which has no matrix instructions. On sm_90 and sm_100 the vendor has
# tensor-memory copies and warp specialisation, the loop has not. gfx942 is compiled for only.
TRITON_OVER_VENDOR_MMA, TRITON_OVER_VENDOR_EXACT = 0.94, 0.44
TRITON_OVER_VENDOR = {"sm_90": 0.75, "sm_100": 0.56, "gfx942": 0.69}


class Launch(NamedTuple):
    """One kernel: the bytes it moves, the FLOPs it computes, whether it is the vendor's.

    `exact` marks products in float32 although x is not: they have no matrix instructions.
    """

    kernel: str
    bytes: float
    flops: float = 0.0
    vendor: bool = False
    exact: bool = False


class Size(NamedTuple):
    """Sizes of G = len(N) layers that share x [M, K].

    `element` is bytes per element of x and weight, `adapter` of lora_A and lora_B, `rank` of h and
    dh (0: those of x).
    """

    M: int
    K: int
    N: tuple[int, ...]
    R: int
    dropout: bool
    element: int
    adapter: int = 4
    rank: int = 0

    @property
    def x(self) -> float:
        """Bytes of x, and of dx."""
        return self.element * self.M * self.K

    @property
    def y(self) -> float:
        """Bytes of all y, and of all dy."""
        return self.element * self.M * sum(self.N)

    @property
    def weight(self) -> float:
        """Bytes of all frozen weights."""
        return self.element * self.K * sum(self.N)

    @property
    def h(self) -> float:
        """Bytes of all h, and of all dh."""
        return (self.rank or self.element) * len(self.N) * self.M * self.R

    @property
    def lora_A(self) -> float:
        """Bytes of all lora_A."""
        return self.adapter * len(self.N) * self.R * self.K

    @property
    def lora_B(self) -> float:
        """Bytes of all lora_B."""
        return self.adapter * sum(self.N) * self.R

    @property
    def mask(self) -> float:
        """Bytes of all packed masks; 0 without dropout."""
        return len(self.N) * self.M * self.K / 8 * self.dropout

    @property
    def gemm(self) -> float:
        """FLOPs of the frozen products."""
        return 2 * self.M * self.K * sum(self.N)

    @property
    def rank_K(self) -> float:
        """FLOPs of all products of [M, K] and [K, R], R padded for matrix instructions."""
        return 2 * self.M * self.K * len(self.N) * rank_block(self.R)

    @property
    def rank_N(self) -> float:
        """FLOPs of all products of [M, N] and [N, R], R padded as well."""
        return 2 * self.M * sum(self.N) * rank_block(self.R)

    def alone(self, g: int) -> Size:
        """The g-th layer without its siblings."""
        return self._replace(N=self.N[g : g + 1])


def _project(s: Size) -> Launch:
    return Launch("project", s.x + s.lora_A + s.h + s.mask, s.rank_K)


def _split_forward(s: Size, tiles: Tiles) -> list[Launch]:
    moved = s.x + s.weight + s.h + s.lora_B + s.y
    return [_project(s), Launch("low_rank_gemm", moved, s.gemm + s.rank_N)]


def _fused_forward(s: Size, tiles: Tiles) -> list[Launch]:
    """Every column block computes h again. With dropout it is the forward of split."""
    if s.dropout:
        return _split_forward(s, tiles)
    again = sum(_blocks(N, tiles.fused_gemm) * s.alone(g).rank_K for g, N in enumerate(s.N))
    moved = s.x + s.weight + s.lora_A + s.lora_B + s.h + s.y
    return [Launch("fused_gemm", moved, s.gemm + s.rank_N + again)]


def _hybrid_forward(s: Size, tiles: Tiles) -> list[Launch]:
    layers = [s.alone(g) for g in range(len(s.N))]
    onto = [Launch("gemm", t.x + t.weight + 2 * t.y, t.gemm, vendor=True) for t in layers]
    return [_project(s), Launch("low_rank", s.h + s.lora_B + s.y, s.rank_N), *onto]


def _library_forward(s: Size, tiles: Tiles) -> list[Launch]:
    """All products are the vendor's; the masks are Triton's, as on a GPU that has it.

    The float32 copies that it makes of float16 rows are not counted.
    """
    found = [Launch("draw_masks", s.mask)] * s.dropout
    for t in (s.alone(g) for g in range(len(s.N))):
        found += [Launch("apply_mask", 2 * t.x + t.mask)] * t.dropout
        found += _casts(t)
        found.append(Launch("h", t.x + _cast_A(t) + t.h, t.rank_K, vendor=True))
        found.append(Launch("rank-R product", t.h + _cast_B(t) + t.y, t.rank_N, vendor=True))
        found.append(Launch("gemm", t.x + t.weight + 2 * t.y, t.gemm, vendor=True))
    return found


def _library_backward(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    """The mask is applied twice: to dh lora_A, which is added to dx, and to x for dlora_A."""
    found = []
    for g, t in enumerate(s.alone(g) for g in range(len(s.N))):
        found += _casts(t) * 2  # lora_A and lora_B, and their gradients
        found.append(Launch("dh", t.y + _cast_B(t) + t.h, t.rank_N, vendor=True))
        found.append(Launch("dx", t.y + t.weight + 2 * t.x, t.gemm, vendor=True))
        onto = t.x if g else 0.0  # dx of the layers before, which this one's is added to
        product = t.h + _cast_A(t) + t.x + onto * (not t.dropout)
        found.append(Launch("rank-R product", product, t.rank_K, vendor=True))
        if t.dropout:
            found.append(Launch("apply_mask", 2 * t.x + onto + t.mask))
            found.append(Launch("apply_mask", 2 * t.x + t.mask))
        found.append(Launch("dlora_A", t.x + t.h + _cast_A(t), t.rank_K, vendor=True))
        found.append(Launch("dlora_B", t.y + t.h + _cast_B(t), t.rank_N, vendor=True))
    return found


def _cast_A(s: Size) -> float:
    return s.lora_A * s.element / s.adapter


def _cast_B(s: Size) -> float:
    return s.lora_B * s.element / s.adapter


def _casts(s: Size) -> list[Launch]:
    """lora_A and lora_B cast to or from the dtype of x: the vendor's products take one dtype."""
    if s.adapter == s.element:
        return []
    return [Launch("cast", s.lora_A + _cast_A(s)), Launch("cast", s.lora_B + _cast_B(s))]


def _blocks(columns: int, tile: Tile) -> int:
    return -(-columns // tile.n)


def _partials(s: Size, columns: int, tile: Tile, processors: int) -> float:
    """Bytes of the fp32 partial sums of a gradient [R, columns], one for each range of rows."""
    return 4 * splits_for(s.M, columns, tile, processors) * columns * s.R


def _output_gradients(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    """dlora_B and dh from one read of dy; then the partial sums of both are added up."""
    partials = _partials(s, sum(s.N), tiles.output_gradients, processors)
    # Those of dh: one for each block of columns of the widest layer.
    partials += 4 * _blocks(max(s.N), tiles.output_gradients) * len(s.N) * s.M * s.R
    return [
        Launch("output_gradients", s.y + s.h + s.lora_B + partials, 2 * s.rank_N),
        Launch("add_partials", partials + s.lora_B + s.h),
    ]


def _parameter_gradients(s: Size, tiles: Tiles, processors: int, *, dlora_B: bool) -> list[Launch]:
    """dlora_A from one read of x and, if wanted here, dlora_B from one of dy; then their sums."""
    columns = len(s.N) * s.K + sum(s.N) * dlora_B
    partials = _partials(s, columns, tiles.parameter_gradients, processors)
    moved = s.x + s.h + s.mask + (s.y + s.h) * dlora_B
    return [
        Launch("parameter_gradients", moved + partials, s.rank_K + s.rank_N * dlora_B),
        Launch("add_partials", partials + s.lora_A + s.lora_B * dlora_B),
    ]


def _column_gradients(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    return [
        *_output_gradients(s, tiles, processors),
        *_parameter_gradients(s, tiles, processors, dlora_B=False),
    ]


def _split_backward(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    moved = s.y + s.weight + s.h + s.lora_A + s.mask + s.x
    dx = Launch("low_rank_gemm", moved, s.gemm + s.rank_K)
    return [*_column_gradients(s, tiles, processors), dx]


def _fused_backward(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    """Every column block of dx computes dh again; one of them stores it."""
    again = _blocks(s.K, tiles.fused_gemm) * s.rank_N
    moved = s.y + s.weight + s.lora_A + s.lora_B + s.h + s.mask + s.x
    dx = Launch("fused_gemm", moved, s.gemm + s.rank_K + again)
    return [dx, *_parameter_gradients(s, tiles, processors, dlora_B=True)]


def _hybrid_backward(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    layers = [s.alone(g) for g in range(len(s.N))]
    onto = [Launch("gemm", t.y + t.weight + 2 * t.x, t.gemm, vendor=True) for t in layers]
    low_rank = Launch("low_rank", s.h + s.lora_A + s.mask + s.x, s.rank_K)
    return [*_column_gradients(s, tiles, processors), low_rank, *onto]


Forward = Callable[[Size, Tiles], list[Launch]]
Backward = Callable[[Size, Tiles, int], list[Launch]]
# Forward and backward of each row of `STRATEGIES`, by name.
COSTS: dict[str, tuple[Forward, Backward]] = {
    "library": (_library_forward, _library_backward),
    "split": (_split_forward, _split_backward),
    "fused": (_fused_forward, _fused_backward),
    "hybrid": (_hybrid_forward, _hybrid_backward),
}


def launches(
    strategy: str, size: Size, tiles: Tiles, processors: int, *, backward: bool = True
) -> list[Launch]:
    """The launches of a forward and, with `backward`, of dx, dlora_A and dlora_B."""
    forward_cost, backward_cost = COSTS[strategy]
    return forward_cost(size, tiles) + (backward_cost(size, tiles, processors) if backward else [])


def microseconds(
    kernels: Sequence[Launch], card: Card, dtype: torch.dtype, *, tf32: bool = False,
    memory: float = MEMORY_SHARE, vendor: float = VENDOR_SHARE,
) -> float:  # fmt: skip
    """The time of launches on a card.

    `memory` and `vendor` are the shares of the datasheet's bandwidth and matrix rate that copies
    and the vendor's GEMM attain.
    """
    if dtype is torch.float32:
        triton = TRITON_OVER_VENDOR_MMA if tf32 and card.tf32 else TRITON_OVER_VENDOR_EXACT
    else:
        triton = TRITON_OVER_VENDOR.get(card.arch, TRITON_OVER_VENDOR_MMA)
    total = 0.0
    for kernel in kernels:
        rate = card.single if kernel.exact else card.rate(dtype, tf32)
        share = vendor if kernel.vendor else vendor * triton
        moving = kernel.bytes / (card.memory * memory * 1e3)
        total += max(moving, kernel.flops / (rate * share * 1e6)) + GAP_US
    return total
