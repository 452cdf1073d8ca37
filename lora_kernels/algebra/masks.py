"""The packed dropout mask: one bit an element, and its plain PyTorch form.

Byte q of a row holds columns 8q .. 8q + 7, column 8q + j in bit j; a set bit keeps the element. The
Triton kernels read and write the same bytes (`kernels/tiles.py`), so a mask drawn by one strategy
can be applied by any other. An element is kept with probability 1 - p rounded to 1/65536: sixteen
random bits an element are enough for any p in use, and random numbers are what a mask costs.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

RESOLUTION = 1 << 16


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
    shape = groups, rows, packed_width(columns)
    count, kept = math.prod(shape), RESOLUTION - threshold(dropout)
    # Draw i has bit i of the random numbers of 64 elements. A number is below `kept` by its bits i,
    # i - 1, ... 0 if bit i of `kept` is set and it has a 0 there, or if it is below by the rest and
    # not above by this bit: sixteen steps on whole words, whose result is the packed mask. (Bits
    # below the lowest one of `kept` decide nothing, and a 0 is as likely as a 1.)
    ended = kept | RESOLUTION
    first, words = (ended & -ended).bit_length() - 1, (count + 7) // 8
    below = torch.full((words,), -(kept >> 16), dtype=torch.int64, device=seed.device)
    for i, draw_i in enumerate(_random(seed, 16 - first, words), first):
        if kept >> i & 1:
            below.bitwise_or_(draw_i)
        else:
            below.bitwise_and_(draw_i)
    return below.view(torch.uint8)[:count].view(shape)


def _random(seed: Tensor, *shape: int) -> Tensor:
    """int64 of random bits: of a generator on a CPU, of a counter elsewhere."""
    words = torch.empty(shape, dtype=torch.int64, device=seed.device)
    if seed.device.type == "cpu":
        return words.random_(-(1 << 63), None, generator=torch.Generator().manual_seed(int(seed)))
    return _hashed(words, seed)


def _hashed(words: Tensor, seed: Tensor) -> Tensor:
    """Every word the hash of its place, counted from the seed."""
    torch.arange(words.numel(), out=words.view(-1))
    return _mix(words.add_(seed))


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


def unpack(mask: Tensor, columns: int) -> Tensor:
    """The mask [..., rows, columns] of a packed one, as bool."""
    return _spread(mask, torch.bool)[..., :columns]


def unpack_lanes(mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask as integers as wide as `dtype`, all ones where it keeps and 0 where it drops.

    So `t.view(lanes.dtype) & lanes` drops elements of t: in half precision a quarter of the time of
    a product, for which a CPU converts to float32 and back.
    """
    wide = _LANES[dtype.itemsize]
    return _spread(mask, torch.int16)[..., :columns].to(wide)  # -1 stays -1


_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# One number that holds the eight elements of a byte: a look-up of numbers is several times faster
# than one of rows, or than shifting bits.
_EIGHT = {torch.bool: torch.int64, torch.int16: torch.complex128}


def _spread(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Every bit of the packed mask as 0 or -1 (True) of `dtype`."""
    spread = _table(dtype, mask.device).index_select(0, mask.flatten().int())
    return spread.view(dtype).view(*mask.shape[:-1], mask.shape[-1] * 8)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: the eight elements of every byte, as one number."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (bits & 1).neg().to(dtype).view(_EIGHT[dtype]).view(256)
