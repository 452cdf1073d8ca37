"""Linear layers whose frozen weight another library has quantised, and LoRA on top of them.

That library's layer computes x weight^T + bias, and the gradient of x through it, by its own
kernels. The low-rank part with its dropout is added to that y in place. No dequantised weight is
kept.

On a GPU `strategy="split"` multiplies by bitsandbytes' NF4 in our own kernels instead
(`autograd.nf4`). It has to be asked for: the one GPU that measured it was slower with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.nf4 import BLOCK, NF4
from ..algebra.operands import Parts, Settings
from ..autograd.addition import add_lora_to
from ..autograd.autocast import autocast_dtype
from ..autograd.nf4 import nf4_linear
from ..strategies.choose import decide_nf4
from .base import features_of
from .linear import FusedLoRALinear
from .start import START

_PACKED_FOR_CPU = "packing_format_for_cpu"  # of bitsandbytes' QuantState


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


def why_not_nf4(layer: Any, dtype: torch.dtype | None) -> str | None:
    """Why a quantised layer is not NF4 that `split` can read, for an x in `dtype` (None: any)."""
    weight, computes = layer.weight, getattr(layer, "compute_dtype", None)
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "quant_type", None) != "nf4":
        return "it reads no quantised weight but bitsandbytes' NF4"
    if state.blocksize != BLOCK:
        return f"an absmax stands for {state.blocksize} weights, not for {BLOCK}"
    N, K = layer.out_features, layer.in_features
    whole = 2 * weight.numel() * weight.element_size() == N * K and tuple(state.shape) == (N, K)
    if not whole or getattr(state, _PACKED_FOR_CPU, False):
        return "the weight does not lie in memory as bitsandbytes packs it for a GPU, or not whole"
    if dtype is not None and computes not in (None, dtype):
        return f"x is {dtype}, and the layer computes in {computes}"
    hooks = layer._forward_hooks, layer._forward_pre_hooks
    if any((*hooks, layer._backward_hooks, layer._backward_pre_hooks)) or "forward" in vars(layer):
        return "the quantised layer has hooks or a patched forward, which would not run"
    return None


def read_nf4(state: Any, packed: Tensor) -> NF4:
    """The NF4 of a packed weight, from bitsandbytes' QuantState; its absmax is made float32."""
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return NF4(packed, absmax.float().view(packed.shape[0], -1), state.code)


def quantised_layer(
    base: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, settings: Settings
) -> Tensor:
    """y [..., N] of a quantised layer with LoRA on it, in the dtype of x as the layer gives it.

    Raises RuntimeError where x wants a gradient and bitsandbytes has packed the weight for
    inference on a CPU: its product then has no gradient, or a wrong one.
    """
    packed_for_cpu = getattr(getattr(base.weight, "quant_state", None), _PACKED_FOR_CPU, False)
    if packed_for_cpu and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "bitsandbytes packed this layer's weight for inference on a CPU, at its first call "
            "outside of training, and has no gradient of x since: load the model again to train it"
        )
    if settings.strategy == "split" and not torch.compiler.is_compiling():
        dtype = x.dtype
        if getattr(base, "compute_dtype", None) is not None:  # else it computes in that of x
            dtype = autocast_dtype(x.device) or dtype
        if why_not_nf4(base, dtype) is None:
            K, N = features_of(base)
            found = decide_nf4(x, N, lora_B.shape[1], dtype, settings)
            if found[0].name == "split":
                packed = base.weight.data.view(torch.uint8).view(N, K // 2)
                read = partial(read_nf4, base.weight.quant_state)
                y = nf4_linear(
                    x.to(dtype), packed, read, base.bias, lora_A, lora_B, settings, found
                )
                return y.to(x.dtype)
    return add_lora_to(base(x), x, lora_A, lora_B, settings)


class QuantisedLoRALinear(FusedLoRALinear):
    """LoRA on a quantised layer, which is its `base_layer`: y = base_layer(x) + the low-rank part.

    Everything else is as in `FusedLoRALinear`, but it cannot be merged: the sum would have to be
    quantised anew, and would lose most of the update.
    """

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
        if self.disabled:
            y: Tensor = self.base_layer(x)
            return y
        settings = Settings(self.scale, self.dropout if self.training else 0.0, self.strategy)
        return quantised_layer(self.base_layer, x, self.lora_A, self.lora_B, settings)

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
