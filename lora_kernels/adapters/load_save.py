"""Save and load adapters: PEFT's directory format (both ways) and loralib files (read)."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import arguments
from ..injection.inject import describe, fused_layers, inject, refuse_injected, trained_paths
from ..injection.kept import kept_keys
from ..injection.methods import METHODS
from ..injection.report import Report
from ..injection.targets import inside, name_matches
from ..injection.wrappers import bare, is_sharded, refuse_sharded
from ..layers.config import LoRAConfig
from ..layers.linear import FusedLoRALinear
from ..strategies.table import check_strategy
from .checkpoint_format import checkpoint_files, read_checkpoint
from .files import Adapter, read_tensors, write_files
from .fit import check_fit
from .gather import State
from .loralib_format import read_loralib
from .peft_format import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    peft_config,
    peft_tensors,
    read_peft,
)

TRAINER_NAME = "model.safetensors"  # transformers' name


def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA values and the modules trained in full to a directory that PEFT loads.

    Values keep their dtype. An adapter that was there before is replaced as a whole, or stays. A
    merged model saves the same values as an unmerged one. Paths are those of the model without
    wrappers (torch.compile, checkpointing, FSDP, DDP). The adapter also holds frozen values that
    the base model lacks: running statistics, and weights drawn at random.

    A sharded model (FSDP, tensor parallelism) is gathered: all its processes call this, and the
    first one writes. `state_dict` are tensors that the caller has gathered, in their place.

    Raises ValueError for a model without a LoRA layer, or one whose tensors are not whole.

    >>> save_adapter(model, "runs/sst2/adapter")
    >>> peft.PeftModel.from_pretrained(base_model, "runs/sst2/adapter")
    """
    _save(model, path, state_dict, for_trainer=False)


