"""explain: which strategy each layer gets, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import arguments
from ..layers.chosen import chosen
from ..strategies.choose import Choice, choose
from ..strategies.problem import Problem
from ..strategies.table import STRATEGIES
from .inject import fused_layers
from .packs import chosen_of_pack, packed_layers
from .peft import fused_peft_layers, unfused_peft_layers
from .report import TYPICAL_TOKENS, SkippedRow, by_reason


@dataclass(frozen=True)
class Explanation:
    """Name, problem and choice of each layer that runs fused, and the layers that run unfused.

    Printed, layers with the same answer share a line.
    """

    rows: tuple[tuple[str, Problem, Choice], ...]
    unfused: tuple[SkippedRow, ...] = ()

    def __str__(self) -> str:
        names: dict[tuple[Problem, Choice], list[str]] = {}
        for name, problem, choice in self.rows:
            names.setdefault((problem, choice), []).append(name)
        lines = []
        for (problem, choice), same in names.items():
            more = f" and {len(same) - 1} more" if len(same) > 1 else ""
            lines.append(f"{same[0]}{more}")
            lines.append(f"    {problem}")
            lines.append(f"    {choice.strategy}: {choice.reason}")
            for kernel in STRATEGIES[choice.strategy].kernels(problem):
                m, n, k, warps, stages = getattr(choice.tiles, kernel)
                tile = "x".join(str(size) for size in (m, n, k) if size)
                lines.append(f"      {kernel:<19} {tile} tiles, {warps} warps, {stages} stages")
        if self.unfused:
            lines.append(f"unfused {len(self.unfused)} layers")
            lines += by_reason((row.name, row.reason) for row in self.unfused)
        return "\n".join(lines)


def explain(
    model_or_problem: nn.Module | Problem,
    *,
    tokens: int = TYPICAL_TOKENS,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """The strategy of a `Problem`, or of every LoRA layer of a model for batches of `tokens`
    tokens.

    `dtype` is that of the activations (default: the weight's; give the one of autocast). A model
    may be one that `add_lora`, `add_loras` or `fuse_peft` changed, or a single FusedLoRALinear. For
    several adapters `tokens` counts those of all, and the reason says how they run together.
    `unfused` names the layers that now run PEFT's own forward, or did in their last call, and why.
    Raises ValueError for a model without LoRA layers, or `tokens` that is no integer of at least 0.

    >>> print(explain(model, tokens=16 * 128))
    """
    arguments.integer("tokens", tokens, least=0)
    if dtype is not None:
        arguments.floating("dtype", dtype)
    if isinstance(model_or_problem, Problem):
        return Explanation((("problem", model_or_problem, choose(model_or_problem)),))
    arguments.module("model_or_problem", model_or_problem)
    rows = [
        (name or type(layer).__name__, *chosen(layer, tokens, dtype))
        for name, layer in fused_layers(model_or_problem).items()
    ]
    rows += [
        (name or type(layer).__name__, *chosen_of_pack(layer, tokens, dtype))
        for name, layer in packed_layers(model_or_problem).items()
    ]
    rows += fused_peft_layers(model_or_problem, tokens, dtype)
    unfused = unfused_peft_layers(model_or_problem)
    if not rows and not unfused:
        raise ValueError(
            f"{type(model_or_problem).__name__} has no LoRA layers: call add_lora, add_loras or "
            "fuse_peft"
        )
    return Explanation(tuple(rows), tuple(unfused))
