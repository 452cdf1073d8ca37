"""Whether an adapter fits a model: all that does not, in one error, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..algebra.columns import widths
from ..injection.inject import fused_layers
from ..injection.targets import inside, near_misses, why_not
from ..layers.base import features_of
from ..layers.linear import FusedLoRALinear
from .files import Adapter, LayerValues, under_all_names


def check_fit(model: nn.Module, adapter: Adapter, train: Iterable[str]) -> None:
    """Raise ValueError with all that does not fit between an adapter and a model.

    `train` names the modules that the model trains in full, whose values the adapter must hold.
    """
    train = list(train)
    misnamed = _names(model, adapter)
    problems = list(misnamed.values())
    for path, values in adapter.layers.items():
        if path in misnamed:
            continue
        layer = model.get_submodule(path)
        problems += _shapes(path, layer, values) or _columns(path, layer, values)
        problems += _lora_values(path, layer, values)
        if isinstance(layer, FusedLoRALinear):
            problems += _state(path, layer, values, adapter.rslora)
        if owner := inside(path, train):
            problems.append(f"{path} has LoRA in the file, and {owner} is trained in full")
    problems += _others(model, adapter, sorted(train)) or _ties(model, adapter.others)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{adapter.source} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        )


def _names(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Path -> problem, where the file's layers are not the model's, or cannot get LoRA."""
    injected = fused_layers(model)
    modules = {path: module for path, module in model.named_modules() if path}
    problems = {}
    for path in adapter.layers:
        if path not in modules:
            problems[path] = f"{path} does not exist{near_misses(path, modules)}"
        elif injected and path not in injected:
            problems[path] = f"{path} is no LoRA layer of this model"
        elif not injected and (reason := why_not(model, path)):
            problems[path] = f"{path} cannot be replaced: {reason}"
    missing = [path for path in injected if path not in adapter.layers]
    return problems | {path: f"{path} has no values in the file" for path in missing}


def _shapes(path: str, layer: nn.Module, values: LayerValues) -> list[str]:
    """Where lora_A is not [G R, K], or lora_B not [N, R] or, on columns, [sum of N_g, R]."""
    K, N = features_of(layer)
    fused = layer if isinstance(layer, FusedLoRALinear) else None
    ranks = values.blocks * values.rank if fused is None else len(fused.lora_A)
    width = N if values.columns is None else sum(widths(values.columns))
    wanted = {
        "lora_A": [ranks, K],
        "lora_B": [width, ranks // values.blocks],
        "lora_magnitude": [N],
        "lora_bias": [N],
    }
    problems = [
        f"{path}.{name} is {list(found.shape)} in the file and {wanted[name]} in the model"
        for name, found in values.named().items()
        if list(found.shape) != wanted[name]
    ]
    for name in () if fused is None else sorted({*fused.adapter_names} ^ {*values.named()}):
        where = "model" if name in fused.adapter_names else "file"  # type: ignore[union-attr]
        problems.append(f"{path}.{name} is in the {where} alone")
    return problems


def _columns(path: str, layer: nn.Module, values: LayerValues) -> list[str]:
    """Where LoRA is on other columns in the file than in the model."""
    if not isinstance(layer, FusedLoRALinear) or values.columns == layer.columns:
        return []
    if values.columns is None:  # a PEFT file, which `read_peft` could not fold to these columns
        return [f"{path}: lora_B is not zero outside the blocks of columns {layer.columns}"]
    here = layer.columns or "the whole layer"
    return [f"{path} has LoRA on columns {values.columns} in the file and on {here} in the model"]


def _state(path: str, layer: FusedLoRALinear, values: LayerValues, rslora: bool) -> list[str]:
    """Where values cannot be loaded into a layer, or would mean another update at its scale."""
    problems = [f"{path} is merged: unmerge it first"] if layer.merged else []
    if values.alpha is not None:
        rank = len(layer.lora_A) // values.blocks
        scale = values.alpha / (math.sqrt(rank) if rslora else rank)
        if not math.isclose(scale, layer.scale, rel_tol=1e-6):
            problems.append(
                f"{path} has alpha={values.alpha}, rslora={rslora} in the file and "
                f"alpha={layer.alpha}, rslora={layer.rslora} in the model"
            )
    return problems


def _lora_values(path: str, layer: nn.Module, values: LayerValues) -> list[str]:
    """Where lora_A or lora_B holds what the layer's cannot."""
    own: Tensor = layer.weight  # type: ignore[assignment]
    problems = []
    for name, value in values.named().items():
        dtype = torch.promote_types(own.dtype, torch.float32)
        if isinstance(layer, FusedLoRALinear) and name in layer.adapter_names:
            own = getattr(layer, name)
            dtype = own.dtype
        problems += _value(f"{path}.{name}", value, dtype, own.is_meta)
    return problems


def _value(key: str, value: Tensor, dtype: torch.dtype, is_meta: bool) -> list[str]:
    """Where a value cannot become one of `dtype`, or the model's own has no place for it."""
    if is_meta:
        return [f"{key} is on the meta device in the model"]
    if value.is_floating_point() != dtype.is_floating_point:
        return [f"{key} is {value.dtype} in the file and {dtype} in the model"]
    if not bool(value.to(dtype).isfinite().all()):
        return [f"{key} holds values that are not finite in {dtype}"]
    return []


def _others(model: nn.Module, adapter: Adapter, train: list[str]) -> list[str]:
    """Where the values besides LoRA are not those of the model's `train`, or kept ones."""
    state = model.state_dict()
    wanted = [key for path in train for key in state if key.startswith(path + ".")]
    problems = [f"{key} has no value in the file" for key in wanted if key not in adapter.others]
    expected = {*wanted, *adapter.kept}
    allowed = {key: value for key, value in state.items() if key in expected}
    allowed |= under_all_names(model, allowed)
    for key, value in adapter.others.items():
        if key not in allowed:
            problems.append(
                f"{key} is in the file, but the model does not train it (train={train})"
            )
        elif value.shape != state[key].shape:
            problems.append(
                f"{key} is {list(value.shape)} in the file and {list(state[key].shape)} here"
            )
        else:
            problems += _value(key, value, state[key].dtype, state[key].is_meta)
    return problems


def _ties(model: nn.Module, others: Mapping[str, Tensor]) -> list[str]:
    """Where the file has other values under the names of one weight than it can have here.

    PEFT trains copies of tied weights, so its file may part them.
    """
    keys: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
        tensors[id(parameter)] = parameter.detach()
    problems = []
    for identity, names in keys.items():
        if len(names) == 1 or not any(name in others for name in names):
            continue
        first, *rest = (others.get(name, tensors[identity]) for name in names)
        if not all(torch.equal(first.to(value), value) for value in rest):
            problems.append(
                f"{' and '.join(names)} are one weight here (tied), and differ by the file: give "
                "each a weight of its own first"
            )
    return problems
