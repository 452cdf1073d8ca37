"""What travels through a call: the tensors of a layer as one value, its settings as another.

A call is of G >= 1 segments that read the same x [M, K], each with a LoRA of rank R. The segments
are G layers (query, key and value), or, with `columns`, G ranges of the columns of one layer's y.

A new tensor of a layer (a magnitude, the scales of a quantised weight) is one more field of
`Weights` and of `Operands`. All between a module and a strategy passes these values on whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import Ranges, widths
from .packs import Pack

Tensors = tuple[Tensor, ...]
Segments = tuple[tuple[Tensor | None, ...], ...]


class Weights(NamedTuple):
    """The tensors of one layer: weight [N, K], bias [N], lora_A [R, K], lora_B [N, R].

    With `columns`, the adapters of the G ranges are stacked, one below the other: lora_A [G R, K]
    and lora_B [sum of N_g, R].
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


class PackWeights(NamedTuple):
    """The tensors of one layer of a pack: lora_A and lora_B of each adapter, None without LoRA."""

    weight: Tensor
    bias: Tensor | None
    lora_A: tuple[Tensor | None, ...]
    lora_B: tuple[Tensor | None, ...]


class Settings(NamedTuple):
    """What a layer does with its tensors. Layers that run together have equal settings.

    `scale` multiplies the low-rank product. `dropout` is the probability in this call: 0 outside
    training. `strategy` is a name of `STRATEGIES`, or "auto". `columns` are the (start, stop) of
    y's columns that have LoRA; None means all of them, as one.

    With a `pack` the rows of x belong to several adapters, whose scales and dropouts count instead.
    """

    scale: float = 1.0
    dropout: float = 0.0
    strategy: str = "auto"
    columns: Ranges | None = None
    pack: Pack | None = None


class Parts(NamedTuple):
    """One layer, as a call on some x needs it."""

    weights: Any  # Weights, or the PackWeights of a pack
    settings: Settings


def rank_dtype(x: torch.dtype, adapter: torch.dtype) -> torch.dtype:
    """The dtype of h or dh [G, M, R], of an x and a lora_A or lora_B in these dtypes.

    It is that of x, but float32 where x is float16 and the adapter is not. Early in training dh is
    far below the smallest float16, and sums over many tokens are above the largest. bfloat16 has
    the range of float32, so there is no range to lose.
    """
    if x is torch.float16 and adapter is not torch.float16:
        return torch.float32
    return x


class Operands(NamedTuple):
    """The tensors of all layers of a call: the fields of `Weights`, each a tuple over the layers.

    `bias` holds None for every layer where they have none; otherwise no layer is without. With
    `columns` there is one layer.

    In a call of a pack of C adapters `lora_A` and `lora_B` have C entries for each layer, one layer
    after another; None stands for an adapter that has no LoRA there.
    """

    weight: Tensors
    bias: tuple[Tensor | None, ...]
    lora_A: Tensors
    lora_B: Tensors

    @classmethod
    def of(cls, layers: Iterable[Weights]) -> Operands:
        """The operands of these layers."""
        return cls._make(zip(*layers))  # noqa: B905 (every layer has the same fields)

    @classmethod
    def unflatten(cls, flat: Sequence[Any], count: int, adapters: int = 1) -> Operands:
        """What `flatten` laid end to end, for `count` layers; also of flags, or of gradients."""
        if adapters == 1:
            return cls._make(zip(*[iter(flat)] * count))  # noqa: B905 (`count` at a time)
        first, last = 2 * count, (2 + adapters) * count
        fields = flat[:count], flat[count:first], flat[first:last], flat[last:]
        return cls._make(map(tuple, fields))

    def flatten(self) -> tuple[Any, ...]:
        """All tensors end to end, field by field, as autograd wants them."""
        return sum(self, ())

    def biases(self) -> Tensors | None:
        """The bias of every layer; None if they have none."""
        return None if self.bias[0] is None else self.bias  # type: ignore[return-value]

    def adapters(self, columns: Ranges | None) -> tuple[Tensors, Tensors]:
        """lora_A [R, K] of every segment, and lora_B [N_g, R]."""
        if columns is None:
            return self.lora_A, self.lora_B
        (lora_A,), (lora_B,) = self.lora_A, self.lora_B
        return lora_A.split(lora_B.shape[1]), lora_B.split(widths(columns))

    def packed(self, columns: Ranges | None, adapters: int) -> tuple[Segments, Segments]:
        """Of a pack: for every segment lora_A of each adapter, and lora_B."""
        C = adapters
        if columns is None:
            layers = range(0, len(self.lora_A), C)
            return tuple(self.lora_A[g : g + C] for g in layers), tuple(
                self.lora_B[g : g + C] for g in layers
            )
        nothing = ((None,) * len(columns),) * 2
        parts = [
            nothing if A is None else (A.split(B.shape[1]), B.split(widths(columns)))
            for A, B in zip(self.lora_A, self.lora_B, strict=True)
        ]
        of_A, of_B = zip(*parts, strict=True)
        return tuple(zip(*of_A, strict=True)), tuple(zip(*of_B, strict=True))

    def of_adapter(self, c: int, adapters: int) -> tuple[Tensors, Tensors]:
        """Of a pack: lora_A and lora_B of one adapter, for each layer."""
        return self.lora_A[c::adapters], self.lora_B[c::adapters]


def segments_of(y: Tensors, columns: Ranges | None) -> Tensors:
    """The [M, N_g] that each segment adds its low-rank product to; also of dy."""
    if columns is None:
        return y
    return tuple(y[0][:, start:stop] for start, stop in columns)


class Wanted(NamedTuple):
    """Which gradients autograd asks for."""

    dx: bool
    dlora_A: bool
    dlora_B: bool


class Forward(NamedTuple):
    """What forward gives: y [M, N] of each layer, and what backward needs besides the inputs.

    h [G, M, R] are the projected inputs, mask [G, M, ceil(K / 8)] the packed dropout masks (None
    without dropout).
    """

    y: Tensors
    h: Tensor
    mask: Tensor | None


class Backward(NamedTuple):
    """What backward gives; None where it was not wanted.

    dx [M, K] sums over the layers; dlora_A and dlora_B have a tensor for each layer's parameter.
    """

    dx: Tensor | None
    dlora_A: Tensors | None
    dlora_B: Tensors | None
