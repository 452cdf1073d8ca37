"""Tile sizes as plain data: the shipped tiles of every architecture.

`tiles_for` picks a row; launchers choose nothing. An architecture without a row of its own gets
tiles that fit every card, never an exception. Tiles measured on a card are in `tuned`.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows, columns and depth of one program's tile (0: not tiled), its warps and its stages.

    `stages` is how many iterations of loads the compiler keeps under way.
    """

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

# On sm_86 128 x 128 with 8 warps is the largest output tile whose accumulator stays in registers
# beside the rank-R product (`lora-kernels compile-report`).
_HALF = Tiles(
    project=Tile(32, 0, 64, 4, 3), low_rank=Tile(64, 128, 32, 4, 1),
    low_rank_gemm=Tile(128, 128, 32, 8, 3), fused_gemm=Tile(128, 128, 32, 8, 3),
    output_gradients=Tile(64, 128, 0, 4, 2), parameter_gradients=Tile(32, 128, 0, 4, 2),
)  # fmt: skip
# Narrower tiles where registers are short: at ranks above 32 the rank-R tiles and accumulators are
# as large as the others, and rows that are not aligned take an address for each element.
_HALF_WIDE = _HALF._replace(
    fused_gemm=Tile(64, 128, 32, 8, 3), low_rank=Tile(64, 64, 32, 4, 1),
    output_gradients=Tile(32, 64, 0, 4, 2), parameter_gradients=Tile(32, 64, 0, 4, 2),
)  # fmt: skip
# Half as large in fp32, so that two stages fit in 99 KiB of shared memory.
_FLOAT = Tiles(
    project=Tile(32, 0, 32, 4, 2), low_rank=Tile(64, 64, 32, 4, 1),
    low_rank_gemm=Tile(64, 64, 32, 4, 2), fused_gemm=Tile(64, 64, 32, 4, 2),
    output_gradients=Tile(32, 64, 0, 4, 2), parameter_gradients=Tile(32, 64, 0, 4, 2),
)  # fmt: skip
_FLOAT_WIDE = _FLOAT._replace(
    fused_gemm=Tile(32, 64, 32, 4, 2), low_rank=Tile(32, 64, 32, 4, 1),
    output_gradients=Tile(16, 64, 0, 4, 2), parameter_gradients=Tile(16, 64, 0, 4, 2),
)  # fmt: skip
# The interpreter runs small tests: with small tiles their shapes still have ragged edges.
_INTERPRETER = Tiles._make([*(Tile(32, 32, 32, 1, 1) for _ in KERNELS), "ieee"])

# WGMMA, on sm_90, takes deeper tiles than MMA.
_DEEP = Tile(128, 128, 64, 8, 3)
_HOPPER = _HALF._replace(low_rank_gemm=_DEEP, fused_gemm=_DEEP)
# AMD cards have 64 KiB of shared memory and no asynchronous copies to pipeline by. Compiled only:
# nothing AMD has run.
_AMD = Tiles._make([*(tile._replace(stages=1) for tile in _HALF[:-1]), "ieee"])
# (architecture, bytes per element of x, not aligned or rank above 32) -> tiles.
DEFAULT_TILES: dict[tuple[str, int, bool], Tiles] = {
    **{("cpu", size, wide): _INTERPRETER for size in (2, 4) for wide in (False, True)},
    ("any", 2, False): _HALF,
    ("any", 2, True): _HALF_WIDE,
    ("any", 4, False): _FLOAT,
    ("any", 4, True): _FLOAT_WIDE,
    ("sm_90", 2, False): _HOPPER,
    ("sm_100", 2, False): _HOPPER,
    # With two stages ptxas spills two registers of a thread, under fp16 with fp32 adapters.
    ("sm_120", 2, True): _HALF_WIDE._replace(output_gradients=Tile(32, 64, 0, 4, 1)),
    ("gfx942", 2, False): _AMD,
}

# At higher ranks the rank-R tiles do not fit beside the accumulator.
MAX_RANK = 128


def rank_block(R: int) -> int:
    """R padded to a power of two, 16 at least, for matrix instructions; the padding is masked."""
    return max(16, 1 << (R - 1).bit_length())


def bucket(M: int) -> int:
    """M rounded up to a power of two, so that a new batch length needs no new choice or tuning."""
    return 1 << (M - 1).bit_length() if M else 0


def tiles_for(arch: str, itemsize: int, R: int, *, tf32: bool, aligned: bool = True) -> Tiles:
    """The shipped tiles of an architecture for elements of `itemsize` bytes at rank R.

    `aligned` says that N and K are multiples of 16, so that loads can be wide.
    """
    wide = not aligned or rank_block(R) > 32
    kind = arch if aligned or arch == "cpu" else "any"
    tiles = DEFAULT_TILES.get((kind, itemsize, wide), DEFAULT_TILES["any", itemsize, wide])
    tf32 = tf32 or (itemsize == 2 and arch.startswith("sm_"))
    return tiles._replace(precision="tf32" if tf32 else "ieee")


def splits_for(M: int, columns: int, tile: Tile, processors: int) -> int:
    """How many ranges of rows share the sum of a column gradient [R, columns].

    As many as give each processor two programs, but at least four blocks of rows a program.
    """
    blocks = -(-columns // tile.n)
    return max(1, min(-(-2 * processors // blocks), M // (4 * tile.m)))
