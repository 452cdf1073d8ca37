"""Layers that read the same x run as one problem: query, key and value; gate and up.

The model stays as it is: every projection keeps its name, its parameters and its own `forward`.
What happens is that the first sibling called with an x computes all of them and holds the others'
results until they are called with that very x. So x is read once, three launches become one, and
backward sums dx in one accumulator. Nothing is assumed of the caller: a sibling called with another
x is computed alone, and a group whose results are not fetched three times running dissolves. Where
siblings read a second tensor by design (DeBERTa), a pre-hook on their parent says which is first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .autograd.autocast import autocast_dtype
from .autograd.functional import Parts, lora_linears
from .modules import FusedLoRALinear


class Siblings(NamedTuple):
    """Attribute names under one parent that read the same tensor, in the order of their masks.

    With `first_only` it is the first tensor that they get in a call of their parent.
    """

    names: tuple[str, ...]
    first_only: bool = False


SIBLINGS = (
    Siblings(("query", "key", "value")),
    Siblings(("q_proj", "k_proj", "v_proj")),
    Siblings(("q_lin", "k_lin", "v_lin")),
    Siblings(("q", "k", "v")),
    # DeBERTa: its query and key also project the table of relative positions, its value does not.
    Siblings(("query_proj", "key_proj", "value_proj"), first_only=True),
    Siblings(("pos_key_proj", "pos_query_proj")),
    Siblings(("gate_proj", "up_proj")),
    Siblings(("wi_0", "wi_1")),
)
# Attention over another sequence: its query reads one tensor, its key and value another.
_CROSS = ("cross", "encoder_attn", "encdec", "encoder_decoder")
_PATIENCE = 3


class Member(Protocol):
    """A layer that can be in a group: FusedLoRALinear, or what `fuse_peft` made of PEFT's."""

    group: Group | None

    def parts(self, x: Tensor) -> Parts | None:
        """What a call on x needs; None while the layer does not run fused (merged, disabled)."""

    def layout(self) -> tuple[Any, ...] | None:
        """What siblings must have in common to be a group; None if it runs alone."""


class _Waiting(NamedTuple):
    """Results that siblings have yet to ask for: by member, y and what must be as it was."""

    x: Tensor
    call: Any
    results: dict[int, tuple[Tensor, Any]]


class Group:
    """Two or more layers that read the same x; they run together while their parts allow it."""

    def __init__(self, members: tuple[Member, ...], first_only: bool = False) -> None:
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

    def output(self, layer: Member, x: Tensor, own: Parts) -> Tensor | None:
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
        first = parts[0]
        weights, biases, lora_A, lora_B, *_ = zip(*parts, strict=True)
        ys = lora_linears(
            x, weights, lora_A, lora_B, () if first.bias is None else biases,
            scale=first.scale, dropout=first.dropout, training=first.training,
            strategy=first.strategy,
        )  # fmt: skip
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
        p[4:] == first[4:]
        and (p.bias is None) == (first.bias is None)
        and p.weight.device == device
        and p.weight.shape[-1] == K
        for p in parts
    )


def _state(parts: Parts) -> Any:
    """What must be as it was when a result was computed: the adapter and its values."""
    if torch.compiler.is_compiling():
        return parts[4:]
    A, B = parts.lora_A, parts.lora_B
    return id(A), A._version, id(B), B._version, *parts[4:]


def fused_layer(module: nn.Module | None) -> Any:
    """The module itself if it is a FusedLoRALinear, else None."""
    return module if isinstance(module, FusedLoRALinear) else None


def group_siblings(
    model: nn.Module, member_of: Callable[[nn.Module | None], Any] = fused_layer
) -> tuple[tuple[str, ...], ...]:
    """Let the siblings of a model run together; returns the paths of each group.

    `member_of` gives the member that a module is, or holds; None if it is no LoRA layer.
    """
    groups = []
    for path, parent in model.named_modules():
        if any(name in path.lower() for name in _CROSS):
            continue
        children = parent._modules
        for names, first_only in SIBLINGS:
            for found in _same_layout({name: member_of(children.get(name)) for name in names}):
                group = Group(tuple(found.values()), first_only)
                if first_only:
                    parent.register_forward_pre_hook(group.parent_called)
                for member in group.members:
                    member.group = group
                groups.append(tuple(f"{path}.{name}" if path else name for name in found))
    return tuple(groups)


def unhook(model: nn.Module) -> None:
    """Take the groups' hooks off their parents, before the members go."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Group):
                del hooks[key]


def _same_layout(members: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The members whose layers can share a launch, in sets of at least two."""
    sets: dict[Any, dict[str, Any]] = {}
    for name, member in members.items():
        if member is not None and member.group is None and (layout := member.layout()):
            sets.setdefault(layout, {})[name] = member
    return [found for found in sets.values() if len(found) > 1]
