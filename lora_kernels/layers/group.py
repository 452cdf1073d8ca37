"""Layers that read the same x run as one problem: query, key and value; gate and up.

The model stays as it is: every projection keeps its name, its parameters and its own `forward`.
What happens is that the first sibling called with an x computes all of them and holds the others'
results until they are called with that very x. So x is read once, three launches become one, and
backward sums dx in one accumulator. Nothing is assumed of the caller: a sibling called with another
x is computed alone, and a group whose results are not fetched three times running dissolves. Where
siblings read a second tensor by design (DeBERTa), a pre-hook on their parent says which is first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.operands import Parts
from ..autograd.autocast import autocast_dtype
from ..autograd.functional import lora_linears
from .base import LoRALayer

_PATIENCE = 3


class _Waiting(NamedTuple):
    """Results that siblings have yet to ask for: by member, y and what must be as it was."""

    x: Tensor
    call: Any
    results: dict[int, tuple[Tensor, Any]]


class Group:
    """Two or more layers that read the same x; they run together while their parts allow it."""

    def __init__(self, members: tuple[LoRALayer, ...], first_only: bool = False) -> None:
        self.members = members
        self.first_only = first_only
        self.misses = 0
        self._fresh = False  # whether the parent was called and no x has come yet
        # One attribute, since a model may be called from threads: results never part from their x.
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(Group(self.members, self.first_only))  # what waits does not travel

    def parent_called(self, *_: Any) -> None:
        """The parent's forward begins: a pre-hook of it, for `first_only`."""
        self._fresh = True

    def output(self, layer: LoRALayer, x: Tensor, own: Parts) -> Tensor | None:
        """y of one member, whose parts for x are `own`; None if it must be computed alone."""
        compiling = torch.compiler.is_compiling()
        if self.misses >= _PATIENCE or (not compiling and x.is_inference()):
            return None  # a change of an inference tensor cannot be seen
        call = (
            0 if compiling else x._version,  # which no graph can compare
            torch.is_grad_enabled(),
            autocast_dtype(x.device),
        )
        waiting = self._waiting
        if waiting is not None and waiting.x is x and waiting.call == call:
            found = waiting.results.pop(id(layer), None)
            if not waiting.results:
                self._waiting, self.misses = None, 0
            if found is not None and found[1] == _state(own):
                return found[0]
        if self._waiting is not None:  # someone did not come for theirs
            self.misses += 1
            self._waiting = None
            if self.misses >= _PATIENCE:
                return None
        if self.first_only and not self._fresh:
            return None
        self._fresh = False
        if not any(member is layer for member in self.members):
            return None  # a replica of nn.DataParallel: its siblings are replicas too, unknown here
        every = [own if member is layer else member.parts(x) for member in self.members]
        parts = [p for p in every if p is not None]
        if len(parts) < len(every) or not _alike(parts, x):
            return None
        ys = lora_linears(x, tuple([p.weights for p in parts]), own.settings)
        results = {
            id(member): (y, _state(p)) for member, y, p in zip(self.members, ys, parts, strict=True)
        }
        y, _ = results.pop(id(layer))
        self._waiting = _Waiting(x, call, results)
        return y


def _alike(parts: list[Parts], x: Tensor) -> bool:
    """Whether these layers can share a launch now: offloading takes siblings' tensors away."""
    first, device, K = parts[0], x.device, x.shape[-1]
    return all(
        settings == first.settings
        and (weights.bias is None) == (first.weights.bias is None)
        and weights.weight.device == device
        and weights.weight.shape[-1] == K
        for weights, settings in parts
    )


def _state(parts: Parts) -> Any:
    """What must be as it was when a result was computed: the adapter and its values."""
    if torch.compiler.is_compiling():
        return parts.settings
    A, B = parts.weights.lora_A, parts.weights.lora_B
    return id(A), A._version, id(B), B._version, parts.settings
