"""LoRA whose ranks move, during training, to the layers where they matter: AdaLoRA's rule.

Each layer starts with R components, row i of lora_A and column i of lora_B. A component counts as

    importance = mean |A_i dL/dA_i| + mean |B_i dL/dB_i|
    score      = I U,    I = smoothed importance,    U = smoothed |importance - I|

over the steps. Every few steps the components of all layers are ranked by score, and those beyond
the budget get a zero column in lora_B. They may grow again until the last choice, after which they
stay zero. AdaLoRA smooths each element, and we each component, so a layer needs 2 R numbers more.

lora_A and lora_B keep their shapes, so the kernels run on the same padded tiles with the same
compiled code. `save_shrunk` then drops what is zero, and PEFT reads the ranks as `rank_pattern`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_kernels import FusedLoRALinear, save_adapter
from lora_kernels.injection.inject import fused_layers

from ..arguments import Arguments

SMOOTHING = 0.85  # AdaLoRA's, of I and of U


class AdaptiveRanks(TrainerCallback):
    """Chooses the components that stay, from R in each layer down to `arguments.rank` on average.

    The budget falls with the cube of the time left, from `adapt_from` to `adapt_until` as shares of
    the steps, as in AdaLoRA.
    """

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        self.layers = fused_layers(model)
        self.arguments = arguments
        ranks = {path: layer.rank for path, layer in self.layers.items()}
        device = next(model.parameters()).device
        self.mean = {path: torch.zeros(R, device=device) for path, R in ranks.items()}
        self.spread = {path: torch.zeros(R, device=device) for path, R in ranks.items()}
        self.kept = {path: torch.ones(R, dtype=torch.bool) for path, R in ranks.items()}

    def budget(self, step: int, steps: int) -> int:
        """How many components of all layers may stay after `step` of `steps`."""
        first, last = (
            share * steps for share in (self.arguments.adapt_from, self.arguments.adapt_until)
        )
        start = sum(layer.rank for layer in self.layers.values())
        end = self.arguments.rank * len(self.layers)
        if step >= last:
            return end
        left = min(1.0, (last - step) / (last - first))
        return end + math.ceil((start - end) * left**3)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Smooth the importance; choose where it is time; hold at zero what has gone for good."""
        step, steps = state.global_step + 1, state.max_steps
        for path, layer in self.layers.items():
            mean, spread = (
                known[path].to(layer.lora_A.device) for known in (self.mean, self.spread)
            )
            found = importance(layer)
            mean = SMOOTHING * mean + (1 - SMOOTHING) * found
            spread = SMOOTHING * spread + (1 - SMOOTHING) * (found - mean).abs()
            self.mean[path], self.spread[path] = mean, spread
        final = math.ceil(self.arguments.adapt_until * steps)
        if step == final or (step < final and step % self.arguments.adapt_every == 0):
            self.choose(self.budget(step, steps))
            self.clear()
        elif step > final:
            self.clear()

    def choose(self, budget: int) -> None:
        """Keep the `budget` components with the highest scores."""
        scores = torch.cat([self.mean[path] * self.spread[path] for path in self.layers]).cpu()
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = True
        parts = kept.split([layer.rank for layer in self.layers.values()])
        self.kept = dict(zip(self.layers, parts, strict=True))

    @torch.no_grad()
    def clear(self) -> None:
        """Set the columns of lora_B to zero whose components are not kept."""
        for path, layer in self.layers.items():
            layer.lora_B.mul_(self.kept[path].to(layer.lora_B))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        tables = {"mean": self.mean, "spread": self.spread, "kept": self.kept}
        return {
            name: {path: values.tolist() for path, values in table.items()}
            for name, table in tables.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, table in state.items():
            setattr(self, name, {path: torch.tensor(values) for path, values in table.items()})


def importance(layer: FusedLoRALinear) -> Tensor:
    """The importance of each component [R], from the parameters and gradients of this step.

    The LoRAs of a layer with `columns` share their components: one mean over all of them. Where a
    gradient has overflowed, which fp16 does at times, a component counts as nothing.
    """
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    dA, dB = layer.lora_A.grad, layer.lora_B.grad
    if dA is None or dB is None:
        return torch.zeros(layer.rank, device=A.device)
    rows = (A * dA).abs().view(-1, layer.rank, layer.in_features).mean(dim=(0, 2))
    return torch.nan_to_num(rows + (B * dB).abs().mean(dim=0), nan=0.0, posinf=0.0)


def kept_components(layer: FusedLoRALinear) -> Tensor:
    """Which components [R] of a layer are not zero."""
    return (layer.lora_B != 0).any(dim=0)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Path -> the rank that is left of each layer."""
    return {path: int(kept_components(layer).sum()) for path, layer in fused_layers(model).items()}


@torch.no_grad()
def save_shrunk(model: nn.Module, directory: Path) -> None:
    """Write the adapter with the rank that is left of each layer; the layers shrink to that.

    A layer of which nothing is left keeps one component of zeros, since no format knows rank 0.
    """
    for layer in fused_layers(model).values():
        kept = kept_components(layer)
        kept[0] |= not kept.any()
        rank, blocks = int(kept.sum()), len(layer.lora_A) // layer.rank
        rows = layer.lora_A.view(blocks, layer.rank, -1)[:, kept].flatten(0, 1)
        layer.lora_A = nn.Parameter(rows.contiguous())
        layer.lora_B = nn.Parameter(layer.lora_B[:, kept].contiguous())
        layer.alpha *= (rank / layer.rank) ** (0.5 if layer.rslora else 1.0)  # the scale stays
        layer.rank, layer.group = rank, None
    save_adapter(model, directory)
