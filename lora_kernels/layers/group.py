"""Layers that read the same x run as one problem: query, key and value; gate and up.

The model stays as it is: every projection keeps its name, its parameters and its own `forward`. The
first member that is called with an x computes y for all members, and the others fetch theirs when
they are called with that very x. So x is read once, three launches become one, and backward sums dx
in one accumulator.

Nothing is assumed of the caller. A group is in one of three states:

    idle       no results wait. The first member called computes for all       -> waiting
    waiting    a member that comes with the same x fetches its y; the last one -> idle
               a member comes with another x: what waits is dropped, a miss    -> idle
    dissolved  after three misses in a row, every member runs alone
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..algebra.operands import Parts
from ..autograd.autocast import autocast_dtype
from ..autograd.functional import lora_linears
from ..strategies.problem import Problem

_PATIENCE = 3  # misses in a row


class LoRALayer(Protocol):
    """A layer with LoRA: a FusedLoRALinear, or what `fuse_peft` made of a layer of PEFT's."""

    group: Group | None  # the siblings that read the same x

    @property
    def training(self) -> bool:
        """Whether dropout is on."""

    def own(self) -> Parts | None:
        """Its tensors, and its settings as in training; None if it runs unfused."""

    def parts(self) -> Parts | None:
        """Its tensors and settings in a call now; None if it runs unfused (merged, say)."""


def layout_of(layer: LoRALayer) -> tuple[Any, ...] | None:
    """What layers must have in common to run as a group; None if this one runs alone."""
    own = layer.own()
    if own is None or own.settings.columns is not None:
        return None
    R, K = own.weights.lora_A.shape
    layouts = [None if t is None else (t.dtype, t.device, t.stride()) for t in own.weights]
    return R, K, own.settings, *layouts


def problem_of(layer: LoRALayer, M: int, dtype: torch.dtype | None = None) -> Problem:
    """What a call on M tokens asks of `choose`, for the layer's whole group if it is in one.

    `dtype` is that of the activations (default: the weight's). Raises ValueError if the layer runs
    unfused.
    """
    members = [layer] if layer.group is None else layer.group.members
    found = [own for member in members if (own := member.own()) is not None]
    own = layer.own()
    if own is None:
        raise ValueError("a layer that runs unfused asks for no strategy")
    (weight, _, _, lora_B), settings = own
    return Problem.on(
        weight.device, M, max(each.weights.weight.shape[0] for each in found), weight.shape[1],
        lora_B.shape[1], dtype or weight.dtype,
        dropout=layer.training and settings.dropout > 0,
        segments=len(settings.columns or members), columns=settings.columns is not None,
    )  # fmt: skip


class _Waiting(NamedTuple):
    """Outputs computed for members that have not called yet.

    `results` holds, by the member's id, y and the `_state` of the adapter that made it: y is valid
    only while that is unchanged. `call` is what else must be the same when the member comes.
    """

    x: Tensor
    call: Any
    results: dict[int, tuple[Tensor, Any]]


class Group:
    """Two or more layers that read the same x.

    With `first_only` the members share the first x of each call of their parent, and read another
    tensor after it (DeBERTa's relative positions); `parent_called` is a pre-hook of the parent.
    """

    def __init__(self, members: tuple[LoRALayer, ...], first_only: bool = False) -> None:
        self.members = members
        self.first_only = first_only
        self.misses = 0
        self._fresh = False  # the parent was called, and no x has come yet
        # One attribute, so that in a model called from threads results never part from their x.
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(Group(self.members, self.first_only))  # what waits does not travel

    def parent_called(self, *_: Any) -> None:
        """The parent's forward begins."""
        self._fresh = True

    def output(self, layer: LoRALayer, x: Tensor, own: Parts) -> Tensor | None:
        """y of one member, whose parts for x are `own`; None if it must be computed alone."""
        compiling = torch.compiler.is_compiling()
        if self.misses >= _PATIENCE or (not compiling and x.is_inference()):
            return None  # dissolved; or an in-place change of x could not be seen
        version = 0 if compiling else x._version  # a graph cannot compare versions
        call = version, torch.is_grad_enabled(), autocast_dtype(x.device)
        waiting = self._waiting
        if waiting is not None and waiting.x is x and waiting.call == call:
            found = waiting.results.pop(id(layer), None)
            if not waiting.results:
                self._waiting, self.misses = None, 0
            if found is not None and found[1] == _state(own):
                return found[0]
        if self._waiting is not None:  # a member never fetched its output for the previous x
            self.misses += 1
            self._waiting = None
            if self.misses >= _PATIENCE:
                return None
        if self.first_only and not self._fresh:
            return None
        self._fresh = False
        if not any(member is layer for member in self.members):
            return None  # a replica of nn.DataParallel, whose siblings are replicas unknown here
        every = [own if member is layer else member.parts() for member in self.members]
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
    """Whether these layers can share a launch now.

    They could when the group was made; since then settings may have changed, and offloading may
    have taken a sibling's tensors to another device.
    """
    first, device, K = parts[0], x.device, x.shape[-1]
    return all(
        settings == first.settings
        and (weights.bias is None) == (first.weights.bias is None)
        and weights.weight.device == device
        and weights.weight.shape[-1] == K
        for weights, settings in parts
    )


def _state(parts: Parts) -> Any:
    """What a waiting output depends on besides x: the settings, the adapter and its values."""
    if torch.compiler.is_compiling():
        return parts.settings
    A, B = parts.weights.lora_A, parts.weights.lora_B
    return id(A), A._version, id(B), B._version, parts.settings
