"""Tensors under FSDP, ZeRO-3 and tensor parallelism: which are parts, and which ask in vain.

Outside a forward both versions of FSDP leave a part of each parameter on a process: FSDP2 as a
DTensor that shows its global shape, FSDP1 as a flat piece. In a forward the parameters of its unit
are whole, and those of other units stay parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..algebra.operands import PackWeights, Weights
from ..autograd.functional import is_dtensor


def is_part(weights: Weights | PackWeights) -> bool:
    """Whether a matrix of a layer is not whole here, now."""
    if isinstance(weights, PackWeights):
        matrices = [weights.weight, *(t for t in weights.lora_A + weights.lora_B if t is not None)]
    else:
        matrices = [weights.weight, weights.lora_A, weights.lora_B]
    return any(tensor.dim() != 2 or is_dtensor(tensor) for tensor in matrices)


def in_parts(model: nn.Module) -> bool:
    """Whether FSDP, ZeRO-3 or tensor parallelism holds a model, in a forward or outside of one."""
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        return True
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def is_gathered_alone(weights: Weights) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds a layer, which is whole in its own call alone.

    In the call of a sibling its tensors may look whole and not be: they may be on their way.
    """
    return hasattr(weights.lora_A, "ds_id")


def as_asked(tensor: Any) -> Any:
    """A frozen parameter without the gradient that FSDP1 would compute and drop; others as given.

    FSDP1 keeps a unit's parameters in one flat parameter, which trains if one of them does. In a
    forward each is a view of it, and so the views of frozen parameters ask for a gradient too.
    """
    if tensor is None or not tensor.requires_grad or torch.compiler.is_compiling():
        return tensor
    flat = tensor._base
    parameters, views = (getattr(flat, name, None) for name in ("_params", "_tensors"))
    for parameter, view in zip(parameters or (), views or (), strict=False):
        if view is tensor:
            return tensor if parameter.requires_grad else tensor.detach()
    return tensor
