"""What the datasheets say of each card: the roof that predictions are made from.

Matrix rates are dense, with float32 accumulation (GeForce cards halve the rate for it), at `boost`,
the clock of the reference or Founders board under that load: multiprocessors x FLOPs a clock x
boost gives `half` again, which is a test. bf16 runs at fp16's rate where it exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Card:
    """GHz; GB/s of memory; TFLOP/s (`tf32` None: no such unit); the last cache in MiB."""

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
CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in _ROWS})

# The card that stands for an architecture where only that is known; any other is taken for a 3090.
_TYPICAL = ("RTX 2080 Ti", "RTX 3090", "RTX 4090", "RTX 5090", "A100", "H100", "B200", "MI300X")
_OF_ARCH = {CARDS[name].arch: CARDS[name] for name in _TYPICAL}


def card_of(gpu: str) -> Card | None:
    """The row of a card by torch's name for it: the longest name that it contains as words."""
    found = [c for c in CARDS.values() if re.search(rf"\b{c.name}\b", gpu, re.IGNORECASE)]
    return max(found, key=lambda card: len(card.name), default=None)


def nearest(gpu: str, arch: str) -> Card:
    """The card's own row, else that of a known card of its architecture."""
    own = card_of(gpu)
    if own is not None and own.arch == arch:
        return own
    return _OF_ARCH.get(arch, CARDS["RTX 3090"])
