"""What a LoRA layer of PEFT's consists of in its present state, or why it cannot run fused."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..algebra.operands import Weights
from ..autograd.functional import is_dtensor
from ..layers.base import is_conv1d, why_not_plain
from ..layers.quantised import quantiser
from ..layers.sharded import as_asked, is_part

# PEFT's classes of linear layers that can run fused, and the modules that define them.
KINDS = {
    "Linear": "layer", "Linear4bit": "bnb", "Linear8bitLt": "bnb", "TorchaoLoraLinear": "torchao",
}  # fmt: skip


# Hooks that torch calls for every module (register_module_forward_hook and its like).
_GLOBAL_HOOKS = (
    module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks,
    module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks,
)  # fmt: skip


_NO_DROPOUT = nn.Identity()
# What switches LoRA off: nothing falls back then, since nothing of ours would run.
OFF = ("adapters are disabled", "merged: only the base layer runs")


class Plain(NamedTuple):
    """What a PEFT layer that runs fused consists of; `magnitude` is DoRA's.

    The base layer of a `quantised` one is called as it is, and LoRA added to its y. A `stacked` one
    has the adapters of several, made for this call, and so runs without its siblings.
    """

    weights: Weights
    dropout: nn.Module
    scale: float
    magnitude: Tensor | None = None
    quantised: bool = False
    stacked: bool = False


def fallback_reason(layer: Any) -> str | None:
    """Why a PEFT layer in its present state runs PEFT's own forward; None if it runs fused."""
    plain = plain_lora(layer)
    return plain if isinstance(plain, str) else None


def state_reason(layer: Any) -> str | None:
    """Why no adapter of a layer can run fused now, in words; None if one could."""
    if any(_GLOBAL_HOOKS):
        return "there are global module hooks, which expect calls of the modules inside it"
    if torch.jit.is_tracing():
        return "torch.jit.trace records PEFT's own forward"
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "merged: only the base layer runs"
    return None


def plain_lora(layer: Any) -> Plain | str:
    """What a layer that can run fused now consists of; else why it cannot, in words."""
    if (reason := state_reason(layer)) is not None:
        return reason
    known = active(layer)
    if not known:
        return "no adapter is active"
    plain = [plain_adapter(layer, name) for name in known]
    return plain[0] if len(plain) == 1 else _stacked(known, plain)


