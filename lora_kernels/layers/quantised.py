"""Linear layers whose frozen weight another library has quantised, and LoRA on top of them.

That library's layer computes x weight^T + bias, and the gradient of x through it, by its own
kernels. The low-rank part with its dropout is added to that y in place. No dequantised weight is
kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.operands import Parts, Settings
from ..autograd.addition import add_lora_to
from ..strategies.choose import Choice, choose
from ..strategies.problem import Problem
from .base import features_of
from .embedding import FusedLoRAEmbedding
from .group import problem_of
from .linear import FusedLoRALinear
from .start import START


def quantiser(layer: nn.Module) -> str | None:
    """Whose quantised linear layer this is, and of what kind; None for any other layer."""
    cls, weight = type(layer), type(getattr(layer, "weight", None))
    if weight is nn.Parameter:
        return None
    if cls.__module__.startswith("bitsandbytes.") and isinstance(layer, nn.Linear):
        return f"bitsandbytes' {cls.__name__}"
    if cls is nn.Linear and weight.__module__.startswith("torchao."):
        return f"torchao's {weight.__name__}"
    return None


def chosen(layer: Any, tokens: int, dtype: torch.dtype | None = None) -> tuple[Problem, Choice]:
    """What a layer that runs fused asks of `choose` for so many tokens, and gets."""
    base = getattr(layer, "base_layer", None)  # of PEFT's layers, and of quantised ones
    if isinstance(layer, FusedLoRAEmbedding):
        base, dtype = layer, dtype or layer.weight.dtype
        reason = "an embedding: two lookups, and one product added to the rows; no dropout"
    elif base is None or (whose := quantiser(base)) is None:
        problem = problem_of(layer, tokens, dtype)
        return problem, choose(problem, layer.strategy)
    else:
        dtype = dtype or torch.get_default_dtype()
        reason = f"its frozen product is {whose}; LoRA is added to it"
    K, N = features_of(base)
    problem = Problem.on(base.weight.device, tokens, N, K, layer.rank, dtype, dropout=False)
    return problem, Choice("library", None, reason)


class QuantisedLoRALinear(FusedLoRALinear):
    """LoRA on a quantised layer, which is its `base_layer`: y = base_layer(x) + the low-rank part.

    Everything else is as in `FusedLoRALinear`, but it cannot be merged: the sum would have to be
    quantised anew, and would lose most of the update.
    """

    __module__ = "lora_kernels"  # where pickles find it, wherever the file lies
    base_layer: Any
    weight = property(lambda self: self.base_layer.weight)  # type: ignore[assignment]
    bias = property(lambda self: self.base_layer.bias)  # type: ignore[assignment]

    @classmethod
    def from_linear(cls, layer: nn.Module, **settings: Any) -> QuantisedLoRALinear:
        """Put LoRA on a quantised layer; the settings are those of `FusedLoRALinear.from_linear`.

        Raises ValueError for those that need the weight itself: other starts than "kaiming", dora,
        lora_bias, columns.
        """
        asked = dict(settings)
        for name, plain in (("init", START), ("dora", False), ("lora_bias", False)):
            if asked.pop(name, plain) != plain:
                raise ValueError(f"{name} needs a plain weight, and this one is {quantiser(layer)}")
        if asked.pop("columns", None) is not None:
            raise ValueError(f"LoRA on columns needs a plain weight: this is {quantiser(layer)}")
        (K, N), weight = features_of(layer), layer.weight
        self = cls(K, N, **{**asked, "bias": False, "device": "meta"})
        del self._parameters["weight"], self._parameters["bias"]
        self.base_layer, self.base_class = layer, type(layer)
        layer.requires_grad_(False)
        for name in ("lora_A", "lora_B"):
            size = getattr(self, name).shape
            value = torch.empty(size, dtype=torch.float32, device=weight.device)  # type: ignore[arg-type]
            setattr(self, name, nn.Parameter(value))
        self.reset_lora_parameters()
        return self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        y: Tensor = self.base_layer(x)
        if self.disabled:
            return y
        settings = Settings(self.scale, self.dropout if self.training else 0.0, self.strategy)
        return add_lora_to(y, x, self.lora_A, self.lora_B, settings)

    def own(self) -> Parts | None:  # type: ignore[override]
        """None: it runs beside its siblings, each product its library's."""
        return None

    parts = own

    def merge(self) -> None:
        """Raises ValueError: a quantised weight does not take an update."""
        raise ValueError(
            f"its weight is {quantiser(self.base_layer)}: the sum would be quantised anew, and "
            "most of the update lost; load the adapter into the model before it is quantised"
        )

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
