"""Layers that read the same x run as one problem: query, key and value; gate and up.

The model stays as it is: every projection keeps its name, its parameters and its own `forward`.
What happens is that the first sibling called with an x computes all of them and holds the others'
results until they are called with that very x. So x is read once, three launches become one, and
backward sums dx in one accumulator. Nothing is assumed of the caller: a sibling called with another
x is computed alone, and a group whose results are not fetched three times running dissolves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .functional import lora_linears
from .modules import FusedLoRALinear

# Attribute names under one parent that read the same tensor, in the order of their dropout masks.
SIBLINGS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)
# Attention over another sequence: its query reads one tensor, its key and value another. (DeBERTa
# is not here at all: its query and key also project the table of relative positions.)
_CROSS = ("crossattention", "encoder_attn", "EncDecAttention", "cross_attn", "encoder_decoder")
_PATIENCE = 3


class Group:
    """Two or more FusedLoRALinear of one layout, rank, scale and dropout that read the same x."""

    def __init__(self, members: tuple[FusedLoRALinear, ...]) -> None:
        self.members = members
        self.misses = 0
        self._x: Tensor | None = None
        self._call: Any = None
        self._waiting: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "misses": 0, "_x": None, "_call": None, "_waiting": {}}

    def output(self, layer: FusedLoRALinear, x: Tensor) -> Tensor | None:
        """y of one member; None if it must be computed alone."""
        compiling = torch.compiler.is_compiling()
        if self.misses >= _PATIENCE or (not compiling and x.is_inference()):
            return None  # a change of an inference tensor cannot be seen
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        call = (
            0 if compiling else x._version,  # which no graph can compare
            torch.is_grad_enabled(),
            torch.get_autocast_dtype(device) if autocast else None,
            layer.training,
        )
        key = id(layer)
        if self._x is x and self._call == call and key in self._waiting:
            y = self._waiting.pop(key)
            if not self._waiting:
                self._x, self.misses = None, 0
            return y
        if self._waiting:  # someone did not come for theirs
            self.misses += 1
            self._x, self._waiting = None, {}
            if self.misses >= _PATIENCE:
                return None
        if any(m.merged or m.training != layer.training for m in self.members):
            return None
        first = self.members[0]
        ys = lora_linears(
            x,
            tuple(m.weight_as(x) for m in self.members),
            tuple(m.lora_A for m in self.members),
            tuple(m.lora_B for m in self.members),
            tuple(m.bias for m in self.members if m.bias is not None),
            scale=first.scale, dropout=first.dropout, training=layer.training,
            strategy=first.strategy,
        )  # fmt: skip
        self._waiting = {id(m): each for m, each in zip(self.members, ys, strict=True)}
        self._x, self._call = x, call
        return self._waiting.pop(key)


def group_siblings(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Let the siblings of a model run together; returns the paths of each group."""
    groups = []
    for path, parent in model.named_modules():
        if any(name in path.split(".") for name in _CROSS):
            continue
        children = parent._modules
        for names in SIBLINGS:
            for found in _alike(names, children):
                group = Group(tuple(children[name] for name in found))  # type: ignore[misc]
                for member in group.members:
                    member.group = group
                groups.append(tuple(f"{path}.{name}" if path else name for name in found))
    return tuple(groups)


def _alike(names: tuple[str, ...], children: Mapping[str, nn.Module | None]) -> list[list[str]]:
    """The names among `children` whose layers can share a launch, in sets of at least two."""
    sets: dict[Any, list[str]] = {}
    for name in names:
        layer = children.get(name)
        if isinstance(layer, FusedLoRALinear) and layer.group is None and not layer.columns:
            weight = layer.weight
            key = (
                layer.in_features, layer.rank, layer.scale, layer.dropout, layer.strategy,
                layer.conv1d, layer.bias is None, weight.dtype, weight.device,
                weight.stride(), layer.lora_A.dtype, layer.lora_B.dtype,
            )  # fmt: skip
            sets.setdefault(key, []).append(name)
    return [found for found in sets.values() if len(found) > 1]
