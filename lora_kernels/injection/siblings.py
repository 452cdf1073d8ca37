"""Finding the layers of a model that read the same x, and letting each such set run as a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..layers.group import Group, layout_of
from ..layers.linear import FusedLoRALinear


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
        if member is not None and member.group is None and (layout := layout_of(member)):
            sets.setdefault(layout, {})[name] = member
    return [found for found in sets.values() if len(found) > 1]
