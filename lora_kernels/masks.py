"""The packed dropout mask: one bit an element, and its plain PyTorch form.

Byte q of a row holds columns 8q .. 8q + 7, column 8q + j in bit j; a set bit keeps the element. The
Triton kernels read and write the same bytes (`kernels/tiles.py`), so a mask drawn by one strategy
can be applied by any other. An element is kept with probability 1 - p rounded to 1/65536: sixteen
random bits an element are enough for any p in use, and random numbers are what a mask costs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

RESOLUTION = 1 << 16

# One bool is one byte of 0 or 1. Read eight of them as an int64 (little endian): multiplying by
# this moves byte j's low bit to bit 56 + j with no carries, so the top byte is the packed byte.
_GATHER = 0x0102040810204080


def threshold(dropout: float) -> int:
    """The count of the 65536 equally likely draws that drop an element."""
    return round(dropout * RESOLUTION)


def packed_width(columns: int) -> int:
    """Bytes in a packed row."""
    return (columns + 7) // 8


def draw_seed(device: torch.device) -> Tensor:
    """A seed (int64 [1]) in device memory, from torch's default generator.

    So `torch.manual_seed` reproduces a run, checkpointing recomputes the same masks, and the
    replays of a CUDA graph get fresh ones.
    """
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def draw(seed: Tensor, groups: int, rows: int, columns: int, dropout: float) -> Tensor:
    """The packed masks [groups, rows, packed_width(columns)] of uint8 that `seed` stands for."""
    shape = groups, rows, packed_width(columns) * 2
    # Two int64 draws hold eight 16-bit lanes; a lane is signed, so the threshold is shifted as
    # well.
    lanes = torch.empty(shape, dtype=torch.int64, device=seed.device)
    if seed.device.type == "cpu":
        lanes.random_(-(1 << 63), None, generator=torch.Generator().manual_seed(int(seed)))
    else:
        torch.arange(lanes.numel(), out=lanes.view(-1))
        _mix(lanes.add_(seed))
    keep = lanes.view(torch.int16) >= threshold(dropout) - RESOLUTION // 2
    packed = (keep.view(torch.int64) * _GATHER) >> 56  # sign-extending; the low byte is what counts
    return packed.to(torch.uint8)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place: a counter in, 64 random bits out.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014.
    """
    z.mul_(_signed(0x9E3779B97F4A7C15))
    z.bitwise_xor_((z >> 30) & ((1 << 34) - 1)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_((z >> 27) & ((1 << 37) - 1)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_((z >> 31) & ((1 << 33) - 1))


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def unpack(mask: Tensor, columns: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """The mask [..., rows, columns] of a packed one, as 0 and 1 of `dtype`.

    A look-up of eight elements a byte is several times faster than shifting bits, and multiplying
    by `dtype` than by a bool, which torch first converts.
    """
    spread = _table(dtype, mask.device).index_select(0, mask.flatten().int())
    return spread.view(*mask.shape[:-1], mask.shape[-1] * 8)[..., :columns]


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the bits of every byte."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (bits & 1).to(dtype)
