"""What a strategy is chosen for: the sizes, the dtype and the card of one call.

What this machine can run decides as well: whether Triton is installed, or interpreting, and the
architecture of a device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ..hardware.tiles import bucket, rank_block

# The elements of x [M, K] up to which `auto` on a CPU leaves a layer's gradients to torch
# (`autograd/few.py`): the host's calls are most of the time there.
FEW_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Problem:
    """One call, as far as a strategy is chosen for it: y [M, N] from x [M, K] at rank R.

    `segments` counts the layers that share x, and N is the widest of them. With `columns` it counts
    the ranges of the columns of one layer instead, and N is the width of that layer. `arch` is
    "cpu", "sm_86", "gfx942", ... `nf4` says that the frozen weight is bitsandbytes' NF4.
    """

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    arch: str = "cpu"
    dropout: bool = False
    tf32: bool = False
    segments: int = 1
    gpu: str = ""  # the card's name, for its tuned table
    columns: bool = False
    processors: int = 0  # the card's multiprocessors; 0: those of the card that stands for `arch`
    nf4: bool = False

    @classmethod
    def on(
        cls, device: torch.device, M: int, N: int, K: int, R: int, dtype: torch.dtype, *,
        dropout: bool, segments: int = 1, columns: bool = False, nf4: bool = False,
    ) -> Problem:  # fmt: skip
        """The problem on a device of this machine, with torch's own setting for TF32."""
        tf32 = dtype is torch.float32 and device.type == "cuda" and tf32_allowed()
        arch, gpu, count = architecture(device), _gpu(device), processors(device)
        return cls(M, N, K, R, dtype, arch, dropout, tf32, segments, gpu, columns, count, nf4)

    @property
    def aligned(self) -> bool:
        """Whether rows of 16 elements follow one another, so that loads can be wide."""
        return self.N % 16 == 0 and self.K % 16 == 0

    @property
    def key(self) -> str:
        """The row of a tuned table: M by its bucket, R by its padding."""
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        dropout = "-dropout" if self.dropout else ""
        rank = rank_block(self.R)
        count = f"{self.segments}{'-of' if self.columns else 'x'}"
        weight = "-nf4" if self.nf4 else ""
        return f"{count}-M{bucket(self.M)}-N{self.N}-K{self.K}-R{rank}-{dtype}{dropout}{weight}"

    def __str__(self) -> str:
        rest = f"{', dropout' if self.dropout else ''}{', NF4 weight' if self.nf4 else ''}"
        dtype = str(self.dtype).removeprefix("torch.")
        kind = "column ranges" if self.columns else "layers"
        several = f"{self.segments} {kind}, " if self.segments > 1 or self.columns else ""
        return f"{several}M={self.M} N={self.N} K={self.K} R={self.R} {dtype} {self.arch}{rest}"


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors (the environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


@cache
def architecture(device: torch.device) -> str:
    """ "cpu", "sm_86" or "gfx942" of a device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 0 for another device."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tf32_allowed() -> bool:
    """Whether torch may round the operands of float32 products to TF32."""
    # torch.get_float32_matmul_precision raises once anyone (the Trainer's tf32) sets this one.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@cache
def triton_kernels() -> Any:
    """The Triton launchers, imported at the first launch: importing the package needs no Triton."""
    from .. import kernels

    return kernels


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
