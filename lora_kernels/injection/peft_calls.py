"""Calls of a fused PEFT model with `adapter_names`: who gets the names, and what may train.

PEFT takes such a mixed batch in inference alone. Here it trains as well, and what could train it
wrong is refused by name.

Backward needs no names, but a checkpoint that recomputes a layer does, after the call and its hooks
have ended. So each checkpoint that begins in a call keeps the names of that call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..algebra.packs import is_capturing
from .peft_mixed import MixedHead, MixedLayer, UntrainableError, eager
from .peft_state import class_of, never_fused

BASE = "__base__"  # PEFT's name for rows without an adapter


class MixedModel:
    """What `fuse_peft` adds to PEFT's LoraModel: calls with `adapter_names`, also in training."""

    training: bool

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        hooks = super()._enable_peft_forward_hooks  # type: ignore[misc]
        if kwargs.get("adapter_names") is None:
            return hooks(*args, **kwargs)  # type: ignore[no-any-return]
        context: AbstractContextManager[None] = eager(self._given)(hooks, args, kwargs)
        return context

    def _given(self, hooks: Any, args: Any, kwargs: Any) -> AbstractContextManager[None]:
        names = kwargs["adapter_names"]
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"adapter_names must be a list with a name for each example: got {names!r}"
            )
        if is_capturing():
            raise RuntimeError(
                "a mixed batch cannot be captured: a CUDA graph would keep its names"
            )
        if not self.training:
            return _closed(hooks(*args, **kwargs))
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("a mixed batch cannot train with alora_offsets")
        _check(self, names)
        return _training_call(self, _Call(tuple(names)))


@contextmanager
def _closed(hooks: AbstractContextManager[None]) -> Iterator[None]:
    """PEFT's hooks for a call, off after it: PEFT itself leaves them on after an error."""
    hooks.__enter__()
    try:
        yield
    finally:
        hooks.__exit__(None, None, None)


@contextmanager
def _training_call(model: Any, call: _Call) -> Iterator[None]:
    """The names of a mixed batch that trains, for the layers and checkpoints of a LoraModel."""
    kept = [(m, vars(m).get("_gradient_checkpointing_func")) for m in model.modules()]
    kept = [(module, checkpoint) for module, checkpoint in kept if checkpoint is not None]
    try:
        for module, checkpoint in kept:
            module._gradient_checkpointing_func = call.checkpoint(module, checkpoint)
        with call.names_given(model):
            yield
    except UntrainableError as refused:
        path = next(path for path, m in model.model.named_modules() if m is refused.layer)
        raise ValueError(_refusal(path, refused.reason)) from None
    finally:
        call.runs = False
        for module, checkpoint in kept:
            module._gradient_checkpointing_func = checkpoint


