"""What the datasheets say of each card: the roof of the roofline.

Matrix rates are dense, with float32 accumulation (GeForce cards halve the rate for it), at the
boost clock of the reference or Founders board. bf16 runs at fp16's rate where it exists.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Memory in GB/s, rates in TFLOP/s, last-level cache in MiB; `tf32` None: no such unit."""

    name: str
    arch: str
    memory: float
    half: float
    tf32: float | None
    fp32: float
    l2: float
    source: str

    def rate(self, dtype: str) -> float:
        """The rate of matrix products in a dtype of `cases.DTYPES`."""
        if dtype in ("bfloat16", "float16"):
            return self.half
        return self.tf32 or self.fp32 if dtype == "tf32" else self.fp32


_TURING = "NVIDIA Turing Architecture Whitepaper (WP-09183), appendix A"
_GA10X = "NVIDIA Ampere GA102 Architecture Whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU Architecture Whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture Whitepaper, appendix A"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB)"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet (SXM5); sparse figures halved"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (SXM); sparse figures halved"

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("RTX 2080 Ti", "sm_75", 616, 53.8, None, 13.4, 5.5, _TURING),
        Card("RTX 3070", "sm_86", 448, 40.6, 20.3, 20.3, 4, _GA10X),
        Card("RTX 3070 Ti", "sm_86", 608, 43.5, 21.7, 21.7, 4, "NVIDIA GA104 figures as for GA102"),
        Card("RTX 3090", "sm_86", 936, 71.0, 35.6, 35.6, 6, _GA10X),
        Card("RTX 4090", "sm_89", 1008, 165.2, 82.6, 82.6, 72, _ADA),
        Card("RTX 5090", "sm_120", 1792, 209.5, 104.8, 104.8, 96, _BLACKWELL),
        Card("A100", "sm_80", 2039, 312.0, 156.0, 19.5, 40, _A100),
        Card("H100", "sm_90", 3350, 989.4, 494.7, 66.9, 50, _H100),
        Card("H200", "sm_90", 4800, 989.4, 494.7, 66.9, 50, _H200),
    )
}


def card_of(gpu: str) -> Card | None:
    """The row of a card by torch's name for it: the longest name that it contains."""
    found = [card for name, card in CARDS.items() if name.lower() in gpu.lower()]
    return max(found, key=lambda card: len(card.name), default=None)
