"""Tile sizes as plain data: a shipped row for every kind of card.

The launchers choose nothing; `tiles_for` picks a row. A card that has no row of its own gets tiles
that fit every card, never an exception. What was measured on a card lies in `tuned`.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows, columns and depth of one program's tile, and how the compiler is to pipeline it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tile of each kernel for one problem, and how tensor cores treat fp32 operands."""

    project: Tile
    low_rank_gemm: Tile
    fused_gemm: Tile
    low_rank: Tile  # low_rank_gemm without its GEMM: only the low-rank product is written
    output_gradients: Tile
    parameter_gradients: Tile
    precision: str = "ieee"


KERNELS = Tiles._fields[:-1]

# 128 x 128 with 8 warps is the largest output tile that keeps its accumulator in registers beside
# the rank-R product on sm_86 (`lora-kernels compile-report`); wider ranks take narrower tiles.
_HALF = Tiles(
    project=Tile(32, 0, 64, 4, 3),
    low_rank_gemm=Tile(128, 128, 32, 8, 3),
    fused_gemm=Tile(128, 128, 32, 8, 3),
    low_rank=Tile(64, 128, 32, 4, 1),
    output_gradients=Tile(64, 128, 0, 4, 2),
    parameter_gradients=Tile(32, 128, 0, 4, 2),
)
# Rank above 32, where the rank-R tiles and accumulators are as large as the others, and rows that
# cannot be loaded wide, whose addresses fill the registers.
_HALF_WIDE = _HALF._replace(
    fused_gemm=Tile(64, 128, 32, 8, 3),
    low_rank=Tile(64, 64, 32, 4, 1),
    output_gradients=Tile(32, 64, 0, 4, 2),
    parameter_gradients=Tile(32, 64, 0, 4, 2),
)
# fp32 halves the tiles, so that two stages fit in 99 KiB.
_FLOAT = Tiles(
    project=Tile(32, 0, 32, 4, 2),
    low_rank_gemm=Tile(64, 64, 32, 4, 2),
    fused_gemm=Tile(64, 64, 32, 4, 2),
    low_rank=Tile(64, 64, 32, 4, 1),
    output_gradients=Tile(32, 64, 0, 4, 2),
    parameter_gradients=Tile(32, 64, 0, 4, 2),
)
_FLOAT_WIDE = _FLOAT._replace(
    fused_gemm=Tile(32, 64, 32, 4, 2),
    low_rank=Tile(32, 64, 32, 4, 1),
    output_gradients=Tile(16, 64, 0, 4, 2),
    parameter_gradients=Tile(16, 64, 0, 4, 2),
)
# The interpreter runs a program at a time in NumPy: small tiles keep ragged test shapes ragged.
_INTERPRETER = Tiles._make([*(Tile(32, 32, 32, 1, 1) for _ in KERNELS), "ieee"])

# (card, bytes an element, rank above 32) -> tiles. WGMMA on sm_90 takes deeper tiles than MMA;
# AMD cards have 64 KiB of shared memory and no asynchronous copies to pipeline by.
_HOPPER = _HALF._replace(
    low_rank_gemm=Tile(128, 128, 64, 8, 3), fused_gemm=Tile(128, 128, 64, 8, 3)
)
DEFAULT_TILES: dict[tuple[str, int, bool], Tiles] = {
    ("cpu", 2, False): _INTERPRETER,
    ("cpu", 2, True): _INTERPRETER,
    ("cpu", 4, False): _INTERPRETER,
    ("cpu", 4, True): _INTERPRETER,
    ("any", 2, False): _HALF,
    ("any", 2, True): _HALF_WIDE,
    ("any", 4, False): _FLOAT,
    ("any", 4, True): _FLOAT_WIDE,
    ("sm_90", 2, False): _HOPPER,
    ("sm_100", 2, False): _HOPPER,
    ("gfx942", 2, False): Tiles._make([*(tile._replace(stages=1) for tile in _HALF[:-1]), "ieee"]),
}

# Above this rank the rank-R tiles no longer fit beside the accumulator.
MAX_RANK = 128


def rank_block(R: int) -> int:
    """R padded to a power of two that a matrix instruction takes; the padding is masked to zero."""
    return max(16, 1 << (R - 1).bit_length())


def bucket(M: int) -> int:
    """The power of two that stands for M: a new batch length neither retunes nor decides anew."""
    return 1 << (M - 1).bit_length() if M else 0


def tiles_for(arch: str, itemsize: int, R: int, *, tf32: bool, aligned: bool = True) -> Tiles:
    """The shipped tiles of a card for elements of `itemsize` bytes at rank R.

    `aligned` says that the sizes of rows are multiples of 16, so that loads can be wide.
    """
    wide = not aligned or rank_block(R) > 32
    kind = arch if aligned or arch == "cpu" else "any"
    tiles = DEFAULT_TILES.get((kind, itemsize, wide), DEFAULT_TILES["any", itemsize, wide])
    return tiles._replace(precision="tf32" if tf32 else "ieee")


def splits_for(M: int, columns: int, tile: Tile, processors: int) -> int:
    """Ranges of rows for a column gradient: two programs a processor, four row blocks each."""
    blocks = -(-columns // tile.n)
    return max(1, min(-(-2 * processors // blocks), M // (4 * tile.m)))
