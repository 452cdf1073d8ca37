"""What the datasheets say of each card, and what a multiprocessor of each architecture holds.

A new card is a row of CARDS, and a row of ARCHITECTURES if it is the first of its architecture.
The cost model predicts by CARDS; `compile-report` judges by ARCHITECTURES. The AMD rows (gfx...)
are compiled for only: nothing AMD has run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A product: multiprocessors, GHz, GB/s of memory, TFLOP/s, MiB of the last cache.

    `half`, `tf32` (None: no such unit) and `single` are the rates of dense matrix products summed
    in float32; on GeForce cards `half` is half of what float16 sums allow. bf16 runs at fp16's rate
    where it exists. `boost` is the clock of the reference or Founders board at the rate `half`.
    """

    name: str
    arch: str
    processors: int
    boost: float
    memory: float
    half: float
    tf32: float | None
    single: float
    cache: float
    source: str

    def rate(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """TFLOP/s of matrix products in a dtype; with `tf32`, float32 ones may be rounded to it."""
        if dtype is torch.float32:
            return self.tf32 or self.single if tf32 else self.single
        return self.half


_TURING = "NVIDIA Turing Architecture Whitepaper (WP-09183), appendix A, reference board"
_GA102 = "NVIDIA Ampere GA102 Architecture Whitepaper V2, appendix A"
_GA104 = "GeForce RTX 3070 Ti product page (6144 cores, 1.77 GHz, 19 Gbps); rates and L2 as GA104's"
_ADA = "NVIDIA Ada GPU Architecture Whitepaper, appendix A"
_GB202 = "NVIDIA RTX Blackwell GPU Architecture Whitepaper, appendix A"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB)"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture Whitepaper and datasheet (SXM5)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (SXM); compute as H100 SXM5"
_B200 = "NVIDIA Blackwell Architecture Technical Brief (HGX B200); SMs and L2 as the driver reports"
_MI300X = "AMD Instinct MI300X data sheet; the last cache is the Infinity Cache"

_ROWS = (
    Card("RTX 2080 Ti", "sm_75", 68, 1.545, 616, 53.8, None, 13.4, 5.5, _TURING),
    Card("RTX 3070", "sm_86", 46, 1.725, 448, 40.6, 20.3, 20.3, 4, _GA102),
    Card("RTX 3070 Ti", "sm_86", 48, 1.770, 608, 43.5, 21.7, 21.7, 4, _GA104),
    Card("RTX 3090", "sm_86", 82, 1.695, 936, 71.0, 35.6, 35.6, 6, _GA102),
    Card("RTX 4090", "sm_89", 128, 2.520, 1008, 165.2, 82.6, 82.6, 72, _ADA),
    Card("RTX 5090", "sm_120", 170, 2.407, 1792, 209.5, 104.8, 104.8, 96, _GB202),
    Card("A100", "sm_80", 108, 1.410, 2039, 312.0, 156.0, 19.5, 40, _A100),
    Card("H100", "sm_90", 132, 1.830, 3350, 989.4, 494.7, 66.9, 50, _H100),
    Card("H200", "sm_90", 132, 1.830, 4800, 989.4, 494.7, 66.9, 50, _H200),
    Card("B200", "sm_100", 148, 1.860, 8000, 2250, 1125, 75, 126, _B200),
    Card("MI300X", "gfx942", 304, 2.100, 5300, 1307.4, 653.7, 163.4, 256, _MI300X),
)
CARDS: Mapping[str, Card] = {card.name: card for card in _ROWS}


@dataclass(frozen=True)
class Architecture:
    """A multiprocessor: KiB of shared memory (for one program, in all), warps, programs, registers.

    `card` stands for the architecture where only that is known.
    """

    program_shared: int
    shared: int
    warps: int
    programs: int
    card: str
    registers: int = 65536


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_75": Architecture(64, 64, 32, 16, "RTX 2080 Ti"),  # draws and applies masks, no more
    "sm_80": Architecture(163, 164, 64, 32, "A100"),
    "sm_86": Architecture(99, 100, 48, 16, "RTX 3090"),
    "sm_89": Architecture(99, 100, 48, 24, "RTX 4090"),
    "sm_90": Architecture(227, 228, 64, 32, "H100"),
    "sm_100": Architecture(227, 228, 64, 32, "B200"),
    "sm_120": Architecture(99, 100, 48, 24, "RTX 5090"),
    "gfx942": Architecture(64, 64, 32, 16, "MI300X"),
    "gfx1100": Architecture(64, 128, 64, 32, "RTX 3090"),
}


def card_of(gpu: str) -> Card | None:
    """The row whose name stands in torch's name for a card, as whole words; the longest if many."""
    found = [c for c in CARDS.values() if re.search(rf"\b{c.name}\b", gpu, re.IGNORECASE)]
    return max(found, key=lambda card: len(card.name), default=None)


def nearest(gpu: str, arch: str) -> Card:
    """The card's own row, else that of its architecture's card, else the RTX 3090's."""
    own = card_of(gpu)
    if own is not None and own.arch == arch:
        return own
    return CARDS[ARCHITECTURES[arch].card if arch in ARCHITECTURES else "RTX 3090"]
