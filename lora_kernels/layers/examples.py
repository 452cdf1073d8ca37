"""Whether layers take the examples first, asked of a copy of the model that computes nothing.

A batch [examples, tokens] with as many examples as tokens does not show which dimension of x is
which. The copy runs on fake tensors, which have shapes and no memory, with one example less: the
first dimension of each layer's x then says what it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharded import in_parts


def firsts(
    call: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]],
    examples: int,
    instead: Mapping[nn.Module, nn.Module],
    shared: object,
) -> dict[nn.Module, set[int]] | None:
    """Layer -> the first dimensions of each x that it gets in a call with `examples - 1` examples.

    `call` is a model with its arguments, of `examples` examples. `instead` has a plain module for
    each layer, which runs in its place. `shared` is an object of the layers that is not copied.

    The answer is None where the copy cannot be made or cannot run, as when its code asks for
    numbers. A sharded model is not tried: its parts would call other processes.
    """
    try:
        from torch._C import DisableTorchFunction
        from torch._subclasses import FakeTensorMode
    except ImportError:  # they are private
        return None
    model, args, kwargs = call
    if in_parts(model):
        return None
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # A tensor [tokens] looks like one number an example: the second time it stays whole.
    for least in (1, 2):
        found: dict[nn.Module, set[int]] = {layer: set() for layer in instead}
        memo: dict[int, Any] = {id(shared): shared}
        try:
            with DisableTorchFunction():  # to copy a weight is no use of it (injection.bypassed)
                for layer, plain in instead.items():
                    memo[id(layer)] = fake_copy(plain, fake, {})
                copied_model = fake_copy(model, fake, memo).eval()
                given = [_with_one_less(each, examples, least, fake) for each in (args, kwargs)]
            for module in copied_model.modules():  # a hook of the caller's is not for fake tensors
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            for layer, seen in found.items():
                memo[id(layer)].register_forward_pre_hook(
                    lambda _, of_call, seen=seen: seen.add(of_call[0].shape[0])
                )
            with torch.no_grad(), fake:
                copied_model(*given[0], **given[1])
        except Exception:  # noqa: BLE001 (whatever a model raises on tensors without numbers)
            continue
        return found
    return None


def fake_copy(module: nn.Module, fake: Any, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of fake tensors; `memo` has what stands in it for other objects, by their id."""
    for each in module.modules():
        for tensor in (*each._parameters.values(), *each._buffers.values(), *vars(each).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                copied = fake.from_tensor(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    copied = nn.Parameter(copied, tensor.requires_grad)
                memo[id(tensor)] = copied
    return copy.deepcopy(module, memo)


def _with_one_less(value: Any, examples: int, least: int, fake: Any) -> Any:
    """Arguments as fake tensors; those of all examples, of `least` dimensions, have one less."""
    if isinstance(value, Tensor):
        tensor = fake.from_tensor(value.detach())
        batched = tensor.dim() >= least and tensor.shape[0] == examples
        return tensor[:-1] if batched else tensor
    if isinstance(value, Mapping):
        return {key: _with_one_less(each, examples, least, fake) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_one_less(each, examples, least, fake) for each in value)
    return copy.deepcopy(value)
