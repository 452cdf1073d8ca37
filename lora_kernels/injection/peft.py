"""Run the LoRA layers of an existing PEFT model fused, in place and reversibly.

The PEFT model keeps its modules, parameters, names and files. A supported layer becomes a
`FusedLinear`, a subclass of PEFT's class that adds a `forward`. Each call decides anew: what PEFT
does beyond LoRA and DoRA (merged or disabled adapters, several at once, other variants, mixed
batches) runs PEFT's own forward. A subclass can be copied and pickled like any module, and adds no
reference from a layer to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from .. import arguments
from ..algebra.operands import Parts, Settings, Weights
from ..autograd.addition import add_lora_to
from ..autograd.functional import lora_layer
from ..layers.base import is_conv1d, why_not_plain
from ..layers.dora import Dora, dora_layer
from ..layers.quantised import chosen, quantiser
from ..strategies.choose import Choice
from ..strategies.problem import Problem
from ..strategies.table import check_strategy
from .bypassed import bypasses, probed, unwatch, watch
from .report import TYPICAL_TOKENS, FusedRow, Report, SkippedRow, count_parameters
from .siblings import group_siblings, unhook


def fuse_peft(peft_model: nn.Module, strategy: str = "auto", group: bool = True) -> Report:
    """Let every plain `peft.tuners.lora.Linear` of a model run as one fused operation, in place.

        y = x weight^T + bias + scale * D(x) lora_A^T lora_B^T

    No value, name or `requires_grad` changes. The report's skipped rows say why a layer runs PEFT's
    own forward; a state that may change (merged, disabled, `set_adapter`) is looked at again in
    every call. Dropout masks come from torch's generator but are not the ones that `nn.Dropout`
    draws. Layers that adapters add later need another call, which is harmless for the rest.
    `copy.deepcopy` and pickle work. With `group`, siblings that read the same input (query, key and
    value) run as one problem.

    Raises:
        ValueError: the strategy is unknown, or the model has no PEFT LoRA layer.

    Example:
        >>> model = get_peft_model(base, LoraConfig(target_modules=["query", "value"]))
        >>> print(fuse_peft(model))
    """
    arguments.module("peft_model", peft_model)
    arguments.flag("group", group)
    check_strategy(strategy)
    unfuse_peft(peft_model)  # an earlier call, whose groups end here
    layers = dict(_lora_layers(peft_model))
    dead = probed(peft_model, layers)
    reasons: dict[str, str | None] = {}
    for name, layer in layers.items():
        reasons[name] = _never(layer) or bypasses(peft_model, name) or dead.get(name)
        if reasons[name] is None:
            layer.__class__ = _fused_class(type(layer).__name__)
            layer.strategy, layer.group = strategy, None
            reasons[name] = fallback_reason(layer)
    if group:
        group_siblings(peft_model, fused_peft_layer)
    watch(peft_model)
    skipped = [SkippedRow(name, reason) for name, reason in reasons.items() if reason is not None]
    fused: list[FusedRow] = []
    for name, _, choice in fused_peft_layers(peft_model, TYPICAL_TOKENS):
        fused.append(FusedRow(name, choice.strategy, choice.reason))
    if not fused and not skipped:
        raise ValueError(
            f"{type(peft_model).__name__} has no PEFT LoRA layer: use add_lora on plain models"
        )
    return Report(tuple(fused), tuple(skipped), count_parameters(peft_model, _groups(peft_model)))


def unfuse_peft(model: nn.Module) -> nn.Module:
    """Undo `fuse_peft`: every layer runs PEFT's own forward again. Returns `model`."""
    unhook(arguments.module("model", model))
    unwatch(model)
    for module in model.modules():
        if (layer := fused_peft_layer(module)) is not None:
            _, layer.__class__ = type(layer).__bases__
            del layer.strategy, layer.group
    return model


def fused_peft_layers(
    model: nn.Module, tokens: int, dtype: torch.dtype | None = None
) -> list[tuple[str, Problem, Choice]]:
    """Name, problem and choice of the layers that run fused in their present state."""
    found = []
    for name, module in model.named_modules():
        if (layer := fused_peft_layer(module)) is not None:
            plain = plain_lora(layer)
            if not isinstance(plain, str):
                rank = plain.weights.lora_A.shape[0]
                found.append((name, *chosen(layer, rank, tokens, dtype)))
    return found


# Hooks that torch calls for every module (register_module_forward_hook and its like).
_GLOBAL_HOOKS = (
    module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks,
    module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks,
)  # fmt: skip


