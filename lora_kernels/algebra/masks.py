"""The packed dropout mask: one bit an element, and its plain PyTorch form.

Byte q of a row holds columns 8q .. 8q + 7, column 8q + j in bit j; a set bit keeps the element. The
Triton kernels read and write the same bytes (`kernels/tiles.py`), so a mask drawn by one strategy
can be applied by any other.

An element is kept with probability 1 - p, rounded to a multiple of 1/65536. Sixteen random bits an
element are enough for any p in use, and drawing them is most of the cost of a mask.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

RESOLUTION = 1 << 16


def threshold(dropout: float) -> int:
    """How many of the 65536 values of a random 16-bit number drop an element: never all."""
    return min(round(dropout * RESOLUTION), RESOLUTION - 1)


def packed_width(columns: int) -> int:
    """The bytes of a packed row."""
    return (columns + 7) // 8


def draw_seed(
    device: torch.device, generator: torch.Generator | None = None, count: int = 1
) -> Tensor:
    """Seeds (int64 [count]) in device memory, from torch's generator unless another is given.

    `torch.manual_seed` therefore reproduces a run, checkpointing recomputes the same masks, and
    every replay of a CUDA graph gets fresh ones.
    """
    least, most = -(1 << 63), (1 << 63) - 1
    return torch.randint(
        least, most, (count,), dtype=torch.int64, device=device, generator=generator
    )


def draw(seed: Tensor, groups: int, rows: int, columns: int, dropout: float) -> Tensor:
    """The packed masks [groups, rows, packed_width(columns)] of uint8 that `seed` stands for."""
    shape = groups, rows, packed_width(columns)
    count, kept = math.prod(shape), RESOLUTION - threshold(dropout)
    # An element is kept if its random 16-bit number is below `kept`. The numbers of 64 elements are
    # compared at once, from the lowest bit up; word i holds bit i of all 64, inverted:
    #
    #     below = word | below    where bit i of `kept` is 1: a number with a 0 there is below
    #     below = word & below    where bit i of `kept` is 0: a number with a 1 there is not
    #
    # For two-bit numbers and kept = 0b10 that is word_1 | (word_0 & 0): 0b00 and 0b01 are below.
    # Under the lowest 1 of `kept`, `below` stays zero: the loop starts at that 1. Where `kept` is
    # 65536 it has no turn, and the value that `below` starts with keeps all.
    bits = kept | RESOLUTION
    first, words = (bits & -bits).bit_length() - 1, (count + 7) // 8
    below = torch.full((words,), -(kept >> 16), dtype=torch.int64, device=seed.device)
    for i, word in enumerate(_random(seed, 16 - first, words), first):
        if kept >> i & 1:
            below.bitwise_or_(word)
        else:
            below.bitwise_and_(word)
    return below.view(torch.uint8)[:count].view(shape)


def _random(seed: Tensor, *shape: int) -> Tensor:
    """int64 of random bits, from a generator of the seed's device that starts at the seed.

    A GPU whose masks Triton cannot draw waits here for the host to read the seed. The meta device
    has nothing to read: there the words have a shape alone.
    """
    words = torch.empty(shape, dtype=torch.int64, device=seed.device)
    if seed.is_meta:
        return words
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    return words.random_(-(1 << 63), None, generator=generator)


def unpack(mask: Tensor, columns: int) -> Tensor:
    """The mask [..., rows, columns] of a packed one, as bool."""
    return _spread(mask, torch.bool)[..., :columns]


def unpack_lanes(mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask as integers as wide as `dtype`: all ones where it keeps, 0 where it drops.

    `t.view(lanes.dtype) & lanes` then drops elements of t. On a CPU in half precision that takes a
    quarter of the time of t * mask, which converts t to float32 and back.
    """
    wide = _LANES[dtype.itemsize]
    return _spread(mask, torch.int16)[..., :columns].to(wide)  # -1 stays -1


_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The dtype of one number as large as the eight elements of a byte: eight bools are an 8-byte
# element, eight int16 a 16-byte element. To look up a number in a table is several times faster
# than to look up a row of eight, or to shift bits.
_CONTAINER = {torch.bool: torch.int64, torch.int16: torch.complex128}


def _spread(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Every bit of the packed mask as 0 or -1 (True) of `dtype`."""
    spread = _table(dtype, mask.device).index_select(0, mask.flatten().int())
    return spread.view(dtype).view(*mask.shape[:-1], mask.shape[-1] * 8)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: the eight elements of every byte, as one number."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (bits & 1).neg().to(dtype).view(_CONTAINER[dtype]).view(256)
