"""Whether an adapter fits a model: all that does not, in one error, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from ..algebra.columns import check_columns, fold
from ..injection.inject import fused_layers
from ..injection.targets import near_misses, why_not
from ..layers.base import features_of
from ..layers.linear import FusedLoRALinear
from .files import Adapter


def check_fit(model: nn.Module, adapter: Adapter, train: Iterable[str]) -> None:
    """ValueError with all that does not fit between an adapter and a model."""
    injected = fused_layers(model)
    modules = dict(model.named_modules())
    problems: list[str] = []
    for path, values in adapter.layers.items():
        if path not in modules:
            problems.append(f"{path} does not exist{near_misses(path, modules)}")
            continue
        if injected and path not in injected:
            problems.append(f"{path} is no LoRA layer of this model")
            continue
        if not injected and (reason := why_not(model, path)):
            problems.append(f"{path} cannot be replaced: {reason}")
            continue
        layer = modules[path]
        K, N = features_of(layer)
        fused = isinstance(layer, FusedLoRALinear)
        rank = len(layer.lora_A if fused else values.lora_A)
        for name, found, wanted in (
            ("lora_A", list(values.lora_A.shape), [rank, K]),
            ("lora_B", list(values.lora_B.shape), [N, rank]),
        ):
            if found != wanted:
                problems.append(f"{path}.{name} is {found} in the file and {wanted} in the model")
        columns = layer.columns if isinstance(layer, FusedLoRALinear) else values.columns
        if columns and not problems:
            try:
                check_columns(columns, N)
                fold(values.lora_B, columns)
            except ValueError as error:
                problems.append(f"{path}: {error}")
        if isinstance(layer, FusedLoRALinear):
            if layer.merged:
                problems.append(f"{path} is merged: unmerge it first")
            problems += _alpha_problem(path, layer, values.alpha, adapter.rslora)
    problems += [
        f"{path} has no values in the file" for path in injected if path not in adapter.layers
    ]
    state = model.state_dict()
    wanted_keys = [key for path in train for key in state if key.startswith(path + ".")]
    problems += [
        f"{key} has no value in the file" for key in wanted_keys if key not in adapter.others
    ]
    for key, value in adapter.others.items():
        if key not in wanted_keys:
            problems.append(
                f"{key} is in the file, but the model does not train it (train={sorted(train)})"
            )
        elif value.shape != state[key].shape:
            problems.append(
                f"{key} is {list(value.shape)} in the file and {list(state[key].shape)} here"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{adapter.source} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        )


def _alpha_problem(
    path: str, layer: FusedLoRALinear, alpha: float | None, rslora: bool
) -> list[str]:
    """The file's scale must be the layer's: the same values would mean another update."""
    if alpha is None:
        return []
    rank = len(layer.lora_A)  # of the file, where columns are unfolded
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    if math.isclose(scale, layer.scale, rel_tol=1e-6):
        return []
    theirs, ours = f"alpha={alpha}, rslora={rslora}", f"alpha={layer.alpha}, rslora={layer.rslora}"
    return [f"{path} has {theirs} in the file and {ours} in the model"]
