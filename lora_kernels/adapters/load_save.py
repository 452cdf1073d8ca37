"""Save and load adapters: PEFT's directory format (both ways) and loralib files (read).

A PEFT directory holds `adapter_config.json` and `adapter_model.safetensors` with the keys
`base_model.model.<path>.lora_A.weight`; modules trained in full stand beside them under their own
path.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..algebra.columns import fold
from ..injection.inject import describe, fused_layers, inject, refuse_injected, unwrapped
from ..injection.report import Report
from ..injection.targets import find_train
from ..layers.config import LoRAConfig
from ..layers.linear import FusedLoRALinear
from .files import Adapter, LayerValues, write_files
from .fit import check_fit
from .loralib_format import read_loralib
from .peft_format import (
    CONFIG_NAME,
    PICKLE_NAME,
    PREFIX,
    WEIGHTS_NAME,
    columns_metadata,
    peft_config,
    read_peft,
    trained_by_peft,
)


def save_adapter(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the LoRA values and the modules trained in full to a directory that PEFT loads.

    Values keep their dtype. The files are written aside, synced and renamed, so an adapter that was
    there before is replaced as a whole or stays. A merged model saves the same values as an
    unmerged one.

    Raises:
        ValueError: the model has no LoRA layer, or no PEFT configuration names exactly its layers.

    Example:
        >>> save_adapter(model, "runs/sst2/adapter")
        >>> peft.PeftModel.from_pretrained(base_model, "runs/sst2/adapter")
    """
    model = unwrapped(model)
    layers = fused_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer to save")
    config = peft_config(model, layers, _trained(model))
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_A, lora_B = layer.unfolded()
        state[f"{PREFIX}{name}.lora_A.weight"] = lora_A
        state[f"{PREFIX}{name}.lora_B.weight"] = lora_B
    for name in trained_by_peft(model, config["modules_to_save"] or ()):
        module = model.get_submodule(name)
        state |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    _warn_of_what_stays_behind(model, layers, state)
    # Copies, because one tensor under two names (tied weights) cannot be written.
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()
    }
    metadata = {"format": "pt", **columns_metadata(layers)}
    content = safetensors.torch.save(tensors, metadata=metadata)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_files(Path(path), {CONFIG_NAME: text.encode(), WEIGHTS_NAME: content})


def _warn_of_what_stays_behind(
    model: nn.Module, layers: dict[str, FusedLoRALinear], state: dict[str, Tensor]
) -> None:
    """Parameters that train, and that neither LoRA nor the configuration's `train` saves."""
    lora = {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in lora and f"{PREFIX}{name}" not in state
    ]
    if left:
        named = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
        warnings.warn(
            f"{len(left)} trained parameters are not in the adapter, since LoRAConfig's `train` "
            f"does not name their modules: {named}",
            stacklevel=3,
        )


def load_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    alpha: float | None = None,
    enable_lora: tuple[bool, ...] | None = None,
    strategy: str = "auto",
) -> Report:
    """Load an adapter, in place: a PEFT directory, or a loralib file (.pt, .bin, .safetensors).

    A plain model gets LoRA layers first, as the file says; a model that has them gets values only.
    Everything is checked before anything is changed. Loaded parameters train; call
    `model.requires_grad_(False)` to freeze them. A loralib file does not say its `alpha`: pass it
    for a plain model. Its `MergedLinear` (query, key and value in one weight) becomes LoRA on
    columns of that weight; where only some segments have LoRA, pass `enable_lora` as in loralib.
    Pickles are read with weights_only=True.

    Raises:
        FileNotFoundError: nothing at `path`, or a file of the directory is missing.
        ValueError: names, shapes, ranks or alphas do not fit the model, or the file holds something
            that plain LoRA layers cannot represent (DoRA, a trained bias, ...), each named with its
            value.

    Example:
        >>> load_adapter(model, "runs/sst2/adapter")
        >>> load_adapter(gpt2, "loralib.pt", alpha=32, enable_lora=(True, False, True))
    """
    model = unwrapped(model)
    adapter = _read(Path(path), model, alpha, enable_lora)
    injected = fused_layers(model)
    if not injected:
        refuse_injected(model)
        if any(values.alpha is None for values in adapter.layers.values()):
            raise ValueError(
                f"{adapter.source} is a loralib file, which does not say alpha: pass alpha="
            )
    train = _trained(model) if injected else list(adapter.train)
    check_fit(model, adapter, train)
    if not injected:
        ranks = {name: _rank(values, adapter.rslora) for name, values in adapter.layers.items()}
        columns = {name: values.columns for name, values in adapter.layers.items()}
        rank, common_alpha = Counter(ranks.values()).most_common(1)[0][0]
        config = LoRAConfig(
            rank=rank,
            alpha=common_alpha,
            dropout=adapter.dropout,
            rslora=adapter.rslora,
            targets=tuple(ranks),
            train=adapter.train,
            strategy=strategy,
        )
        inject(model, config, ranks, columns=columns)
    state = model.state_dict()
    with torch.no_grad():
        for name, layer in fused_layers(model).items():
            lora_A, lora_B = adapter.layers[name].lora_A, adapter.layers[name].lora_B
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(fold(lora_B, layer.columns) if layer.columns else lora_B)
        for key, value in adapter.others.items():
            state[key].copy_(value)
    return describe(model)


def _rank(values: LayerValues, rslora: bool) -> tuple[int, float]:
    """(rank, alpha) of the layer that these values make, at the scale of the file."""
    rank, alpha = values.lora_A.shape[0], values.alpha or 0.0
    if values.columns is None:
        return rank, alpha
    ranges = len(values.columns)
    return rank // ranges, alpha / (math.sqrt(ranges) if rslora else ranges)


def _read(
    path: Path, model: nn.Module, alpha: float | None, enable_lora: tuple[bool, ...] | None
) -> Adapter:
    """The adapter at `path`: a PEFT directory, or a loralib file. Raises as `load_adapter` does."""
    if (
        path.is_file()
        and path.name in (WEIGHTS_NAME, PICKLE_NAME)
        and (path.parent / CONFIG_NAME).exists()
    ):
        path = path.parent
    if path.is_file():
        return read_loralib(path, model, alpha, enable_lora)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no adapter at {path}: not a file or directory (hub names are not resolved)"
        )
    if alpha is not None or enable_lora is not None:
        raise ValueError(f"alpha and enable_lora are for loralib files; {path} says them itself")
    return read_peft(path, model)


def _trained(model: nn.Module) -> list[str]:
    """Paths of the modules trained in full, and of those that share a parameter with them."""
    config = getattr(model, "lora_config", None)
    paths = list(find_train(model, config.train)) if config else []
    parameters = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
    within = {id(m) for path in paths for m in model.get_submodule(path).modules()}
    for path, module in model.named_modules():
        if id(module) not in within and parameters & {
            id(p) for p in module.parameters(recurse=False)
        }:
            paths.append(path)
    return paths
