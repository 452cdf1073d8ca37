"""The cost model: bytes and FLOPs of each launch of a strategy, and the time they take on a card.

    time = sum of max(bytes / (memory * share), flops / (rate * share) * slowdown) + gap

`choose` uses it for shapes that nobody has measured, and `bench roofline` prints it. A launch moves
each of its tensors once: what a kernel reads again is taken to come from cache. Partial sums are
written by one launch and read by another; those of h, which are small, are not counted. The shares
of the datasheet's memory and matrix rates come from one card, an H200, and are assumptions for all
others. What stays in cache between launches is not modelled.

A GEMM is slowed down by its last wave of tiles (`waves`). Ours has the tile that is launched, the
vendor's the best of those that a vendor is taken to have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .cards import Card
from .tiles import Tile, Tiles, rank_block, splits_for
from .waves import VENDOR, best, share, slowdown

# Measured on one card, an H200 (docs/kernels.md); elsewhere they are assumptions.
GAP_US = 2.5  # what a launch takes besides its bytes and FLOPs, in a CUDA graph
MEMORY_SHARE = 0.85
VENDOR_SHARE = 0.80
# GB/s of one multiprocessor in a kernel whose products all have R as a side: it waits for each tile
# before the next step, so a card with much memory bandwidth for its size does not attain it.
NARROW_GBS = 17.0
# What a tile of 128 x 128 takes beside its products: it is seeded, its first operands are awaited.
TILE_US = 1.5
# The rate of a GEMM that also computes the rank-R product, over that of one seeded with it. On
# sm_90 the second product waits for the first in every step.
FUSED_OVER_SEEDED = {"sm_90": 0.62}
# The rate of Triton's plain tl.dot loop over that of the vendor's GEMM: near 1 where tl.dot becomes
# mma.sync, less in exact fp32, which has no matrix instructions. On sm_90 and sm_100 the vendor has
# tensor-memory copies and warp specialisation, the loop has not. gfx942 is compiled for only.
TRITON_OVER_VENDOR_MMA, TRITON_OVER_VENDOR_EXACT = 0.94, 0.44
TRITON_OVER_VENDOR = {"sm_90": 0.78, "sm_100": 0.56, "gfx942": 0.69}


# What a thread does more for each weight of a tile in NF4: counted in the compiled loop for sm_86.
NF4_INSTRUCTIONS = 7


class Launch(NamedTuple):
    """One kernel: the bytes it moves, the FLOPs it computes, whether it is the vendor's.

    `exact` marks products in float32 although x is not: they have no matrix instructions. `out` is
    the (M, each N) that a GEMM writes, in tiles of `tile` (None: those of the vendor).
    """

    kernel: str
    bytes: float
    flops: float = 0.0
    vendor: bool = False
    exact: bool = False
    out: tuple[int, tuple[int, ...]] | None = None
    tile: Tile | None = None

    @property
    def narrow(self) -> bool:
        """Whether it is ours and all its products have R as a side."""
        return self.flops > 0 and self.out is None and not self.vendor

    def slowdown(self, card: Card) -> float:
        """The time of a GEMM over that of one without a last wave and with tiles of 128 x 128."""
        if self.out is None:
            return 1.0
        if self.tile is not None:
            return slowdown(*self.out, self.tile, card.processors, card.arch)
        return slowdown(*self.out, best(*self.out, VENDOR, card.processors), card.processors)

    def filling(self, card: Card) -> float:
        """Microseconds in which our GEMM multiplies nothing: tiles are seeded and stored."""
        if self.tile is None or self.out is None:
            return 0.0
        (M, N), processors = self.out, card.processors
        return TILE_US * M * sum(N) / (share(M, N, self.tile, processors) * processors * 128 * 128)


@dataclass
class Size:
    """Sizes of G = len(N) layers that share x [M, K], and the bytes and FLOPs that follow.

    `element` is bytes per element of x and weight, `adapter` of lora_A and lora_B, `rank` of h and
    dh (0: those of x). Tensors are counted over all layers, and a gradient is as large as its
    tensor.
    """

    M: int
    K: int
    N: tuple[int, ...]
    R: int
    dropout: bool
    element: int
    adapter: int = 4
    rank: int = 0

    def __post_init__(self) -> None:
        M, K, R, G, N = self.M, self.K, self.R, len(self.N), sum(self.N)
        padded = rank_block(R)  # for matrix instructions
        self.x = self.element * M * K
        self.y = self.element * M * N
        self.weight = self.element * K * N
        self.rank = self.rank or self.element
        self.h = self.rank * G * M * R
        self.lora_A = self.adapter * G * R * K
        self.lora_B = self.adapter * N * R
        self.mask = G * M * K / 8 * self.dropout  # packed
        self.gemm = 2 * M * K * N  # FLOPs of the frozen products
        self.rank_K = 2 * M * K * G * padded  # of the products of [M, K] and [K, R]
        self.rank_N = 2 * M * N * padded  # of the products of [M, N] and [N, R]

    def layers(self) -> list[Size]:
        """Each layer without its siblings."""
        return [replace(self, N=(N,)) for N in self.N]


def _vendor(kernel: str, s: Size, columns: tuple[int, ...], moved: float) -> Launch:
    """A frozen product of the vendor's, with `columns` of output; `moved` bytes beside weights."""
    return Launch(kernel, moved + s.weight, s.gemm, vendor=True, out=(s.M, columns))


