"""What a strategy moves and computes, and the time that a card's datasheet makes of it.

The model is what `choose` falls back on for a shape that nobody has measured: for each launch the
larger of bytes / bandwidth and FLOPs / rate, plus a fixed cost, summed over forward and backward.
Bytes are the least each kernel can move (an operand once, partial sums out and in). The
efficiencies are assumptions until a table measured on the card replaces them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .tuning import Tiles, rank_block, splits_for


class Datasheet(NamedTuple):
    """GB/s of memory, dense TFLOP/s: half with fp32 accumulation, TF32, fp32; multiprocessors."""

    bandwidth: float
    half: float
    tf32: float
    single: float
    processors: int


# One card for each architecture, the vendor's figures: A100 SXM 80 GB, RTX 3090, RTX 4090, H100
# SXM, B200, RTX 5090, MI300X.
DATASHEETS = {
    "sm_80": Datasheet(2039, 312, 156, 19.5, 108),
    "sm_86": Datasheet(936, 71, 35.6, 35.6, 82),
    "sm_89": Datasheet(1008, 165, 82.6, 82.6, 128),
    "sm_90": Datasheet(3350, 989, 494, 66.9, 132),
    "sm_100": Datasheet(8000, 2250, 1125, 80, 148),
    "sm_120": Datasheet(1792, 209, 104.8, 104.8, 170),
    "gfx942": Datasheet(5300, 1307, 653, 163, 304),
}
DEFAULT_SHEET = DATASHEETS["sm_86"]

LAUNCH_US = 2.0  # from the end of one kernel to the start of the next, in a CUDA graph
BANDWIDTH_SHARE = 0.85
VENDOR_SHARE = 0.80
# Triton's plain tl.dot loop against the vendor's GEMM: on par with MMA, behind where WGMMA or its
# successor wants tensor-memory copies and warp specialisation.
TRITON_SHARE = {"sm_90": 0.60, "sm_100": 0.45, "gfx942": 0.55}
TRITON_SHARE_MMA = 0.75


class Launch(NamedTuple):
    """One kernel: the bytes it moves, the FLOPs it computes, whether it is the vendor's."""

    kernel: str
    bytes: float
    flops: float
    vendor: bool = False


def forward_launches(
    strategy: str, M: int, N: int, K: int, R: int, size: int, G: int, dropout: bool
) -> list[Launch]:
    """The launches of a forward of G layers y [M, N] = x [M, K] ...; `size` is bytes an element."""
    x, y, w = M * K * size, G * M * N * size, G * N * K * size
    h, small, mask = G * M * R * size, G * R * (N + K) * 4, G * M * K / 8 * dropout
    gemm, rank = 2 * G * M * N * K, 2 * G * M * rank_block(R)
    project = Launch("project", x + h + small / 2 + mask, rank * K)
    if strategy == "split":
        return [project, Launch("low_rank_gemm", x + w + h + small / 2 + y, gemm + rank * N)]
    if strategy == "fused":  # every column block of 128 computes h again
        again = -(-N // 128)
        return [Launch("fused_gemm", x + w + y + h + small, gemm + rank * (N + K * again))]
    vendor = [Launch("gemm", x + w / G + 2 * y / G, gemm / G, vendor=True) for _ in range(G)]
    if strategy == "hybrid":
        return [project, Launch("low_rank", h + small / 2 + y, rank * N), *vendor]
    masks = [
        Launch("mask", 12 * x, 0) for _ in range(G * dropout)
    ]  # drawn, packed, spread, applied
    ranks = [Launch("addmm", (x + 2 * y / G) / 2, rank * (N + K) / G, vendor=True)] * (2 * G)
    return [*masks, *vendor, *ranks]


def backward_launches(
    strategy: str, M: int, N: int, K: int, R: int, size: int, G: int, dropout: bool,
    tiles: Tiles | None = None, processors: int = 82,
) -> list[Launch]:  # fmt: skip
    """The launches of a backward with dx, dlora_A and dlora_B."""
    x, dy, w = M * K * size, G * M * N * size, G * N * K * size
    h, small, mask = G * M * R * size, G * R * (N + K) * 4, G * M * K / 8 * dropout
    gemm, rank = 2 * G * M * N * K, 2 * G * M * rank_block(R)
    vendor = [Launch("gemm", dy / G + w / G + 2 * x, gemm / G, vendor=True) for _ in range(G)]
    if strategy == "library" or tiles is None:
        masks = [Launch("mask", 6 * x, 0) for _ in range(G * dropout)]
        ranks = [Launch("addmm", (x + dy / G) / 2, rank * (N + K) / G / 2, vendor=True)] * (4 * G)
        return [*vendor, *masks, *ranks]
    parts_B = splits_for(M, G * N, tiles.output_gradients, processors) * G * N * R * 4
    parts_A = splits_for(M, G * K, tiles.input_gradients, processors) * G * K * R * 4
    blocks = -(-N // tiles.output_gradients.n)
    parts_h = blocks * G * M * R * 4
    sums_A = Launch("add_parts", parts_A + small / 2, 0)
    dA = Launch("input_gradients", x + h + mask + parts_A, rank * K)
    if strategy == "fused":
        dx = Launch(
            "fused_gemm", dy + w + x + h + small + mask, gemm + rank * (K + N * -(-K // 128))
        )
        dB = Launch("output_gradients", dy + h + parts_B, rank * N)
        return [dx, dB, Launch("add_parts", parts_B + small / 2, 0), dA, sums_A]
    dB = Launch("output_gradients", dy + h + parts_B + parts_h + small / 2, 2 * rank * N)
    first = [dB, Launch("add_parts", parts_B + parts_h + small / 2 + h, 0), dA, sums_A]
    if strategy == "hybrid":
        return [*first, Launch("low_rank", h + small / 2 + mask + x, rank * K), *vendor]
    return [*first, Launch("low_rank_gemm", dy + w + h + small / 2 + mask + x, gemm + rank * K)]


def microseconds(launches: list[Launch], arch: str, dtype: torch.dtype, *, tf32: bool) -> float:
    """The predicted time of launches on the card of an architecture."""
    sheet = DATASHEETS.get(arch, DEFAULT_SHEET)
    if dtype is torch.float32:
        rate, triton = (sheet.tf32, TRITON_SHARE_MMA) if tf32 else (sheet.single, 0.35)
    else:
        rate, triton = sheet.half, TRITON_SHARE.get(arch, TRITON_SHARE_MMA)
    total = 0.0
    for launch in launches:
        share = VENDOR_SHARE if launch.vendor else triton
        moving = launch.bytes / (sheet.bandwidth * BANDWIDTH_SHARE * 1e3)
        computing = launch.flops / (rate * share * 1e6)
        total += max(moving, computing) + LAUNCH_US
    return total
