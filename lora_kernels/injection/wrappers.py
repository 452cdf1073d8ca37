"""The model under what wraps its modules: torch.compile, checkpointing, FSDP, data parallelism.

A wrapper holds one module, and puts a name of its own into every path below it
(`layers.0._orig_mod.q_proj`). Files, PEFT and the model without the wrapper lack that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..layers.base import is_conv1d

# The names under which torch.compile, checkpoint_wrapper and FSDP hold the module they wrap.
INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds its module; None for a module that is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return next((name for name in INNER if name in module._modules), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside all wrappers around it."""
    while (name := inner_name(model)) is not None:
        model = model._modules[name]  # type: ignore[assignment]
    return model


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model without wrappers, around it and inside it; those inside are back afterwards.

    A wrapper around one linear layer or embedding stays: LoRA cannot replace it behind its back.
    """
    model = unwrapped(model)
    taken = []
    for parent in list(model.modules()):
        for name, wrapper in list(parent._modules.items()):
            if wrapper is None or (inner := unwrapped(wrapper)) is wrapper:
                continue
            if isinstance(inner, (nn.Linear, nn.Embedding)) or is_conv1d(inner):
                continue
            taken.append((parent, name, wrapper))
            parent._modules[name] = inner
    try:
        yield model
    finally:
        for parent, name, wrapper in taken:
            parent._modules[name] = wrapper


def without_wrappers(key: str) -> str:
    """A path, or a key of a state dict, without the names of wrappers in it."""
    return ".".join(part for part in key.split(".") if part not in INNER)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or tensor parallelism left only a part of each parameter here."""
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        return not is_summoned(model)
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def is_summoned(model: nn.Module) -> bool:
    """Whether this runs inside FSDP's `summon_full_params`, where parameters are whole."""
    states = (getattr(module, "training_state", None) for module in model.modules())
    return any(getattr(state, "name", "") == "SUMMON_FULL_PARAMS" for state in states)


def refuse_sharded(model: nn.Module, instead: str) -> None:
    """Raise ValueError where `model` is sharded, with what to do instead."""
    if is_sharded(model) and _is_tensor_parallel(model):
        raise ValueError(
            f"{type(model).__name__} is split by tensor parallelism (tp_plan, DTensor weights), "
            "which LoRA layers of this library do not take: load it without, or use PEFT's layers"
        )
    if is_sharded(model):
        raise ValueError(f"the parameters of {type(model).__name__} are sharded: {instead}")


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether parameters are DTensors, and not FSDP's."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return not classes & {"FSDPModule", "FullyShardedDataParallel"}
