"""The layers that LoRA can be put on: `nn.Linear`, transformers' `Conv1D`, and `nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN: tuple[type, ...] = (nn.Parameter, Tensor)
_FAKE: tuple[type, ...] = ()
try:
    from torch._subclasses import FakeTensor
except ImportError:  # it is private
    pass
else:
    _FAKE = (FakeTensor,)  # stands for either while a graph is traced
    _PLAIN += _FAKE
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone, and no memory to ask for."""
    return isinstance(tensor, _FAKE)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D (weight [K, N]), told by its name."""
    cls = type(layer)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear layer; an embedding has K entries of N numbers."""
    if is_conv1d(layer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.shape[0], weight.shape[1]
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def plain_layer(cls: type[nn.Module], weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """An `nn.Linear` (weight [N, K]) or a Conv1D ([K, N]) of these very parameters."""
    layer: Any = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.weight = weight
    layer.register_parameter("bias", bias)
    if is_conv1d(layer):
        layer.nx, layer.nf = weight.shape
    else:
        layer.out_features, layer.in_features = weight.shape
    return layer  # type: ignore[no-any-return]


def why_not_plain(tensor: Tensor) -> str | None:
    """What a tensor is that our products cannot read (quantised, sparse); None if they can.

    A subclass of Tensor may say that it is float32 and hold int8.
    """
    cls, dtype = type(tensor), tensor.dtype
    if cls in _PLAIN and dtype in _DTYPES and tensor.layout is torch.strided:
        return None
    if cls not in _PLAIN:
        return f"a {cls.__module__}.{cls.__qualname__}"
    return str(tensor.layout if dtype in _DTYPES else dtype)
