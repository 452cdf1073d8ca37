"""A launch as data: which kernel, on which grid, with which outputs and numbers.

Every kernel takes its arguments in one order, and a launch is put together in that order:

    pointers of the tensors given | pointers of the outs | scalars | constexprs, by name

A launcher hands `launch` the tensors, and a plan function that makes a `Plan` of their shapes: all
that the launch needs but the pointers. What has no pointer in it can be kept for the next launch of
the same shapes (`launch`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Given = Tensor | tuple[Tensor, ...] | None


class Out(NamedTuple):
    """A contiguous tensor that a launch allocates and its kernel writes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def stride(self) -> tuple[int, ...]:
        """The strides in elements, as `Tensor.stride()` gives them."""
        return tuple(math.prod(self.shape[i:]) for i in range(1, len(self.shape) + 1))


Outs = tuple[Out | tuple[Out, ...] | None, ...]


class Plan(NamedTuple):
    """One launch but for its pointers, and the launch that follows it, if one does."""

    kernel: Any
    grid: tuple[int, int, int]
    outs: Outs
    scalars: tuple[Any, ...]
    constants: dict[str, Any]  # constexprs by name, num_warps, num_stages
    then: Plan | None = None  # its only tensor argument is the tuple of the outs of this launch


def planned(
    kernel: Any, grid: tuple[int, int, int], outs: Outs, *scalars: Any, then: Plan | None = None,
    **constants: Any,
) -> Plan:  # fmt: skip
    """A plan, written like the call of the kernel that it stands for."""
    return Plan(kernel, grid, outs, scalars, constants, then)
