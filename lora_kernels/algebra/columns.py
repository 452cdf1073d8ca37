"""LoRA on ranges of the columns of one layer's y: query and value of GPT-2's c_attn, say.

G ranges, each with a LoRA of rank R of its own. Their lora_A [R, K] are stacked to [G R, K], and
their lora_B [N_g, R] to [sum of N_g, R], as in loralib's MergedLinear. Unfolded, the same update is
one LoRA of the whole layer of rank G R, with a block-diagonal lora_B [N, G R]: the form that every
LoRA library reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def check_columns(columns: Ranges, N: int) -> None:
    """ValueError unless `columns` are ascending, disjoint ranges within (0, N)."""
    edges = [edge for each in columns for edge in each]
    full = all(start < stop for start, stop in columns)
    if not edges or not full or edges != sorted(edges) or edges[0] < 0 or edges[-1] > N:
        raise ValueError(f"columns must be ascending (start, stop) within (0, {N}): got {columns}")


def equal_columns(N: int, count: int) -> Ranges:
    """(0, N) in equal ranges; what a division leaves over belongs to none."""
    width = N // count
    return tuple((i * width, (i + 1) * width) for i in range(count))


def complement(columns: Ranges, N: int) -> Ranges:
    """What ascending, disjoint ranges leave of (0, N)."""
    edges = [0, *(edge for each in columns for edge in each), N]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in gaps if start < stop)


def widths(columns: Ranges) -> list[int]:
    """N_g of each range."""
    return [stop - start for start, stop in columns]


def unfold(lora_B: Tensor, columns: Ranges, N: int) -> Tensor:
    """[N, G R] of [sum of N_g, R]: the blocks on the diagonal, zero elsewhere."""
    R = lora_B.shape[1]
    full = lora_B.new_zeros(N, len(columns) * R)
    for g, ((start, stop), block) in enumerate(
        zip(columns, lora_B.split(widths(columns)), strict=True)
    ):
        full[start:stop, g * R : (g + 1) * R] = block
    return full


def fold(full: Tensor, columns: Ranges) -> Tensor:
    """[sum of N_g, R] of [N, G R]; ValueError if anything but the blocks is not zero."""
    R = full.shape[1] // len(columns)
    blocks = [full[start:stop, g * R : (g + 1) * R] for g, (start, stop) in enumerate(columns)]
    lora_B = torch.cat(blocks)
    if not torch.equal(unfold(lora_B, columns, full.shape[0]), full):
        raise ValueError(f"lora_B is not zero outside the blocks of columns {list(columns)}")
    return lora_B
