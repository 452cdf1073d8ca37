"""What every strategy is given and gives: layers that share an input, and their results."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .columns import Ranges, widths

Tensors = tuple[Tensor, ...]


class Layers(NamedTuple):
    """The parameters of G layers that share x, a tuple each; bias is None if they have none.

    With `columns`, G ranges of the columns of y that are adapted, there is one weight, one bias,
    and one lora_A [G R, K] and lora_B [sum of widths, R] that hold the ranges' adapters stacked.
    """

    weight: Tensors
    bias: Tensors | None
    lora_A: Tensors
    lora_B: Tensors
    columns: Ranges | None = None

    def adapters(self) -> tuple[Tensors, Tensors]:
        """lora_A [R, K] and lora_B [N_g, R] of each of the G."""
        if self.columns is None:
            return self.lora_A, self.lora_B
        (lora_A,), (lora_B,) = self.lora_A, self.lora_B
        return lora_A.split(lora_B.shape[1]), lora_B.split(widths(self.columns))

    def adapted(self, y: Tensors) -> Tensors:
        """The [M, N_g] that each adapter adds to, of the outputs or of their gradients."""
        if self.columns is None:
            return y
        return tuple(y[0][:, start:stop] for start, stop in self.columns)


class Wanted(NamedTuple):
    """Which gradients autograd asks for."""

    dx: bool
    dlora_A: bool
    dlora_B: bool


class Forward(NamedTuple):
    """What forward gives: the outputs, and what backward needs besides the inputs."""

    y: Tensors
    h: Tensor
    mask: Tensor | None


class Backward(NamedTuple):
    """What backward gives; None where it was not wanted."""

    dx: Tensor | None
    dlora_A: Tensors | None
    dlora_B: Tensors | None
