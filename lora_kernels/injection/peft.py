"""Run the LoRA layers of an existing PEFT model fused, in place and reversibly.

The PEFT model keeps its modules, parameters, names and files. A supported layer becomes a
`FusedLinear`, a subclass of PEFT's class that adds a `forward`. Each call decides anew: what PEFT
does beyond LoRA and DoRA (merged or disabled adapters, other variants) runs PEFT's own forward. A
subclass can be copied and pickled like any module, and adds no reference from a layer to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..algebra.operands import Parts, Settings
from ..autograd.functional import lora_layer
from ..layers.chosen import chosen
from ..layers.dora import Dora, dora_layer
from ..layers.quantised import quantised_layer
from ..layers.sharded import is_part
from ..strategies.choose import Choice
from ..strategies.problem import Problem
from ..strategies.table import check_strategy
from .bypassed import bypasses, probed, unwatch, watch
from .peft_calls import MixedModel
from .peft_mixed import MixedHead, MixedLayer, mixed_parts
from .peft_state import (
    KINDS,
    Plain,
    active,
    class_of,
    fallback_reason,
    never_fused,
    part_reason,
    plain_lora,
    tell,
)
from .report import TYPICAL_TOKENS, FusedRow, Report, SkippedRow, count_parameters
from .siblings import group_siblings, unhook


def fuse_peft(peft_model: nn.Module, strategy: str = "auto", group: bool = True) -> Report:
    """Let every plain LoRA layer of a PEFT model run as one fused operation, in place.

        y = x weight^T + bias + scale * D(x) lora_A^T lora_B^T

    These are `peft.tuners.lora.Linear`, with DoRA or without, and PEFT's layers around what
    bitsandbytes or torchao has quantised. No value, name or `requires_grad` changes. The report's
    skipped rows say why a layer runs PEFT's own forward; a state that may change (merged, disabled,
    `set_adapter`) is looked at again in every call. Layers that adapters add later need another
    call, which is harmless for the rest. `copy.deepcopy` and pickle work. With `group`, siblings
    that read the same input (query, key and value) run as one problem.

    Dropout masks come from torch's generator. They are those of `nn.Dropout` for few tokens on a
    CPU and for DoRA, and others elsewhere.

    A mixed batch, `model(**batch, adapter_names=[...])` with a name for each example, runs fused
    too. Unlike PEFT it also trains (`docs/packs.md`).

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
    told: set[str] = set()
    for name, layer in layers.items():
        reasons[name] = never_fused(layer) or bypasses(peft_model, name) or dead.get(name)
        if reasons[name] is None:
            kind = class_of(layer)
            _exchange(layer, kind, _fused_class(kind.__name__))
            layer.strategy, layer.group, layer.fallen, layer.told = strategy, None, None, told
            reasons[name] = fallback_reason(layer)
    told |= {reason for reason in reasons.values() if reason is not None}
    for module in peft_model.modules():
        kind = class_of(module)
        if kind.__name__ in _AROUND and kind.__module__.startswith("peft."):
            _exchange(module, kind, _fused_class(kind.__name__))
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
        if isinstance(module, (MixedLayer, MixedHead, MixedModel)):
            fused = class_of(module)
            _exchange(module, fused, fused.__bases__[1])
            if issubclass(fused, _Fused):
                for name in ("strategy", "group", "fallen", "told"):
                    vars(module).pop(name, None)
    return model


def fused_peft_layers(
    model: nn.Module, tokens: int, dtype: torch.dtype | None = None
) -> list[tuple[str, Problem, Choice]]:
    """Name, problem and choice of the layers that run fused in their present state."""
    found = []
    for name, module in model.named_modules():
        layer = fused_peft_layer(module)
        if layer is not None and fallback_reason(layer) is None and layer.fallen is None:
            found.append((name, *chosen(layer, tokens, dtype)))
    return found


def unfused_peft_layers(model: nn.Module) -> list[SkippedRow]:
    """The layers of `fuse_peft` that do not run fused in their present state, or did not last."""
    found = []
    for name, module in model.named_modules():
        if (layer := fused_peft_layer(module)) is not None:
            reason = fallback_reason(layer)
            if reason is None and layer.fallen is not None:
                reason = f"in its last call: {layer.fallen}"
            if reason is not None:
                found.append(SkippedRow(name, reason))
    return found


