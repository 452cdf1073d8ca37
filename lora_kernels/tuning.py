"""Tile sizes: plain data, one row a kernel and a kind of card.

The launchers choose nothing; `tiles_for` picks the row. A card that has no row of its own gets the
tiles that fit every card (no spill, at most 64 KiB of shared memory), never an exception.
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
    input_gradients: Tile
    precision: str = "ieee"


# Keyed by bytes an element. 128 x 128 with 8 warps is the largest output tile that keeps its
# accumulator in registers beside the rank-R product on sm_86; fp32 halves the depth so that two
# stages fit in 99 KiB.
_HALF = Tiles(
    project=Tile(32, 0, 64, 4, 3),
    low_rank_gemm=Tile(128, 128, 32, 8, 3),
    fused_gemm=Tile(128, 128, 32, 8, 3),
    low_rank=Tile(64, 128, 32, 4, 1),
    output_gradients=Tile(64, 128, 0, 4, 2),
    input_gradients=Tile(64, 128, 0, 4, 2),
)
_FLOAT = Tiles(
    project=Tile(32, 0, 32, 4, 2),
    low_rank_gemm=Tile(64, 64, 32, 4, 2),
    fused_gemm=Tile(64, 64, 32, 4, 2),
    low_rank=Tile(64, 64, 32, 4, 1),
    output_gradients=Tile(32, 64, 0, 4, 2),
    input_gradients=Tile(32, 64, 0, 4, 2),
)
# The interpreter runs a program at a time in NumPy: small tiles keep ragged test shapes ragged.
_INTERPRETER = Tiles(
    project=Tile(32, 0, 32, 1, 1),
    low_rank_gemm=Tile(32, 32, 32, 1, 1),
    fused_gemm=Tile(32, 32, 32, 1, 1),
    low_rank=Tile(32, 32, 32, 1, 1),
    output_gradients=Tile(32, 32, 0, 1, 1),
    input_gradients=Tile(32, 32, 0, 1, 1),
)
DEFAULT_TILES: dict[tuple[str, int], Tiles] = {
    ("cpu", 2): _INTERPRETER,
    ("cpu", 4): _INTERPRETER,
    ("gpu", 2): _HALF,
    ("gpu", 4): _FLOAT,
}

# Above this rank the rank-R tiles no longer fit beside the accumulator.
MAX_RANK = 128


def rank_block(R: int) -> int:
    """R padded to a power of two that a matrix instruction takes; the padding is masked to zero."""
    return max(16, 1 << (R - 1).bit_length())


def tiles_for(arch: str, itemsize: int, *, tf32: bool) -> Tiles:
    """The shipped tiles of a card for elements of `itemsize` bytes."""
    kind = "cpu" if arch == "cpu" else "gpu"
    return DEFAULT_TILES[kind, itemsize]._replace(precision="tf32" if tf32 else "ieee")


def splits_for(M: int, columns: int, tile: Tile, processors: int) -> int:
    """Ranges of rows for a column gradient: two programs a processor, four row blocks each."""
    blocks = -(-columns // tile.n)
    return max(1, min(-(-2 * processors // blocks), M // (4 * tile.m)))
