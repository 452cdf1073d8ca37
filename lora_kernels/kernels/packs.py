"""What kernels read of a pack (`algebra.packs`): tables in device memory, and what plans need.

    runs       int32 [blocks, 4]   adapter, first row, last row + 1, the adapter's first row: of
                                   each block of rows, or of each split of a sum over rows
    ranks      int32 [C]           the rank of each adapter
    A_at, B_at int64 [C, G]        elements from the first adapter's lora_A or lora_B to each one's
    scales, kept_scales float32 [C], thresholds int32 [C]
    sums       int32 [C, 4]        first split, last split + 1, ranks of the adapters before, rank

Each adapter's lora_A [G R_c, K] and lora_B [N, R_c] are contiguous.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.packs import Pack, integers, numbers, table, thresholds
from ..hardware.tiles import Tile

Tables = tuple[Tensor, ...]
Places = tuple[tuple[int, ...], ...]


class Shared(NamedTuple):
    """What a plan reads of a pack: the widest rank, and what divides all ranks and all places."""

    rank: int
    rank_by: int
    A_by: int
    B_by: int


class Packed(NamedTuple):
    """A pack, and where the adapters' tensors lie (`algebra.packs.places`)."""

    pack: Pack
    A_at: Places
    B_at: Places
    device: torch.device

    def shared(self) -> Shared:
        """What its plans read."""
        rank_by = math.gcd(8, *self.pack.ranks)
        A_by, B_by = (math.gcd(8, *sum(at, ())) for at in (self.A_at, self.B_at))
        return Shared(self.pack.rank, rank_by, A_by, B_by)

    def runs(self, length: int) -> Tensor:
        """The rows in runs of at most `length`, each of one adapter."""
        return integers(self.pack.runs(length), self.device)

    def ranks(self) -> Tensor:
        """The rank of each adapter."""
        return integers(self.pack.ranks, self.device)

    def places(self, at: Places) -> Tensor:
        """A_at or B_at."""
        return table(at, torch.int64, self.device)

    def scales(self) -> Tensor:
        """The scale of each adapter."""
        return numbers(self.pack.scales, self.device)

    def kept_scales(self) -> Tensor:
        """Dropout's 1 / (1 - p) of each adapter."""
        return numbers(self.pack.kept_scales, self.device)


def project_tables(packed: Packed | None, tile: Tile) -> tuple[Tables | None, Shared | None]:
    """For `project`: runs, ranks, A_at, kept scales, thresholds."""
    if packed is None:
        return None, None
    drawn = thresholds(packed.pack, packed.device)
    tables = packed.runs(tile.m), packed.ranks(), packed.places(packed.A_at)
    return (*tables, packed.kept_scales(), drawn), packed.shared()


def gemm_tables(
    packed: Packed | None, tile: Tile, transposed: bool
) -> tuple[Tables | None, Shared | None]:
    """For `low_rank_gemm`: runs, ranks, the places of v and the scales.

    v is lora_B and the scale the adapter's; as gradient of x (`transposed`) v is lora_A^T, and the
    scale dropout's.
    """
    if packed is None:
        return None, None
    at = packed.places(packed.A_at if transposed else packed.B_at)
    scales = packed.kept_scales() if transposed else packed.scales()
    return (packed.runs(tile.m), packed.ranks(), at, scales), packed.shared()


def fused_tables(
    packed: Packed | None, tile: Tile, transposed: bool
) -> tuple[Tables | None, Shared | None]:
    """For `fused_gemm`: runs, ranks, the places of a and of v, the scales of h and of the product.

    Without dropout, which `fused_gemm` does not draw, h has the scale 1.
    """
    if packed is None:
        return None, None
    A_at, B_at = packed.places(packed.A_at), packed.places(packed.B_at)
    a_at, v_at = (B_at, A_at) if transposed else (A_at, B_at)
    scales, kept = packed.scales(), packed.kept_scales()
    h_scales = scales if transposed else numbers((1.0,) * len(packed.pack.ranks), packed.device)
    tables = packed.runs(tile.m), packed.ranks(), a_at, v_at
    return (*tables, h_scales, kept if transposed else scales), packed.shared()


def gradient_tables(packed: Packed, length: int) -> tuple[Tables, Tensor]:
    """For the sums over rows: runs of `length`, ranks, B_at, kept scales, scales; and `sums`."""
    tables = packed.runs(length), packed.ranks(), packed.places(packed.B_at)
    sums = integers(packed.pack.sums(length), packed.device)
    return (*tables, packed.kept_scales(), packed.scales()), sums
