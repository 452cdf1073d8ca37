"""What a strategy moves and computes, and the time that a card's datasheet makes of it.

    time = sum over launches of max(bytes / (memory * b), flops / (rate * share)) + launches * gap

It is what `choose` falls back on for a shape that nobody has measured, and what `bench roofline`
prints. Every tensor counts once a launch (what a kernel reads again is taken to come from cache),
partial sums out and in. The shares are assumptions until a card is measured; what a small layer
keeps in cache between launches is not modelled.
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
# Triton's plain tl.dot loop over the vendor's GEMM: on par with MMA, behind where WGMMA or its
# successor wants tensor-memory copies and warp specialisation, and without matrix instructions.
TRITON_OVER_VENDOR = {"sm_90": 0.75, "sm_100": 0.56, "gfx942": 0.69}
TRITON_OVER_VENDOR_MMA, TRITON_OVER_VENDOR_EXACT = 0.94, 0.44


class Launch(NamedTuple):
    """One kernel: the bytes it moves, the FLOPs it computes, whether it is the vendor's.

    `exact` marks products of float32 whatever the dtype of x: they have no matrix instructions.
    """

    kernel: str
    bytes: float
    flops: float = 0.0
    vendor: bool = False
    exact: bool = False


class Size(NamedTuple):
    """G = len(N) layers that read one x [M, K]; bytes an element of x and W, and of an adapter."""

    M: int
    K: int
    N: tuple[int, ...]
    R: int
    dropout: bool
    element: int
    adapter: int = 4

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
        return self.element * len(self.N) * self.M * self.R

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
        """FLOPs of all [M, K] by [K, R], with R padded to what a matrix instruction takes."""
        return 2 * self.M * self.K * len(self.N) * rank_block(self.R)

    @property
    def rank_N(self) -> float:
        """FLOPs of all [M, N] by [N, R], padded."""
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
    """Every column block computes h again; with dropout it is split's."""
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
    """Rank-R products by the vendor; masks as a GPU with Triton draws and applies them."""
    found = [Launch("draw_masks", s.mask)] * s.dropout
    for t in (s.alone(g) for g in range(len(s.N))):
        found += [Launch("apply_mask", 2 * t.x + t.mask)] * t.dropout
        found += _casts(t)
        found.append(Launch("h", t.x + _cast_A(t) + t.h, t.rank_K, vendor=True))
        found.append(Launch("rank-R product", t.h + _cast_B(t) + t.y, t.rank_N, vendor=True))
        found.append(Launch("gemm", t.x + t.weight + 2 * t.y, t.gemm, vendor=True))
    return found


def _library_backward(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    """The mask is applied to dh lora_A on its way into dx, and again to x for dlora_A."""
    found = []
    for g, t in enumerate(s.alone(g) for g in range(len(s.N))):
        found += _casts(t) * 2  # the operands in, the gradients out
        found.append(Launch("dh", t.y + _cast_B(t) + t.h, t.rank_N, vendor=True))
        found.append(Launch("dx", t.y + t.weight + 2 * t.x, t.gemm, vendor=True))
        onto = t.x if g else 0.0  # the first product is dx, the next are added to it
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
    """lora_A and lora_B to or from the dtype of x, which the vendor's products want."""
    if s.adapter == s.element:
        return []
    return [Launch("cast", s.lora_A + _cast_A(s)), Launch("cast", s.lora_B + _cast_B(s))]


def _blocks(columns: int, tile: Tile) -> int:
    return -(-columns // tile.n)


def _parts(s: Size, columns: int, tile: Tile, processors: int) -> float:
    """Bytes of the partial sums of gradients of so many columns."""
    return 4 * splits_for(s.M, columns, tile, processors) * columns * s.R


def _output_gradients(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    """dlora_B and dh from one read of dy, each then added up."""
    parts = _parts(s, sum(s.N), tiles.output_gradients, processors)
    # dh's by column block of the widest layer
    parts += 4 * _blocks(max(s.N), tiles.output_gradients) * len(s.N) * s.M * s.R
    return [
        Launch("output_gradients", s.y + s.h + s.lora_B + parts, 2 * s.rank_N),
        Launch("add_partials", parts + s.lora_B + s.h),
    ]


def _parameter_gradients(s: Size, tiles: Tiles, processors: int, *, dlora_B: bool) -> list[Launch]:
    """dlora_A from one read of x, and dlora_B of dy if it is wanted here, added up together."""
    columns = len(s.N) * s.K + sum(s.N) * dlora_B
    parts = _parts(s, columns, tiles.parameter_gradients, processors)
    moved = s.x + s.h + s.mask + (s.y + s.h) * dlora_B
    return [
        Launch("parameter_gradients", moved + parts, s.rank_K + s.rank_N * dlora_B),
        Launch("add_partials", parts + s.lora_A + s.lora_B * dlora_B),
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
    """dx computes dh on the way, once for each of its column blocks."""
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
# The rows of `dispatch.STRATEGIES`.
COSTS: dict[str, tuple[Forward, Backward]] = {
    "library": (_library_forward, _library_backward),
    "split": (_split_forward, _split_backward),
    "fused": (_fused_forward, _fused_backward),
    "hybrid": (_hybrid_forward, _hybrid_backward),
}


def launches(
    strategy: str, size: Size, tiles: Tiles, processors: int, *, backward: bool = True
) -> list[Launch]:
    """The launches of a forward, and of a `backward` with dx, dlora_A and dlora_B."""
    first, second = COSTS[strategy]
    return first(size, tiles) + (second(size, tiles, processors) if backward else [])


def microseconds(
    kernels: Sequence[Launch], card: Card, dtype: torch.dtype, *, tf32: bool = False,
    memory: float = MEMORY_SHARE, vendor: float = VENDOR_SHARE,
) -> float:  # fmt: skip
    """The time of launches on a card, of whose datasheet so large shares are attained."""
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