def _library(s: Size, tiles: Tiles, processors: int) -> Costs:
    """All products are the vendor's, which take one dtype: adapters and gradients are cast.

    The masks are Triton's, as on a GPU that has it. In the backward they are applied twice: to
    dh lora_A, which is added to dx, and to x for dlora_A. Where h is fp32 under fp16, the fp32
    copies of rows of x and dy are not counted.
    """
    forward, backward = [Launch("draw_masks", s.mask)] * s.dropout, []
    onto = 0  # dx of the layers before, which this one's is added to
    for t in s.layers():
        A, B = (size * s.rank / s.adapter for size in (t.lora_A, t.lora_B))  # in the dtype of h
        casts = [Launch("cast", t.lora_A + A), Launch("cast", t.lora_B + B)]
        casts *= s.adapter != s.rank
        forward += [Launch("apply_mask", 2 * t.x + t.mask)] * t.dropout + casts
        forward.append(Launch("h", t.x + A + t.h, t.rank_K, vendor=True))
        forward.append(Launch("rank-R product", t.h + B + t.y, t.rank_N, vendor=True))
        forward.append(_vendor("gemm", t, t.N, t.x + 2 * t.y))
        backward += casts * 2  # lora_A and lora_B, and their gradients
        backward.append(Launch("dh", t.y + B + t.h, t.rank_N, vendor=True))
        backward.append(_vendor("dx", t, (t.K,), t.y + 2 * t.x))
        product = t.h + A + t.x + onto * (not t.dropout)
        backward.append(Launch("rank-R product", product, t.rank_K, vendor=True))
        if t.dropout:
            backward.append(Launch("apply_mask", 2 * t.x + onto + t.mask))
            backward.append(Launch("apply_mask", 2 * t.x + t.mask))
        backward.append(Launch("dlora_A", t.x + t.h + A, t.rank_K, vendor=True))
        backward.append(Launch("dlora_B", t.y + t.h + B, t.rank_N, vendor=True))
        onto = t.x
    return forward, backward


def _project(s: Size) -> Launch:
    return Launch("project", s.x + s.lora_A + s.h + s.mask, s.rank_K)


def _split(s: Size, tiles: Tiles, processors: int) -> Costs:
    y = Launch(
        "low_rank_gemm", s.x + s.weight + s.h + s.lora_B + s.y, s.gemm + s.rank_N,
        out=(s.M, s.N), tile=tiles.low_rank_gemm,
    )  # fmt: skip
    dx = Launch(
        "low_rank_gemm", s.y + s.weight + s.h + s.lora_A + s.mask + s.x, s.gemm + s.rank_K,
        out=(s.M, (s.K,)), tile=tiles.low_rank_gemm_dx,
    )  # fmt: skip
    return [_project(s), y], [*_column_gradients(s, tiles, processors), dx]


def _fused(s: Size, tiles: Tiles, processors: int) -> Costs:
    """Every column block computes h, or dh, again. With dropout the forward is that of split."""
    again = sum(_blocks(t.N[0], tiles.fused_gemm) * t.rank_K for t in s.layers())
    moved = s.x + s.weight + s.lora_A + s.lora_B + s.h + s.y
    flops = s.gemm + s.rank_N + again
    y = Launch("fused_gemm", moved, flops, out=(s.M, s.N), tile=tiles.fused_gemm)
    forward = _split(s, tiles, processors)[0] if s.dropout else [y]
    flops = s.gemm + s.rank_K + _blocks(s.K, tiles.fused_gemm_dx) * s.rank_N
    out, tile = (s.M, (s.K,)), tiles.fused_gemm_dx
    dx = Launch("fused_gemm", moved + s.mask, flops, out=out, tile=tile)
    return forward, [dx, *_parameter_gradients(s, tiles, processors, dlora_B=True)]


