"""A frozen weight in 4 bits, as bitsandbytes packs NF4: Dettmers et al., QLoRA, 2023.

    weight[n, k] = code[nibble of (n, k)] * absmax[n, k // 64]

Each row of 64 weights is divided by the largest of their magnitudes, and each quotient becomes the
index of the nearest of 16 numbers. A byte holds two indices, that of the even k in its upper half.
The product is made in float32 and rounded once, so a weight is bitsandbytes' own to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

BLOCK = 64  # how many weights share an absmax, side by side along K


class NF4(NamedTuple):
    """packed uint8 [N, K / 2], absmax float32 [N, K / 64], code float32 [16]; all contiguous."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
