"""Run the LoRA layers of an existing PEFT model fused, in place and reversibly.

The PEFT model keeps its modules, parameters, names and files. Only the `forward` of each supported
layer is overridden, on the instance, and each call decides anew: what PEFT does beyond plain LoRA
(merged or disabled adapters, several at once, DoRA and other variants, mixed batches) runs PEFT's
own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.operands import Parts, Settings, Weights
from ..autograd.functional import lora_layer
from ..layers.base import is_conv1d
from ..layers.group import Group, problem_of
from ..strategies.choose import choose
from ..strategies.problem import Problem
from ..strategies.table import check_strategy
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
    check_strategy(strategy)
    unhook(peft_model)  # of an earlier call, whose groups end here
    reasons: dict[str, str | None] = {}
    for name, layer in _lora_layers(peft_model):
        reasons[name] = _never(layer)
        if reasons[name] is None:
            layer.forward = FusedForward(layer, strategy)
            layer._replicate_for_data_parallel = layer.forward.replicate
            reasons[name] = fallback_reason(layer)
    if group:
        group_siblings(peft_model, fused_forward)
    skipped = [SkippedRow(name, reason) for name, reason in reasons.items() if reason is not None]
    fused: list[FusedRow] = []
    for name, problem, how in fused_peft_layers(peft_model, TYPICAL_TOKENS):
        choice = choose(problem, how)
        fused.append(FusedRow(name, choice.strategy, choice.reason))
    if not fused and not skipped:
        raise ValueError(
            f"{type(peft_model).__name__} has no PEFT LoRA layer: use add_lora on plain models"
        )
    return Report(tuple(fused), tuple(skipped), count_parameters(peft_model, _groups(peft_model)))


def unfuse_peft(model: nn.Module) -> nn.Module:
    """Undo `fuse_peft`: every layer runs PEFT's own forward again. Returns `model`."""
    unhook(model)
    for module in model.modules():
        if fused_forward(module) is not None:
            del module.forward, module._replicate_for_data_parallel
    return model


def fused_peft_layers(
    model: nn.Module, tokens: int, dtype: torch.dtype | None = None
) -> list[tuple[str, Problem, str]]:
    """Name, problem and strategy of the layers that run fused in their present state."""
    forwards = ((name, fused_forward(module)) for name, module in model.named_modules())
    return [
        (name, problem_of(forward, tokens, dtype), forward.strategy)
        for name, forward in forwards
        if forward is not None and fallback_reason(forward.layer) is None
    ]


class FusedForward:
    """The `forward` of one PEFT layer: fused where its state allows, PEFT's own otherwise.

    A plain object and no closure, so that a model that holds it can be copied and pickled.
    """

    def __init__(self, layer: Any, strategy: str) -> None:
        self.layer = layer
        self.strategy = strategy
        self.group: Group | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self.parts()
        if parts is None or args or any(v is not None for v in kwargs.values()):
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        if self.group is not None and (y := self.group.output(self, x, parts)) is not None:
            return y
        return lora_layer(x, parts)

    def replicate(self) -> Any:
        """A copy of the layer for nn.DataParallel, which would else run this very layer."""
        replica = type(self.layer)._replicate_for_data_parallel(self.layer)
        replica.forward = FusedForward(replica, self.strategy)
        return replica

    @property
    def training(self) -> bool:
        """Whether dropout is on; as PEFT has it, of the dropout module."""
        plain = plain_lora(self.layer)
        return not isinstance(plain, str) and plain.dropout.training

    def parts(self) -> Parts | None:
        """The tensors and settings of a call now; None where PEFT's own forward runs."""
        return self._parts(in_training=False)

    def own(self) -> Parts | None:
        """The tensors, and the settings as in training; None where PEFT's own forward runs."""
        return self._parts(in_training=True)

    def _parts(self, *, in_training: bool) -> Parts | None:
        plain = plain_lora(self.layer)
        if isinstance(plain, str):
            return None
        base, lora_A, lora_B, dropout, scale = plain
        weight = base.weight.T if is_conv1d(base) else base.weight
        probability = getattr(dropout, "p", 0.0) if in_training or dropout.training else 0.0
        weights = Weights(weight, base.bias, lora_A.weight, lora_B.weight)
        return Parts(weights, Settings(scale, probability, self.strategy))


def fused_forward(module: nn.Module | None) -> FusedForward | None:
    """The fused forward that a PEFT layer has, or None."""
    forward = vars(module).get("forward") if module is not None else None
    return forward if isinstance(forward, FusedForward) else None


def fallback_reason(layer: Any) -> str | None:
    """Why a PEFT layer in its present state runs PEFT's own forward; None if it runs fused."""
    plain = plain_lora(layer)
    return plain if isinstance(plain, str) else None


class PlainLoRA(NamedTuple):
    """The modules of a PEFT layer that computes plain LoRA in its present state."""

    base: Any
    lora_A: Any
    lora_B: Any
    dropout: Any
    scale: float


def plain_lora(layer: Any) -> PlainLoRA | str:
    """The modules of a layer that can run fused now, or the reason in words why it cannot."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "merged: only the base layer runs"
    adapters_A, active = layer.lora_A, layer.active_adapters
    if len(active) != 1 or active[0] not in adapters_A:
        known = [name for name in active if name in adapters_A]
        return f"{len(known)} adapters are active: {', '.join(known) or 'none'}"
    name = active[0]
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
        return f"adapter {name!r} is a LoRA variant: {variant}"
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    lora_A, lora_B = adapters_A[name], layer.lora_B[name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"adapter {name!r} is made of {type(lora_A).__name__}, {type(lora_B).__name__}"
    if lora_A.bias is not None or lora_B.bias is not None:
        return f"adapter {name!r} has a bias (lora_bias)"
    if type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "p", 0.0) >= 1:
        return f"adapter {name!r} has the dropout {dropout}"
    if not (type(base) is nn.Linear or is_conv1d(base)):
        return f"its base layer is now {type(base).__name__}"
    if base.weight.requires_grad:
        return "the base weight trains too"
    if _is_hooked(base) or _is_hooked(lora_A) or _is_hooked(lora_B) or _is_hooked(dropout):
        return "a module inside it has hooks or a patched forward"
    return PlainLoRA(base, lora_A, lora_B, dropout, layer.scaling[name])


def _never(layer: Any) -> str | None:
    """Why a LoRA layer can never run fused."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return f"{type(layer).__module__}.{type(layer).__name__} is no plain LoRA of a linear layer"
    base = layer.base_layer
    if not (type(base) is nn.Linear or is_conv1d(base)):
        return f"its base layer is {type(base).__module__}.{type(base).__name__}"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    if "forward" in vars(layer) and not isinstance(layer.forward, FusedForward):
        return "its forward is patched already"
    return None


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
