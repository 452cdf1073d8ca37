"""PEFT's adapter directory, read and written by PEFT's own rules.

`adapter_config.json` is the `LoraConfig`. `adapter_model.safetensors` holds the tensors
`base_model.model.<path>.lora_A.weight` and `lora_B`, and modules trained in full under their own
path.

A layer with LoRA on G ranges of its columns is stacked in our model, lora_A [G R, K] and lora_B
[sum of N_g, R]. PEFT has no such layer, so the file holds it unfolded: as one LoRA of the whole
layer, of rank G R, whose lora_B [N, G R] is block-diagonal. Metadata of the safetensors file, which
PEFT does not read, say which columns to fold it to.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from ..algebra.columns import Ranges, check_columns, fold
from ..injection.targets import is_layer
from ..layers.base import features_of
from ..layers.linear import FusedLoRALinear
from .files import Adapter, LayerValues, read_tensors, split_lora
from .peft_names import by_pattern, exactly, names_for_peft, peft_matches, trained_by_peft

COLUMNS_KEY = "lora_kernels.columns"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

# Fields of PEFT's LoraConfig that `read_peft` follows.
FOLLOWED = {
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "use_rslora",
}  # fmt: skip
# Fields that change nothing in a saved adapter, whatever they hold. Any other field that is set,
# now or in a later PEFT, asks for more than plain LoRA and is refused.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
# Fields of which these values ask for plain LoRA on an unchanged base model, and no other.
PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def read_peft(directory: Path, model: nn.Module) -> Adapter:
    """The adapter of a PEFT directory; raises as `load_adapter` does."""
    config = _read_config(directory / CONFIG_NAME)
    weights = _weights_file(directory)
    tensors = {
        key.removeprefix(PREFIX).replace(".modules_to_save.", "."): value
        for key, value in read_tensors(weights).items()
    }
    pairs, others = split_lora(tensors, ".weight", directory)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    rslora = bool(config.get("use_rslora", False))
    columns = _read_columns(weights)
    linear = {name: module for name, module in model.named_modules() if name and is_layer(module)}
    layers: dict[str, LayerValues] = {}
    for path, (lora_A, lora_B) in pairs.items():
        wanted = by_pattern(config.get("rank_pattern"), path, rank)
        if len(lora_A) != wanted:
            raise ValueError(
                f"{directory}: {path}.lora_A is {list(lora_A.shape)}, but "
                f"{CONFIG_NAME} gives rank {wanted}"
            )
        values = LayerValues(lora_A, lora_B, by_pattern(config.get("alpha_pattern"), path, alpha))
        try:
            layers[path] = _folded(values, linear.get(path), columns.get(path), rslora)
        except ValueError as error:
            raise ValueError(f"{directory}: {path}: {error}") from None
    _check_targets(directory, config, layers.keys(), linear.keys())
    train = trained_by_peft(model, config.get("modules_to_save") or ())
    return Adapter(directory, layers, others, tuple(train), config.get("lora_dropout", 0.0), rslora)


def _folded(
    values: LayerValues, layer: nn.Module | None, columns: Ranges | None, rslora: bool
) -> LayerValues:
    """The values stacked, at the same scale, if the model's `layer` has LoRA on columns.

    Where `layer` has no LoRA yet, the file's `columns` decide; ValueError if the values contradict
    them. What does not fit `layer` stays as it is in the file, and `check_fit` reports it.
    """
    columns = layer.columns if isinstance(layer, FusedLoRALinear) else columns
    if layer is None or columns is None or features_of(layer)[1] != len(values.lora_B):
        return values
    try:
        check_columns(columns, len(values.lora_B))
        lora_B = fold(values.lora_B, columns)
    except ValueError:
        if isinstance(layer, FusedLoRALinear):
            return values
        raise
    blocks = math.sqrt(len(columns)) if rslora else len(columns)
    return LayerValues(values.lora_A, lora_B, values.alpha and values.alpha / blocks, columns)


def _check_targets(
    directory: Path, config: Mapping[str, Any], layers: Set[str], linear: Set[str]
) -> None:
    """Raise ValueError unless the file's layers are those that its target_modules name."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    expected = {name for name in linear if peft_matches(config, name)}
    for found, text in (
        (expected - layers, "has no values for target layers of the model"),
        (layers & linear - expected, "has values for layers that target_modules does not name"),
    ):
        if found:
            names = ", ".join(sorted(found)[:4])
            raise ValueError(f"{directory} {text}: {names} ({len(found)} in all)")


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration, refused with the field's name if it asks for more than plain LoRA."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is no PEFT adapter")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type={config.get('peft_type')!r} cannot be represented, only 'LORA' can"
        )
    refused = {
        key: value
        for key, value in config.items()
        if value and key not in FOLLOWED | NEUTRAL and value not in PLAIN_VALUES.get(key, ())
    }
    if refused:
        fields = ", ".join(f"{key}={value!r}" for key, value in refused.items())
        raise ValueError(f"{path}: plain LoRA layers cannot represent {fields}")
    return config


def _weights_file(directory: Path) -> Path:
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (directory / name).exists():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}")


def _read_columns(path: Path) -> dict[str, Ranges]:
    """Path of a layer -> its columns, of the metadata; empty for a pickle, or another's file."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(COLUMNS_KEY, "{}")
    return {
        name: tuple((int(start), int(stop)) for start, stop in columns)
        for name, columns in json.loads(text).items()
    }


def peft_tensors(
    model: nn.Module, layers: Mapping[str, FusedLoRALinear], saved: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the safetensors file: LoRA, unfolded, and the modules `saved`."""
    state: dict[str, Tensor] = {}
    for path, layer in layers.items():
        lora_A, lora_B = layer.unfolded()
        state[f"{PREFIX}{path}.lora_A.weight"] = lora_A
        state[f"{PREFIX}{path}.lora_B.weight"] = lora_B
    for path in trained_by_peft(model, saved):
        module = model.get_submodule(path)
        state |= {f"{PREFIX}{path}.{key}": value for key, value in module.state_dict().items()}
    # Copies, because one tensor under two names (tied weights) cannot be written.
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()
    }
    columns = {path: layer.columns for path, layer in layers.items() if layer.columns}
    metadata = {"format": "pt"} | ({COLUMNS_KEY: json.dumps(columns)} if columns else {})
    return tensors, metadata


def peft_config(
    model: nn.Module, layers: Mapping[str, FusedLoRALinear], train: Iterable[str]
) -> dict[str, Any]:
    """The `LoraConfig` under which PEFT builds the same layers, as a dictionary."""
    train = sorted(train)
    rslora = all(layer.rslora for layer in layers.values())
    # PEFT has one `use_rslora` for all layers. A layer that differs keeps its scale by an alpha of
    # its own, and so does one that is unfolded, to the rank summed over its columns.
    ranks = {path: len(layer.lora_A) for path, layer in layers.items()}
    alphas = {
        path: _number(
            layer.alpha
            if layer.columns is None and rslora == layer.rslora
            else layer.scale * (math.sqrt(ranks[path]) if rslora else ranks[path])
        )
        for path, layer in layers.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1:
        warnings.warn(
            f"PEFT has one dropout for all layers: {max(dropouts)} of {sorted(dropouts)}",
            stacklevel=3,
        )
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": name_or_path or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.conv1d for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts),
        "modules_to_save": train or None,
        "r": rank,
        "rank_pattern": {exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(path): a for path, a in alphas.items() if a != alpha},
        "use_dora": False,
        "use_rslora": rslora,
        **names_for_peft(model, set(layers), train),
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