class _Call:
    """One call of a model on a mixed batch that trains, and what its checkpoints recompute."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.runs = True  # until the call is over
        self._depth = 0  # how many checkpoints of transformers the layer that runs is in
        self._grad = torch.is_grad_enabled()

    @contextmanager
    def names_given(self, model: nn.Module) -> Iterator[None]:
        """Inside, the layers of `model` are given the names."""
        handles = [
            module.register_forward_pre_hook(self._give, with_kwargs=True)
            for module in model.modules()
            if isinstance(module, _named_classes())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _give(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._grad and not self._depth and eager(_in_a_checkpoint)():
            raise RuntimeError(
                "a checkpoint, or torch.no_grad, around a part of the model: what it recomputes "
                "would not know the names of a mixed batch. Use gradient_checkpointing_enable()"
            )
        return args, {**kwargs, "adapter_names": self.names}

    def checkpoint(self, owner: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """transformers' checkpoint function, for what `owner` runs in this call."""

        def run(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                if self.runs:
                    return inner(*args, **kwargs)
                with self.names_given(owner):
                    return inner(*args, **kwargs)
            finally:
                self._depth -= 1

        return lambda inner, *args, **kwargs: function(partial(run, inner), *args, **kwargs)


def _in_a_checkpoint() -> bool:
    """Whether a layer runs in a checkpoint: one kind turns gradients off, one keeps what is saved.

    The second is not seen on a torch that does not tell.
    """
    if not torch.is_grad_enabled():
        return True
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    name = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    return name.startswith("_checkpoint_hook")


@cache
def _named_classes() -> tuple[type, ...]:
    """PEFT's classes of modules that are given the names."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return LoraLayer, AuxiliaryTrainingWrapper


def _check(model: Any, names: Any) -> None:
    """Raise ValueError for names that the model cannot train together."""
    wanted = set(names) - {BASE}
    if unknown := sorted(wanted - model.peft_config.keys()):
        raise ValueError(f"no adapter {unknown[0]!r}: there are {sorted(model.peft_config)}")
    for name in sorted(wanted):
        if (bias := model.peft_config[name].bias) != "none":
            raise ValueError(
                f"adapter {name!r} has bias={bias!r}: it trains biases of the base model, which "
                "all rows of a mixed batch share"
            )
    modules = dict(model.model.named_modules())
    for path, module in modules.items():
        if (reason := _untrainable(path, module, wanted)) is not None:
            raise ValueError(_refusal(path, reason))
    if torch.is_grad_enabled():
        _check_gradients(modules, wanted)


def _refusal(path: str, reason: str) -> str:
    return (
        f"a mixed batch cannot train {path!r}: {reason}. Train the adapters that have it one at a "
        "time (set_adapter), or leave it out of their configs"
    )


def _untrainable(path: str, module: nn.Module, wanted: set[str]) -> str | None:
    """Why these adapters cannot train this module together, in words."""
    layer, wrapper = _named_classes()
    if not isinstance(module, (layer, wrapper)):
        mixes = module.training and module._buffers.get("running_mean") is not None
        return "it normalizes over the rows of all adapters" if mixes else None
    own = wanted & {*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())}
    if isinstance(module, MixedHead) or (isinstance(module, layer) and not own):
        return None
    if "experts" in path.split("."):
        return "experts get tokens in an order of their own, not examples"
    if isinstance(module, MixedLayer):
        dora = sorted(name for name in own if module.use_dora.get(name))
        return f"adapter {dora[0]!r} is DoRA" if dora else None
    if class_of(module).__name__ != "ModulesToSaveWrapper" and (reason := never_fused(module)):
        return reason
    return "it is not fused (the report of fuse_peft says why; if it came later, call it again)"


def _check_gradients(modules: Mapping[str, Any], wanted: set[str]) -> None:
    """Raise ValueError for an adapter that is frozen as a whole; warn of a frozen head."""
    frozen, heads = set(wanted), []
    for path, module in modules.items():
        if isinstance(module, MixedHead):
            copies = [(name, module.modules_to_save[name]) for name in module.modules_to_save]
            heads += [
                f"{path}.{name}"
                for name, copied in copies
                if name in wanted and not any(p.requires_grad for p in copied.parameters())
            ]
        elif frozen and isinstance(module, MixedLayer):
            frozen -= {name for name in frozen if _trains(module, name)}
    remedy = f"model.set_requires_grad({sorted(wanted)})"
    if frozen:
        raise ValueError(
            f"adapter {sorted(frozen)[0]!r} has rows in a batch that trains, but none of its LoRA "
            f"requires a gradient: set_adapter freezes all but its own. Call {remedy}"
        )
    if heads:
        warnings.warn(
            f"frozen in a mixed batch that trains: {', '.join(heads)}. {remedy} trains them",
            stacklevel=7,
        )


def _trains(layer: Any, name: str) -> bool:
    """Whether the LoRA of an adapter in a layer requires a gradient."""
    matrices = [own[name].weight for own in (layer.lora_A, layer.lora_B) if name in own]
    return any(weight.requires_grad for weight in matrices)
