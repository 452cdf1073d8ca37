"""Waves: how well the tiles of an output fill a card, and which tile fills it best.

A multiprocessor takes one tile after another, so a GEMM lasts as long as the multiprocessor that
gets the most tiles:

    waves = ceil(tiles / multiprocessors)        time = waves * area of a tile * slowness

2,048 rows of a 768 x 768 layer are 96 tiles of 128 x 128. On 46 multiprocessors these are 3 waves,
and the last wave has 4 tiles: 70 % of the time is used. In tiles of 64 x 64 they are 9 waves, and
93 % is used. But smaller tiles load each operand more often, which `slowness` stands for.

A tile is given as (m, n, ...), rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

# What 64 x 64 tiles take for an area over what 128 x 128 tiles take for it. In between, and beyond,
# it grows with the loads of a product, 1 / m + 1 / n. Measured on an H200, where tiles of 128 x 256
# fit the same line; an assumption on other architectures until one is measured.
SLOWNESS_64 = 1.06
MEASURED_SLOWNESS_64 = {"sm_90": 1.6}
# What a vendor's library is taken to choose from.
VENDOR = ((128, 128), (128, 64), (64, 64))

AnyTile = TypeVar("AnyTile", bound="tuple[int, ...]")


def share(M: int, N: Sequence[int], tile: tuple[int, ...], processors: int) -> float:
    """How much of the multiprocessors' time the outputs [M, N_g] use, between 0 and 1."""
    m, n = tile[:2]
    tiles = -(-M // m) * sum(-(-each // n) for each in N)
    waves = -(-tiles // processors)
    return M * sum(N) / (processors * waves * m * n)


def slowdown(
    M: int, N: Sequence[int], tile: tuple[int, ...], processors: int, arch: str = ""
) -> float:
    """The time of the outputs [M, N_g] over that of 128 x 128 tiles that leave nothing unused.

    Of our own tiles on the architecture `arch`; "" stands for the vendor's.
    """
    slowness = MEASURED_SLOWNESS_64.get(arch, SLOWNESS_64)
    loads = 64 / tile[0] + 64 / tile[1]  # of a product, over those in a 128 x 128 tile
    return (1 + (slowness - 1) * (loads - 1)) / share(M, N, tile, processors)


def best(
    M: int, N: Sequence[int], tiles: Sequence[AnyTile], processors: int, arch: str = "",
    again: int = 0,
) -> AnyTile:  # fmt: skip
    """The tile in which the outputs [M, N_g] are computed first, the earlier one of two as fast.

    `again` is how many columns every tile computes beside its own.
    """

    def time(tile: AnyTile) -> float:
        return slowdown(M, N, tile, processors, arch) * (1 + again / tile[1])

    return min(tiles, key=time)