class _Fused(MixedLayer):
    """What `fuse_peft` adds to a layer of PEFT's: fused where its state allows, else as it was."""

    strategy: str
    group: Any
    fallen: str | None = None  # why the last call with LoRA ran PEFT's own forward
    told: set[str]  # the reasons that were reported, for all layers of one `fuse_peft`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return self.called_with(x, args, kwargs)
        plain = plain_lora(self)
        if isinstance(plain, str) or is_part(plain.weights):
            tell(self, plain if isinstance(plain, str) else part_reason(plain.weights))
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        if self.fallen is not None:
            self.fallen = None
        parts = _parts(self, plain, in_training=False)
        if plain.quantised:
            _, _, lora_A, lora_B = plain.weights
            return quantised_layer(self.base_layer, x, lora_A, lora_B, parts.settings)  # type: ignore[attr-defined]
        if plain.stacked:
            if self.group is not None:
                self.group.apart = True
            return lora_layer(x, parts)
        if plain.magnitude is None:
            return self._lora(x, parts)
        dropout = getattr(plain.dropout, "p", 0.0) if plain.dropout.training else 0.0
        dora = Dora(plain.magnitude, plain.weights.bias, dropout)
        return dora_layer(x, parts, dora, self._lora)

    def _lora(self, x: Tensor, parts: Parts) -> Tensor:
        if self.group is not None and (y := self.group.output(self, x, parts)) is not None:
            return y
        return lora_layer(x, parts)

    def parts(self, *mixed: Any) -> Parts | None:
        """The tensors and settings of a call now; None where it runs alone, or not fused.

        `mixed` is whose rows a mixed batch has, as `mixed_parts` takes it.
        """
        if mixed:
            packed = mixed_parts(self, *mixed)
            return packed if isinstance(packed, Parts) else None
        parts = self._shared(in_training=False)
        return None if parts is None or is_part(parts.weights) else parts

    def own(self) -> Parts | None:
        """The same with the settings as in training."""
        return self._shared(in_training=True)

    def _shared(self, *, in_training: bool) -> Parts | None:
        plain = plain_lora(self)
        if isinstance(plain, str) or plain.quantised or (plain.stacked and not in_training):
            return None
        return _parts(self, plain, in_training=in_training)

    @property
    def rank(self) -> int:
        """R of the adapter that is active, or the sum of those of several."""
        adapters: Any = self.lora_A  # type: ignore[attr-defined]
        return sum(adapters[name].out_features for name in active(self))

    def extra_repr(self) -> str:
        return f"fused, strategy={self.strategy!r}"


# PEFT's classes that `fuse_peft` derives from: where they are, and what it adds to them.
_LAYERS = {name: (f"peft.tuners.lora.{module}", _Fused) for name, module in KINDS.items()}
_AROUND = {
    "LoraModel": ("peft.tuners.lora.model", MixedModel),
    "ModulesToSaveWrapper": ("peft.utils.other", MixedHead),
}
_DERIVED: dict[str, tuple[str, type]] = {**_LAYERS, **_AROUND}


@cache
def _fused_class(name: str) -> type:
    """A subclass of PEFT's class of that name, which still goes and prints by that name.

    It is made when it is asked for: importing this package imports no PEFT.
    """
    module, added = _DERIVED[name]
    names = {"__module__": __name__, "__qualname__": f"Fused{name}"}  # where a pickle finds it
    return type(name, (added, getattr(import_module(module), name)), names)


def __getattr__(name: str) -> Any:
    if name.removeprefix("Fused") in _DERIVED and name.startswith("Fused"):
        return _fused_class(name.removeprefix("Fused"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _parts(layer: Any, plain: Plain, *, in_training: bool) -> Parts:
    weights, dropout, scale, magnitude, *_ = plain
    if magnitude is not None:
        return Parts(weights._replace(bias=None), Settings(scale, 0.0, layer.strategy))
    probability = getattr(dropout, "p", 0.0) if in_training or dropout.training else 0.0
    return Parts(weights, Settings(scale, probability, layer.strategy))


def fused_peft_layer(module: nn.Module | None) -> Any:
    """The module itself if `fuse_peft` made it a FusedLinear, else None."""
    return module if isinstance(module, _Fused) else None


def _exchange(layer: Any, old: type, new: type) -> None:
    """Make `new` the class of a layer in the place of `old`."""
    cls = type(layer)
    if cls is not old:
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        bases = tuple(new if base is old else base for base in cls.__bases__)
        new = type(cls.__name__.replace(old.__name__, new.__name__), bases, own)
    layer.__class__ = new


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
