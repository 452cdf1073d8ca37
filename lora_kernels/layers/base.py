"""The layers that LoRA can be put on, and what every layer with LoRA tells of itself.

LoRA goes on `nn.Linear` and on transformers' `Conv1D`, whose weight is [K, N].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..algebra.operands import Parts
from ..strategies.problem import Problem

if TYPE_CHECKING:
    from .group import Group


class LoRALayer(Protocol):
    """A layer with LoRA: a FusedLoRALinear, or what `fuse_peft` made of a layer of PEFT's."""

    group: Group | None  # the siblings that read the same x

    @property
    def training(self) -> bool:
        """Whether dropout is on."""

    def own(self) -> Parts | None:
        """Its tensors as held, its settings as in training; None if it runs unfused."""

    def parts(self, x: Tensor) -> Parts | None:
        """What a call on x needs, cast as autocast asks; None if it runs unfused (merged, say)."""


def layout_of(layer: LoRALayer) -> tuple[Any, ...] | None:
    """What layers must have in common to run as a group; None if this one runs alone."""
    own = layer.own()
    if own is None or own.settings.columns is not None:
        return None
    R, K = own.weights.lora_A.shape
    layouts = [None if t is None else (t.dtype, t.device, t.stride()) for t in own.weights]
    return R, K, own.settings, *layouts


def problem_of(layer: LoRALayer, M: int, dtype: torch.dtype | None = None) -> Problem:
    """What a call on M tokens asks of `choose`, for the layer's whole group if it is in one.

    `dtype` is that of the activations (default: the weight's). Raises ValueError if the layer runs
    unfused.
    """
    members = [layer] if layer.group is None else layer.group.members
    found = [own for member in members if (own := member.own()) is not None]
    own = layer.own()
    if own is None:
        raise ValueError("a layer that runs unfused asks for no strategy")
    (weight, _, _, lora_B), settings = own
    return Problem.on(
        weight.device, M, max(each.weights.weight.shape[0] for each in found), weight.shape[1],
        lora_B.shape[1], dtype or weight.dtype,
        dropout=layer.training and settings.dropout > 0,
        segments=len(settings.columns or members), columns=settings.columns is not None,
    )  # fmt: skip


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D (weight [K, N]), told by its name."""
    cls = type(layer)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear layer."""
    if is_conv1d(layer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.shape[0], weight.shape[1]
    return layer.in_features, layer.out_features  # type: ignore[return-value]
