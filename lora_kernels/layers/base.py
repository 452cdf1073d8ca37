"""The layers that LoRA can be put on: `nn.Linear`, and transformers' `Conv1D`."""

from __future__ import annotations

from torch import Tensor, nn


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