def save_pretrained(
    model: nn.Module,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """`model.save_pretrained` of a transformers model with LoRA: what `save_adapter` writes.

    Beside it lies `model.safetensors`, which holds the same values under the names of the model's
    own parameters, and nothing frozen. A Trainer that resumes, or loads the best model, reads that
    file. `push_to_hub` takes `repo_id` and the other options of the model's `push_to_hub`. Options
    for files of a whole model, such as `max_shard_size`, have no effect.

    `type(model).save_pretrained(model, path)` writes the whole model, as before.
    """
    if is_main_process or is_sharded(model):
        _save(model, save_directory, state_dict, for_trainer=True)
    if push_to_hub and is_main_process:
        repository = options.pop("repo_id", Path(save_directory).name)
        known = ("commit_message", "private", "token", "revision", "create_pr")
        uploading = {name: options[name] for name in known if name in options}
        model.push_to_hub(repository, **uploading)  # type: ignore[operator]


METHODS["save_pretrained"] = save_pretrained


def _save(
    model: nn.Module,
    path: str | PathLike[str],
    state_dict: Mapping[str, Tensor] | None,
    *,
    for_trainer: bool,
) -> None:
    arguments.module("model", model)
    path = arguments.path("path", path)
    if state_dict is not None:
        arguments.mapping("state_dict", state_dict)
    with bare(model) as inner:
        layers = fused_layers(inner)
        if not layers:
            raise ValueError(f"{type(inner).__name__} has no LoRA layer to save")
        train = trained_paths(inner)
        config = peft_config(inner, layers, train)
        kept = kept_keys(inner, train)
        _warn_of_what_stays_behind(inner, layers, train, kept)
    wanted = {f"{name}.{part}" for name, layer in layers.items() for part in layer.adapter_names}
    wanted |= {*kept}
    starts = [name for name, layer in layers.items() if layer.taken is not None]
    wanted |= {f"{name}.{part}" for name in starts for part in ("start_A", "start_B")}
    if for_trainer:  # a start may be random: resuming needs what it left of the weight
        wanted |= {f"{name}.weight" for name in starts}
    state = State(model, state_dict, lambda key: key in wanted or inside(key, train) is not None)
    nameless = config["modules_to_save"] is None
    own = sorted(wanted) if for_trainer else []
    own += [key for name in train for key in state.keys(name) if for_trainer]
    state.on_first(partial(_write, path, config, own, state, layers, train, kept, nameless))


def _write(path: Path, config: dict[str, Any], own: list[str], state: State, *rest: Any) -> None:
    """Write the files; `own` are the keys of what a Trainer needs to go on, if it shall."""
    tensors, metadata = peft_tensors(state, *rest)
    if wrong := [key for key, value in tensors.items() if not bool(value.isfinite().all())]:
        warnings.warn(
            f"{len(wrong)} tensors hold values that are not finite, which load_adapter will "
            f"refuse: {wrong[0]}",
            stacklevel=4,
        )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    content = safetensors.torch.save(tensors, metadata)
    files = {CONFIG_NAME: text.encode(), WEIGHTS_NAME: content}
    if own:
        values = {key: state[key] for key in own}
        files[TRAINER_NAME] = safetensors.torch.save(values, {"format": "pt"})
    write_files(path, files)


def _warn_of_what_stays_behind(
    model: nn.Module, layers: dict[str, FusedLoRALinear], train: list[str], kept: list[str]
) -> None:
    """Name the parameters that train, but are neither LoRA's nor in a module of `train`."""
    lora = {f"{name}.{part}" for name, layer in layers.items() for part in layer.adapter_names}
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in lora and name not in kept
        if not inside(name, train)
    ]
    if left:
        named = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
        warnings.warn(
            f"{len(left)} trained parameters are not in the adapter, since LoRAConfig's `train` "
            f"does not name their modules: {named}",
            stacklevel=4,
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
    layers gets values only. What the adapter trained trains; `model.requires_grad_(False)` freezes
    it. Pickles are read with weights_only=True.

    A checkpoint of a whole model with LoRA (`save_pretrained`, the Trainer) gives its LoRA and what
    was trained with it; `from_pretrained` on its directory gives the rest.

    A loralib file does not say its `alpha`: pass it for a plain model. Its `MergedLinear` (query,
    key and value in one weight) becomes LoRA on columns of that weight. Where only some of these
    have LoRA, pass `enable_lora` as in loralib.

    Raises FileNotFoundError where there is no adapter, or a file of it is missing. Raises
    ValueError, before anything is changed, with all names, shapes, ranks and alphas that do not fit
    the model, or with the values in the file that LoRA layers cannot represent (trained biases of
    the base model, other variants).

    >>> load_adapter(model, "runs/sst2/adapter")
    >>> load_adapter(gpt2, "loralib.pt", alpha=32, enable_lora=(True, False, True))
    """
    arguments.module("model", model)
    path = arguments.path("path", path)
    if alpha is not None:
        arguments.finite("alpha", alpha)
    if enable_lora is not None:
        enable_lora = arguments.flags("enable_lora", enable_lora)
    check_strategy(strategy)
    refuse_sharded(model, "load the adapter before it is sharded")
    with bare(model) as model:
        adapter = read_adapter(path, model, alpha, enable_lora)
        plain = not fused_layers(model)
        if plain:
            refuse_injected(model)
        check_fit(model, adapter, adapter.train if plain else trained_paths(model))
        if plain:
            _inject(model, adapter, strategy)
        _copy(model, adapter)
        if old := [k for k in kept_keys(model, adapter.train) if k not in adapter.others]:
            owners = ", ".join(dict.fromkeys(key.rpartition(".")[0] for key in old))
            warnings.warn(
                f"{adapter.source} holds no values of {owners}: the model's own stay, though they "
                "are not the base's or moved while training",
                stacklevel=2,
            )
        return describe(model)


def _inject(model: nn.Module, adapter: Adapter, strategy: str) -> None:
    """Put LoRA layers into a plain model, each of the rank, alpha and columns that the file has."""
    columns = {path: values.columns for path, values in adapter.layers.items()}
    inject(model, config_of(model, adapter, strategy), ranks_of(adapter), columns=columns)


def ranks_of(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Path -> rank and alpha; ValueError where the file does not say alpha."""
    ranks = {}
    for path, values in adapter.layers.items():
        if values.alpha is None:
            raise ValueError(
                f"{adapter.source} is a loralib file, which does not say alpha: pass alpha="
            )
        ranks[path] = values.rank, values.alpha
    return ranks


def config_of(model: nn.Module, adapter: Adapter, strategy: str = "auto") -> LoRAConfig:
    """The configuration that makes such an adapter."""
    ranks = ranks_of(adapter)
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0]
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        targets=tuple(ranks),
        train=tuple(_exactly(model, path) for path in adapter.train),
        strategy=strategy,
        dora=any(values.magnitude is not None for values in adapter.layers.values()),
        lora_bias=any(values.bias is not None for values in adapter.layers.values()),
    )


def _exactly(model: nn.Module, path: str) -> str:
    """A name for `train` that means the module at `path` alone."""
    means = [other for other, _ in model.named_modules() if name_matches(path, other)]
    return path if means == [path] else "re:" + re.escape(path)


@torch.no_grad()
def _copy(model: nn.Module, adapter: Adapter) -> None:
    """Take over all values of an adapter that fits."""
    for path, layer in fused_layers(model).items():
        for name, value in adapter.layers[path].named().items():
            getattr(layer, name).copy_(value)
    state = model.state_dict()
    for key, value in adapter.others.items():
        state[key].copy_(value)
    kept = (*getattr(model, "lora_kept", ()), *(k for k in adapter.kept if k in adapter.others))
    model.lora_kept = tuple(dict.fromkeys(kept))  # type: ignore[assignment]


def read_adapter(
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
    files = checkpoint_files(path)
    if files and not (path / CONFIG_NAME).exists():
        tensors = {k: v for file in files for k, v in read_tensors(file, model).items()}
        return read_checkpoint(path, tensors, model)
    return read_peft(path, model)
