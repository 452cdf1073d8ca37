"""Tile sizes as plain data: the shipped tiles of every architecture.

`tiles_for` picks a row; launchers choose nothing. An architecture without a row of its own gets
tiles that fit every card, never an exception. Tiles measured on a card are in `tuned`.
"""

from __future__ import annotations

from typing import NamedTuple

from .waves import best


class Tile(NamedTuple):
    """Rows, columns and depth of one program's tile (0: not tiled), its warps and its stages.

    The compiler makes one buffer less than there are `stages`: from three on the copy of a step
    overlaps with the product of another.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tile of each kernel for one problem, and how tensor cores treat fp32 operands.

    A GEMM has two: one where it computes y, and one where it computes dx.
    """

    project: Tile
    low_rank_gemm: Tile
    low_rank_gemm_dx: Tile
    fused_gemm: Tile
    fused_gemm_dx: Tile
    low_rank: Tile  # low_rank_gemm without its GEMM: only the low-rank product is written
    output_gradients: Tile
    parameter_gradients: Tile
    precision: str = "ieee"


KERNELS = Tiles._fields[:-1]


class Shipped(NamedTuple):
    """The tiles of an architecture. For a GEMM there are several: sizes of outputs differ.

    `group_dx` are those of low_rank_gemm for the dx of a group. A group adds a masked low-rank
    product for each layer to one accumulator, which takes registers. `dx` are those for the dx of
    one layer; an empty `dx` stands for those of y.
    """

    project: Tile
    low_rank_gemm: tuple[Tile, ...]
    group_dx: tuple[Tile, ...]
    fused_gemm: tuple[Tile, ...]
    low_rank: Tile
    output_gradients: Tile
    parameter_gradients: Tile
    dx: tuple[Tile, ...] = ()

    def dx_of(self, segments: int) -> tuple[Tile, ...]:
        """The tiles of low_rank_gemm for the dx of so many layers that share x."""
        return self.group_dx if segments > 1 else self.dx or self.low_rank_gemm


# On sm_86 128 x 128 with 8 warps is the largest output tile whose accumulator stays in registers
# beside the rank-R product (`lora-kernels compile-report`).
_HALF = Shipped(
    project=Tile(32, 0, 64, 4, 4), low_rank=Tile(64, 128, 32, 4, 1),
    low_rank_gemm=(Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 64, 64, 4, 3)),
    group_dx=(Tile(64, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3)),
    fused_gemm=(Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 3)),
    output_gradients=Tile(32, 128, 0, 4, 4), parameter_gradients=Tile(32, 128, 0, 4, 3),
)  # fmt: skip
# Narrower tiles where registers are short: at ranks above 32 the rank-R tiles and accumulators are
# as large as the others, and rows that are not aligned take an address for each element.
_HALF_WIDE = _HALF._replace(
    project=Tile(32, 0, 64, 4, 3), low_rank=Tile(32, 64, 32, 4, 1),
    low_rank_gemm=(Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 3)),
    group_dx=(Tile(32, 64, 32, 4, 3),), fused_gemm=(Tile(32, 128, 32, 8, 3),),
    output_gradients=Tile(32, 64, 0, 4, 3), parameter_gradients=Tile(32, 64, 0, 4, 4),
)  # fmt: skip
# Half as large in fp32, so that two stages fit in 99 KiB of shared memory.
_FLOAT = Shipped(
    project=Tile(32, 0, 32, 4, 4), low_rank=Tile(64, 64, 32, 4, 1),
    low_rank_gemm=(Tile(64, 64, 32, 4, 2),), group_dx=(Tile(64, 64, 32, 4, 2),),
    fused_gemm=(Tile(64, 64, 32, 4, 2),),
    output_gradients=Tile(32, 64, 0, 4, 4), parameter_gradients=Tile(32, 64, 0, 4, 4),
)  # fmt: skip
_FLOAT_WIDE = _FLOAT._replace(
    group_dx=(Tile(32, 64, 32, 4, 2),), fused_gemm=(Tile(32, 64, 32, 4, 2),),
    low_rank=Tile(32, 64, 32, 4, 1),
    output_gradients=Tile(16, 64, 0, 4, 4), parameter_gradients=Tile(16, 64, 0, 4, 4),
)  # fmt: skip
# The interpreter runs small tests: with small tiles their shapes still have ragged edges.
_SMALL = Tile(32, 32, 32, 1, 1)
_INTERPRETER = Shipped(_SMALL, (_SMALL,), (_SMALL,), (_SMALL,), _SMALL, _SMALL, _SMALL)

