"""Save and load adapters: PEFT's directory format (both ways) and loralib files (read)."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Set
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ..injection.inject import describe, fused_layers, inject, refuse_injected, unwrapped
from ..injection.report import Report
from ..injection.targets import find_train
from ..layers.config import LoRAConfig
from ..layers.linear import FusedLoRALinear
from .files import Adapter, write_files
from .fit import check_fit
from .loralib_format import read_loralib
from .peft_format import (
    CONFIG_NAME,
    PICKLE_NAME,
    PREFIX,
    WEIGHTS_NAME,
    peft_config,
    peft_tensors,
    read_peft,
)


def save_adapter(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the LoRA values and the modules trained in full to a directory that PEFT loads.

    Values keep their dtype. An adapter that was there before is replaced as a whole, or stays. A
    merged model saves the same values as an unmerged one. Raises ValueError for a model without a
    LoRA layer, or one whose layers no PEFT configuration names exactly.

    >>> save_adapter(model, "runs/sst2/adapter")
    >>> peft.PeftModel.from_pretrained(base_model, "runs/sst2/adapter")
    """
    model = unwrapped(model)
    layers = fused_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer to save")
    config = peft_config(model, layers, _trained(model))
    tensors, metadata = peft_tensors(model, layers, config["modules_to_save"] or ())
    _warn_of_what_stays_behind(model, layers, tensors.keys())
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    content = safetensors.torch.save(tensors, metadata)
    write_files(Path(path), {CONFIG_NAME: text.encode(), WEIGHTS_NAME: content})


def _warn_of_what_stays_behind(
    model: nn.Module, layers: dict[str, FusedLoRALinear], saved: Set[str]
) -> None:
    """Name the parameters that train, but are neither LoRA's nor in a module of `train`."""
    lora = {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in lora and f"{PREFIX}{name}" not in saved
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

    A plain model gets LoRA layers first, of the file's ranks and columns. A model that has LoRA
    layers gets values only. Loaded parameters train; `model.requires_grad_(False)` freezes them.
    Pickles are read with weights_only=True.

    A loralib file does not say its `alpha`: pass it for a plain model. Its `MergedLinear` (query,
    key and value in one weight) becomes LoRA on columns of that weight. Where only some of these
    have LoRA, pass `enable_lora` as in loralib.

    Raises FileNotFoundError where there is no adapter, or a file of it is missing. Raises
    ValueError, before anything is changed, with all names, shapes, ranks and alphas that do not fit
    the model, or with the values in the file that plain LoRA layers cannot represent (DoRA, a
    trained bias).

    >>> load_adapter(model, "runs/sst2/adapter")
    >>> load_adapter(gpt2, "loralib.pt", alpha=32, enable_lora=(True, False, True))
    """
    model = unwrapped(model)
    adapter = _read(Path(path), model, alpha, enable_lora)
    plain = not fused_layers(model)
    if plain:
        refuse_injected(model)
    check_fit(model, adapter, adapter.train if plain else _trained(model))
    if plain:
        _inject(model, adapter, strategy)
    _copy(model, adapter)
    return describe(model)


def _inject(model: nn.Module, adapter: Adapter, strategy: str) -> None:
    """Put LoRA layers into a plain model, each of the rank, alpha and columns that the file has."""
    ranks = {}
    for path, values in adapter.layers.items():
        if values.alpha is None:
            raise ValueError(
                f"{adapter.source} is a loralib file, which does not say alpha: pass alpha="
            )
        ranks[path] = values.rank, values.alpha
    columns = {path: values.columns for path, values in adapter.layers.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0]
    config = LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        targets=tuple(ranks),
        train=adapter.train,
        strategy=strategy,
    )
    inject(model, config, ranks, columns=columns)


@torch.no_grad()
def _copy(model: nn.Module, adapter: Adapter) -> None:
    """Take over all values of an adapter that fits."""
    for path, layer in fused_layers(model).items():
        layer.lora_A.copy_(adapter.layers[path].lora_A)
        layer.lora_B.copy_(adapter.layers[path].lora_B)
    state = model.state_dict()
    for key, value in adapter.others.items():
        state[key].copy_(value)


def _read(
    path: Path, model: nn.Module, alpha: float | None, enable_lora: tuple[bool, ...] | None
) -> Adapter:
    """The adapter at `path`: a PEFT directory, or a loralib file. Raises as `load_adapter` does."""
    of_peft = path.name in (WEIGHTS_NAME, PICKLE_NAME) and (path.parent / CONFIG_NAME).exists()
    if path.is_file() and of_peft:
        path = path.parent
    if path.is_file():
        return read_loralib(path, model, alpha, enable_lora)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no adapter at {path}: not a file or directory (hub names are not resolved)"
        )
    if alpha is not None or enable_lora is not None:
        raise ValueError(f"alpha and enable_lora are for loralib files: {path} is PEFT's")
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