class _Fused:
    """What `fuse_peft` adds to a layer of PEFT's: fused where its state allows, else as it was."""

    strategy: str
    group: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = plain_lora(self)
        if isinstance(plain, str) or args or any(v is not None for v in kwargs.values()):
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        parts = _parts(self, plain, in_training=False)
        if plain.quantised:
            _, _, lora_A, lora_B = plain.weights
            return add_lora_to(self.base_layer(x), x, lora_A, lora_B, parts.settings)  # type: ignore[attr-defined]
        if plain.magnitude is None:
            return self._lora(x, parts)
        dropout = getattr(plain.dropout, "p", 0.0) if plain.dropout.training else 0.0
        dora = Dora(plain.magnitude, plain.weights.bias, dropout)
        return dora_layer(x, parts, dora, self._lora)

    def _lora(self, x: Tensor, parts: Parts) -> Tensor:
        if self.group is not None and (y := self.group.output(self, x, parts)) is not None:
            return y
        return lora_layer(x, parts)

    def parts(self) -> Parts | None:
        """The tensors and settings of a call now; None where it runs alone, or not fused."""
        return self._shared(in_training=False)

    def own(self) -> Parts | None:
        """The same with the settings as in training."""
        return self._shared(in_training=True)

    def _shared(self, *, in_training: bool) -> Parts | None:
        plain = plain_lora(self)
        if isinstance(plain, str) or plain.quantised:
            return None
        return _parts(self, plain, in_training=in_training)

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Fused")  # printed, it is PEFT's layer still

    def extra_repr(self) -> str:
        return f"fused, strategy={self.strategy!r}"


# PEFT's classes of linear layers that can run fused, and the modules that define them.
_KINDS = {
    "Linear": "layer", "Linear4bit": "bnb", "Linear8bitLt": "bnb", "TorchaoLoraLinear": "torchao",
}  # fmt: skip


@cache
def _fused_class(name: str) -> type:
    """A subclass of PEFT's class of that name, which adds `_Fused`.

    It is made when it is asked for: importing this package imports no PEFT.
    """
    kind = getattr(import_module(f"peft.tuners.lora.{_KINDS[name]}"), name)
    return type(f"Fused{name}", (_Fused, kind), {"__module__": __name__})


def __getattr__(name: str) -> Any:  # where a pickle finds the class
    if name.removeprefix("Fused") in _KINDS and name.startswith("Fused"):
        return _fused_class(name.removeprefix("Fused"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Plain(NamedTuple):
    """What a PEFT layer that runs fused consists of; `magnitude` is DoRA's.

    The base layer of a `quantised` one is called as it is, and LoRA added to its y.
    """

    weights: Weights
    dropout: nn.Module
    scale: float
    magnitude: Tensor | None = None
    quantised: bool = False


def _parts(layer: Any, plain: Plain, *, in_training: bool) -> Parts:
    weights, dropout, scale, magnitude, _ = plain
    if magnitude is not None:
        return Parts(weights._replace(bias=None), Settings(scale, 0.0, layer.strategy))
    probability = getattr(dropout, "p", 0.0) if in_training or dropout.training else 0.0
    return Parts(weights, Settings(scale, probability, layer.strategy))


def fused_peft_layer(module: nn.Module | None) -> Any:
    """The module itself if `fuse_peft` made it a FusedLinear, else None."""
    return module if type(module).__module__ == __name__ else None


def fallback_reason(layer: Any) -> str | None:
    """Why a PEFT layer in its present state runs PEFT's own forward; None if it runs fused."""
    plain = plain_lora(layer)
    return plain if isinstance(plain, str) else None


def plain_lora(layer: Any) -> Plain | str:
    """What a layer that can run fused now consists of; else why it cannot, in words."""
    if any(_GLOBAL_HOOKS):
        return "there are global module hooks, which expect calls of the modules inside it"
    if torch.jit.is_tracing():
        return "torch.jit.trace records PEFT's own forward"
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "merged: only the base layer runs"
    known = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(known) != 1:
        return f"{len(known)} adapters are active: {', '.join(known) or 'none'}"
    return _plain_adapter(layer, known[0])


def _plain_adapter(layer: Any, name: str) -> Plain | str:
    """The same for its one active adapter."""
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
        return "a module inside it has hooks or a patched forward"
    bias = base.bias
    if lora_B.bias is not None:  # lora_bias
        bias = scale * lora_B.bias if bias is None else bias + scale * lora_B.bias
    weights = Weights(base.weight, bias, lora_A.weight, lora_B.weight)
    if type(base) is not nn.Linear:  # a Conv1D holds [K, N]
        weights = weights._replace(weight=weights.weight.T)
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
    if refusal := why_not_plain(weight) or why_not_plain(lora_A) or why_not_plain(lora_B):
        return f"its weight is {refusal}"
    return "the base weight trains too" if weight.requires_grad else None


def _never(layer: Any) -> str | None:
    """Why a LoRA layer can never run fused."""
    if _is_of_peft(layer, "ParamWrapper"):
        return "its LoRA is on a parameter (target_parameters), not on a linear layer"
    if not any(_is_of_peft(layer, name) for name in _KINDS):
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


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )


def _groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """LoRA parameters, then each module that PEFT trains in full (`modules_to_save`)."""
    from peft.utils import ModulesToSaveWrapper

    groups: dict[str, list[nn.Parameter]] = {"lora": []}
    for _, layer in _lora_layers(model):
        for name in layer.adapter_layer_names:
            groups["lora"] += getattr(layer, name).parameters()
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            path = name.removeprefix("base_model.model.")
            groups[path] = list(module.modules_to_save.parameters())
    return groups
