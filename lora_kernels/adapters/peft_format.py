"""PEFT's adapter directory, read and described by PEFT's own rules.

Keys are `base_model.model.<path>.lora_A.weight`; modules trained in full stand beside them under
their path.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from ..algebra.columns import Ranges
from ..injection.targets import inside, is_layer
from ..layers.linear import FusedLoRALinear
from .files import Adapter, LayerValues, read_tensors, split_lora

COLUMNS_KEY = "lora_kernels.columns"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

# Fields of PEFT's LoraConfig that `read_peft` follows, and those that do not touch the values of a
# saved adapter. Whatever else is set, now or in a later PEFT, means something that a plain LoRA
# layer does not do.
FOLLOWED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "modules_to_save",
}
FOLLOWED |= {
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
NEUTRAL = {
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
}
NEUTRAL |= {"fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "qalora_group_size"}
NEUTRAL |= {"runtime_config", "init_lora_weights", "bias"}  # the last two by value, below
BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
# What PEFT's model class for a task trains in full unasked, and then expects in the file.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def peft_matches(config: Mapping[str, Any], path: str) -> bool:
    """Whether a PEFT configuration puts LoRA on the module at `path`.

    PEFT's rule: excluded names and modules trained in full first; then one string is a regular
    expression for the whole path, and a list holds paths or dotted suffixes, of the layers in
    `layers_to_transform` if that is given.
    """
    if excluded := config.get("exclude_modules"):
        if isinstance(excluded, str):
            if re.fullmatch(excluded, path):
                return False
        elif _is_suffix(excluded, path):
            return False
    if any(
        re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ()
    ):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    indices = config.get("layers_to_transform")
    if not _is_suffix(targets, path) or indices in (None, []):
        return _is_suffix(targets, path)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(found[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def trained_by_peft(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The outermost modules of PEFT's `modules_to_save`, which compares ends of strings."""
    ends = tuple(names)
    paths = (
        [path for path, _ in model.named_modules() if path and path.endswith(ends)] if ends else []
    )
    return [path for path in paths if inside(path, paths) == path]


def read_peft(directory: Path, model: nn.Module) -> Adapter:
    """The adapter of a PEFT directory; raises as `load_adapter` does."""
    config = _read_config(directory / CONFIG_NAME)
    tensors = {
        key.removeprefix(PREFIX).replace(".modules_to_save.", "."): value
        for key, value in read_tensors(_weights_file(directory)).items()
    }
    pairs, others = split_lora(tensors, ".weight", directory)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    layers: dict[str, LayerValues] = {}
    columns = read_columns(_weights_file(directory))
    for path, (lora_A, lora_B) in pairs.items():
        wanted = _by_pattern(config.get("rank_pattern"), path, rank)
        if lora_A.shape[0] != wanted:
            raise ValueError(
                f"{directory}: {path}.lora_A is {list(lora_A.shape)}, but "
                f"{CONFIG_NAME} gives rank {wanted}"
            )
        alpha_of_layer = _by_pattern(config.get("alpha_pattern"), path, alpha)
        layers[path] = LayerValues(lora_A, lora_B, alpha_of_layer, columns.get(path))
    targets = config.get("target_modules")
    if targets and targets != "all-linear":
        linear = [name for name, module in model.named_modules() if name and is_layer(module)]
        expected = {name for name in linear if peft_matches(config, name)}
        for found, text in (
            (expected - set(layers), f"has no values for target layers of {type(model).__name__}"),
            (
                set(layers) & set(linear) - expected,
                "has values for layers that target_modules does not name",
            ),
        ):
            if found:
                raise ValueError(
                    f"{directory} {text}: {', '.join(sorted(found)[:4])} ({len(found)} in all)"
                )
    train = trained_by_peft(model, config.get("modules_to_save") or ())
    rslora = bool(config.get("use_rslora", False))
    return Adapter(directory, layers, others, tuple(train), config.get("lora_dropout", 0.0), rslora)


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
        key: value for key, value in config.items() if value and key not in FOLLOWED | NEUTRAL
    }
    if config.get("init_lora_weights", True) not in BASE_KEEPING_INITS:
        refused["init_lora_weights"] = config["init_lora_weights"]
    if config.get("bias", "none") != "none":
        refused["bias"] = config["bias"]
    if refused:
        fields = ", ".join(f"{key}={value!r}" for key, value in refused.items())
        raise ValueError(f"{path}: plain LoRA layers cannot represent {fields}")
    return config


def _weights_file(directory: Path) -> Path:
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (directory / name).exists():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}")


def columns_metadata(layers: Mapping[str, FusedLoRALinear]) -> dict[str, str]:
    """What a safetensors file of unfolded layers says beside its tensors, and PEFT does not read:
    which of them have LoRA on some columns alone."""
    columns = {path: layer.columns for path, layer in layers.items() if layer.columns}
    return {COLUMNS_KEY: json.dumps(columns)} if columns else {}


def read_columns(path: Path) -> dict[str, Ranges]:
    """Path of a layer -> its columns, for those that have LoRA on some columns alone."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(COLUMNS_KEY, "{}")
    return {
        name: tuple((int(start), int(stop)) for start, stop in columns)
        for name, columns in json.loads(text).items()
    }


def peft_config(
    model: nn.Module, layers: Mapping[str, FusedLoRALinear], train: Iterable[str]
) -> dict[str, Any]:
    """The `LoraConfig` under which PEFT builds the same layers, as a dictionary."""
    train = sorted(train)
    rslora = all(layer.rslora for layer in layers.values())
    # Where only some layers are rank-stabilised, an alpha for each says the same.
    # So does the alpha of a layer that is unfolded, at the rank summed over its columns.
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
        "rank_pattern": {_exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(path): a for path, a in alphas.items() if a != alpha},
        "use_dora": False,
        "use_rslora": rslora,
        **_names_for_peft(model, set(layers), train),
    }


def _names_for_peft(model: nn.Module, layers: set[str], train: list[str]) -> dict[str, Any]:
    """task_type and target_modules that lead PEFT to `layers` and `train` and nothing else."""
    guess = next(
        (task for end, task in TASK_TYPES.items() if type(model).__name__.endswith(end)), None
    )
    paths = [path for path, _ in model.named_modules() if path]
    # PEFT copies modules by the ends of their names, so it may copy more than `train`: all of them
    # are saved.
    copied = set(trained_by_peft(model, train))
    cls = type(model)
    for task in dict.fromkeys((guess, None)):
        saved = (*train, *TASK_HEADS.get(task or "", ()))
        if set(trained_by_peft(model, saved)) != copied:
            continue
        targets: list[Any] = [sorted({path.split(".")[-1] for path in layers}), sorted(layers)]
        targets.append("|".join(re.escape(path) for path in sorted(layers)))
        for target in targets:
            config = {"target_modules": target, "modules_to_save": saved}
            if {path for path in paths if peft_matches(config, path)} == layers:
                mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
                return {
                    "target_modules": target,
                    "task_type": task,
                    "auto_mapping": None if task else mapping,
                }
    raise ValueError(
        f"no PEFT configuration names exactly {sorted(layers)[:3]}... and trains {train}"
    )


def _is_suffix(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first expression that matches a dotted suffix."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _exactly(path: str) -> str:
    return "^" + re.escape(path)


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