def active(layer: Any) -> list[str]:
    """The names of a layer's active adapters."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _stacked(names: list[str], plain: list[Plain | str]) -> Plain | str:
    """Several active adapters as one, whose rank is the sum of theirs.

    lora_A holds theirs one below the other, lora_B side by side, times their scales.
    """
    found = [each for each in plain if not isinstance(each, str)]
    lora = [
        each
        for each in found
        if each.magnitude is None and not each.quantised and not getattr(each.dropout, "p", 0.0)
    ]
    biases = {id(each.weights.bias) for each in lora}  # lora_bias makes one of its own
    if len(lora) < len(names) or len(biases) > 1:
        return (
            f"{len(names)} adapters are active, not all plain LoRA without dropout: "
            f"{', '.join(names)}"
        )
    if any(is_part(each.weights) for each in lora):
        return lora[0]._replace(stacked=True)  # between the calls that FSDP makes it whole for
    weights = lora[0].weights._replace(
        lora_A=torch.cat([each.weights.lora_A for each in lora]),
        lora_B=torch.cat([each.scale * each.weights.lora_B for each in lora], dim=1),
    )
    return Plain(weights, _NO_DROPOUT, 1.0, stacked=True)


def plain_adapter(layer: Any, name: str) -> Plain | str:
    """The same for one of its adapters, as if it were the active one."""
    adapter = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    base, scale, (lora_A, lora_B, dropout) = layer.base_layer, layer.scaling[name], adapter
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or lora_A.bias is not None:
        return f"adapter {name!r} is made of {type(lora_A).__name__}, {type(lora_B).__name__}"
    if type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "p", 0.0) >= 1:
        return f"adapter {name!r} has the dropout {dropout}"
    if not isinstance(scale, (int, float)):
        return f"the scaling of adapter {name!r} is a {type(scale).__name__}, no number"
    if (whose := quantiser(base)) is not None:
        if lora_B.bias is not None or name in layer.lora_variant or any(map(_is_hooked, adapter)):
            return f"its weight is {whose}, and the adapter no plain LoRA, or hooked"
        weights = Weights(base.weight, None, lora_A.weight, lora_B.weight)
        return Plain(weights, dropout, scale, quantised=True)
    if not (type(base) is nn.Linear or is_conv1d(base)):
        return f"its base layer is {type(base).__module__}.{type(base).__name__}"
    if _is_hooked(base) or any(map(_is_hooked, adapter)):
        split = is_dtensor(base.weight)  # by tensor parallelism, or as an FSDP unit
        return f"a module inside it has hooks or a patched forward{', which split it' * split}"
    bias = as_asked(base.bias)
    if lora_B.bias is not None:  # lora_bias
        bias = scale * lora_B.bias if bias is None else bias + scale * lora_B.bias
    weight = as_asked(base.weight)
    if type(base) is not nn.Linear:  # a Conv1D holds [K, N]; a part of it, under FSDP1, is flat
        weight = weight.t()
    weights = Weights(weight, bias, lora_A.weight, lora_B.weight)
    if refusal := _why_not(weights):
        return refusal
    if name not in layer.lora_variant:
        return Plain(weights, dropout, scale)
    magnitude = _magnitude(layer, name, weights.weight.device)
    return magnitude if isinstance(magnitude, str) else Plain(weights, dropout, scale, magnitude)


def _magnitude(layer: Any, name: str, device: torch.device) -> Tensor | str:
    """The magnitude of DoRA; why there is none to use, in words."""
    variant = layer.lora_variant[name]
    if not _is_of_peft(variant, "DoraLinearVariant"):
        words = type(variant).__name__.removesuffix("LinearVariant")
        return f"adapter {name!r} is a LoRA variant: {words}"
    holder = layer.lora_magnitude_vector[name]
    if not _is_of_peft(holder, "DoraLinearLayer") or _is_hooked(holder):
        return f"adapter {name!r} has a magnitude of another class, or with hooks"
    if holder.weight.device != device:
        return f"the magnitude of adapter {name!r} is on {holder.weight.device}"
    weight: Tensor = holder.weight
    return weight


def _is_of_peft(value: Any, name: str) -> bool:
    cls = type(value)
    return cls.__name__ == name and cls.__module__.startswith("peft.")


def _why_not(weights: Weights) -> str | None:
    """Why these tensors cannot run fused, or None."""
    weight, _, lora_A, lora_B = weights
    for tensor in (weight, lora_A, lora_B):  # FSDP2 makes a DTensor whole before a call
        if not is_dtensor(tensor) and (refusal := why_not_plain(tensor)):
            return f"its weight is {refusal}"
    return "the base weight trains too" if weight.requires_grad else None


def never_fused(layer: Any) -> str | None:
    """Why a LoRA layer can never run fused."""
    if _is_of_peft(layer, "ParamWrapper"):
        return "its LoRA is on a parameter (target_parameters), not on a linear layer"
    kind = class_of(layer)
    if kind.__name__ not in KINDS or not kind.__module__.startswith("peft."):
        return f"{type(layer).__module__}.{type(layer).__name__} is no plain LoRA of a linear layer"
    return "its forward is patched already" if "forward" in vars(layer) else None


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def part_reason(weights: Weights) -> str:
    """Why a layer whose tensors are not whole in its own call runs PEFT's forward."""
    if any(is_dtensor(tensor) for tensor in weights if tensor is not None):
        return "tensor parallelism: its parameters are DTensors"
    return "its parameters are flat parts (FSDP1, called outside of its unit's forward)"


def tell(layer: Any, reason: str) -> None:
    """Note why a call runs PEFT's own forward, and warn of each reason that was not reported."""
    if reason in OFF or torch.compiler.is_compiling():
        return
    layer.fallen = reason
    told = vars(layer).setdefault("told", set())  # a pickle may come from before it
    if reason not in told:
        told.add(reason)
        warnings.warn(
            "LoRA layers that fuse_peft reported as fused run PEFT's own forward; explain(model) "
            f"names them. The reason: {reason}",
            stacklevel=4,
        )


def class_of(layer: Any) -> type:
    """The class of a layer; of a unit of FSDP2 the one below, which FSDP2 derives its own from."""
    cls = type(layer)
    first, *rest = cls.__bases__
    return rest[0] if first.__module__.startswith("torch.distributed.") else cls