# sm_80 and sm_90 have shared memory for deeper pipelines. The grid of a gradient is two programs a
# multiprocessor, so a tile may take almost half of the shared memory.
_AMPERE = _HALF._replace(
    **{  # type: ignore[arg-type]
        gemm: tuple(tile._replace(stages=4) for tile in getattr(_HALF, gemm))
        for gemm in ("low_rank_gemm", "group_dx", "fused_gemm")
    },
    output_gradients=Tile(64, 128, 0, 4, 4),
)
# WGMMA, on sm_90, takes deeper tiles than MMA, and wider ones for large outputs. Measured on an
# H200: docs/kernels.md.
_HOPPER = _HALF._replace(
    project=Tile(32, 0, 64, 4, 3), low_rank=Tile(64, 64, 32, 4, 1),
    low_rank_gemm=(
        Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    ),
    dx=(
        Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
    ),
    group_dx=(Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    fused_gemm=(Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 3)),
    output_gradients=Tile(64, 128, 0, 4, 3), parameter_gradients=Tile(64, 64, 0, 4, 4),
)  # fmt: skip
# AMD cards have 64 KiB of shared memory and no asynchronous copies to pipeline by. Compiled only:
# nothing AMD has run.
_AMD = Shipped(
    project=Tile(32, 0, 64, 4, 1), low_rank=Tile(64, 128, 32, 4, 1),
    low_rank_gemm=(Tile(128, 128, 32, 8, 1),), group_dx=(Tile(128, 128, 32, 8, 1),),
    fused_gemm=(Tile(128, 128, 32, 8, 1),),
    output_gradients=Tile(64, 128, 0, 4, 1), parameter_gradients=Tile(32, 128, 0, 4, 1),
)  # fmt: skip
# (architecture, bytes per element of x, not aligned or rank above 32) -> tiles.
DEFAULT_TILES: dict[tuple[str, int, bool], Shipped] = {
    **{("cpu", size, wide): _INTERPRETER for size in (2, 4) for wide in (False, True)},
    ("any", 2, False): _HALF,
    ("any", 2, True): _HALF_WIDE,
    ("any", 4, False): _FLOAT,
    ("any", 4, True): _FLOAT_WIDE,
    ("sm_80", 2, False): _AMPERE,
    ("sm_90", 2, False): _HOPPER,
    ("sm_100", 2, False): _HOPPER,
    # On sm_120 ptxas spills two registers of a thread in the tiles of the other cards.
    ("sm_120", 2, False): _HALF._replace(parameter_gradients=Tile(64, 64, 0, 4, 3)),
    ("sm_120", 4, False): _FLOAT._replace(low_rank=Tile(32, 64, 32, 4, 1)),
    ("sm_120", 2, True): _HALF_WIDE._replace(output_gradients=Tile(32, 64, 0, 4, 1)),
    ("gfx942", 2, False): _AMD,
}

# low_rank_gemm of a weight in NF4, for y and for dx on every card; the key as in DEFAULT_TILES. Its
# steps wait for one another more often than those of a plain weight, so several programs a
# multiprocessor matter: these tiles leave three and more, 128 x 128 leaves one.
NF4_GEMM = {False: Tile(128, 64, 32, 4, 3), True: Tile(64, 64, 32, 4, 3)}

# At higher ranks the rank-R tiles do not fit beside the accumulator.
MAX_RANK = 128


def rank_block(R: int) -> int:
    """R padded to a power of two, 16 at least, for matrix instructions; the padding is masked."""
    return max(16, 1 << (R - 1).bit_length())


def bucket(M: int) -> int:
    """M rounded up to a power of two, so that a new batch length needs no new choice or tuning."""
    return 1 << (M - 1).bit_length() if M else 0


class Outputs(NamedTuple):
    """The outputs of a layer or a group, y [M, N_g] and dx [M, K], and the card's processors."""

    M: int
    N: tuple[int, ...]
    K: int
    processors: int


def shipped(arch: str, itemsize: int, R: int, *, aligned: bool = True) -> Shipped:
    """The row of an architecture for elements of `itemsize` bytes at rank R.

    `aligned` says that N and K are multiples of 16, so that loads can be wide.
    """
    wide = not aligned or rank_block(R) > 32
    kind = arch if aligned or arch == "cpu" else "any"
    return DEFAULT_TILES.get((kind, itemsize, wide), DEFAULT_TILES["any", itemsize, wide])


def tiles_for(
    arch: str, itemsize: int, R: int, *, tf32: bool, aligned: bool = True,
    outputs: Outputs | None = None, nf4: bool = False,
) -> Tiles:  # fmt: skip
    """One tile for each kernel of the row: the first, or that in which `outputs` fill a card best.

    M counts by its bucket, so that a batch of a new length compiles nothing new.
    """
    row = shipped(arch, itemsize, R, aligned=aligned)
    if nf4 and arch != "cpu":
        tile = NF4_GEMM[not aligned or rank_block(R) > 32]
        row = row._replace(low_rank_gemm=(tile,), dx=(tile,))
    M, N, K, processors = outputs or Outputs(0, (), 0, 0)

    def fit(tiles: tuple[Tile, ...], columns: tuple[int, ...], again: int = 0) -> Tile:
        return best(bucket(M), columns, tiles, processors, arch, again) if M else tiles[0]

    tf32 = tf32 or (itemsize == 2 and arch.startswith("sm_"))
    return Tiles(
        project=row.project,
        low_rank_gemm=fit(row.low_rank_gemm, N),
        low_rank_gemm_dx=fit(row.dx_of(len(N)), (K,)),
        fused_gemm=fit(row.fused_gemm, N, rank_block(R)),
        fused_gemm_dx=fit(row.fused_gemm, (K,), rank_block(R)),
        low_rank=row.low_rank,
        output_gradients=row.output_gradients,
        parameter_gradients=row.parameter_gradients,
        precision="tf32" if tf32 else "ieee",
    )


def splits_for(M: int, columns: int, tile: Tile, processors: int) -> int:
    """How many ranges of rows share the sum of a column gradient [R, columns].

    As many as leave each processor two programs of 64 x 128, or as much more of smaller tiles: all
    run at once. But a program has at least four blocks of rows.
    """
    programs = processors * max(2, 2 * 64 * 128 // (tile.m * tile.n))
    return max(1, min(programs // -(-columns // tile.n), M // (4 * tile.m)))


def parts_for(M: int, segments: int, K: int, tile: Tile, processors: int) -> int:
    """How many ranges of K share the sum of h [segments, M, R]: 1, 2, 4 or 8.

    As many as four programs a processor allow; but a program has at least two steps along K.
    """
    programs = segments * -(-M // tile.m)
    wanted = min(8, 4 * processors // programs, K // (2 * tile.k))
    return 1 << max(wanted, 1).bit_length() - 1