def _hybrid(s: Size, tiles: Tiles, processors: int) -> Costs:
    each = s.layers()
    y = [_vendor("gemm", t, t.N, t.x + 2 * t.y) for t in each]
    dx = [_vendor("gemm", t, (t.K,), t.y + 2 * t.x) for t in each]
    forward = [_project(s), Launch("low_rank", s.h + s.lora_B + s.y, s.rank_N), *y]
    low_rank = Launch("low_rank", s.h + s.lora_A + s.mask + s.x, s.rank_K)
    return forward, [*_column_gradients(s, tiles, processors), low_rank, *dx]


def _blocks(columns: int, tile: Tile) -> int:
    return -(-columns // tile.n)


def _partials(s: Size, columns: int, tile: Tile, processors: int) -> int:
    """Bytes of the fp32 partial sums of a gradient [R, columns], one for each range of rows."""
    return 4 * splits_for(s.M, columns, tile, processors) * columns * s.R


def _column_gradients(s: Size, tiles: Tiles, processors: int) -> list[Launch]:
    """dlora_B and dh from one read of dy, their partial sums added up; then dlora_A."""
    partials = _partials(s, sum(s.N), tiles.output_gradients, processors)
    # Those of dh: one for each block of columns of the widest layer.
    partials += 4 * _blocks(max(s.N), tiles.output_gradients) * len(s.N) * s.M * s.R
    return [
        Launch("output_gradients", s.y + s.h + s.lora_B + partials, 2 * s.rank_N),
        Launch("add_partials", partials + s.lora_B + s.h),
        *_parameter_gradients(s, tiles, processors, dlora_B=False),
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


Costs = tuple[list[Launch], list[Launch]]  # of a forward, and of dx, dlora_A and dlora_B
# A row for each row of `STRATEGIES`, by name.
COSTS: dict[str, Callable[[Size, Tiles, int], Costs]] = {
    "library": _library, "split": _split, "fused": _fused, "hybrid": _hybrid,
}  # fmt: skip


def launches(
    strategy: str, size: Size, tiles: Tiles, processors: int, *, backward: bool = True
) -> list[Launch]:
    """The launches of a forward and, with `backward`, of dx, dlora_A and dlora_B."""
    first, second = COSTS[strategy](size, tiles, processors)
    return first + second if backward else first


def microseconds(
    kernels: Sequence[Launch], card: Card, dtype: torch.dtype, *, tf32: bool = False,
    memory: float = MEMORY_SHARE, vendor: float = VENDOR_SHARE,
) -> float:  # fmt: skip
    """The time on a card whose copies and vendor's GEMMs attain these shares of the datasheet."""
    triton = TRITON_OVER_VENDOR.get(card.arch, TRITON_OVER_VENDOR_MMA)
    if dtype is torch.float32:
        triton = TRITON_OVER_VENDOR_MMA if tf32 and card.tf32 else TRITON_OVER_VENDOR_EXACT
    total = 0.0
    for kernel in kernels:
        rate = card.single if kernel.exact else card.rate(dtype, tf32)
        attained = vendor if kernel.vendor else vendor * triton
        if kernel.kernel == "fused_gemm":
            attained *= FUSED_OVER_SEEDED.get(card.arch, 1.0)
        bandwidth = card.memory * memory
        if kernel.narrow:
            bandwidth = min(bandwidth, NARROW_GBS * card.processors)
        moving = kernel.bytes / (bandwidth * 1e3)
        computing = kernel.flops * kernel.slowdown(card) / (rate * attained * 1e6)
        total += max(moving, computing) + kernel.filling(card) + GAP_US
    return total


def nf4_tokens(card: Card) -> tuple[int, int]:
    """Below how many tokens NF4 in our GEMM is estimated to beat dequantising before the vendor's.

    The first number holds if no instruction of dequantising hides behind matrix products, the
    second if all do. All is counted in nanoseconds a weight. Dequantising before a GEMM reads half
    a byte and writes two, once. In our GEMM every block of 128 tokens dequantises anew, 128 threads
    a clock on each multiprocessor, and the products are slower by Triton's share of the vendor's.
    """
    before = 2.5 / (card.memory * MEMORY_SHARE)
    triton = TRITON_OVER_VENDOR.get(card.arch, TRITON_OVER_VENDOR_MMA)
    products = 2 / (card.half * VENDOR_SHARE * 1e3) * (1 / triton - 1)
    dequantising = NF4_INSTRUCTIONS / (128 * 128 * card.processors * card.boost)
    return int(before / (products + dequantising)), int(before / products)
