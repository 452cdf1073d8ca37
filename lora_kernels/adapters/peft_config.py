"""PEFT's `adapter_config.json`, read: a field that counts has its type, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import arguments
from ..injection.expressions import check_expression


def _passes(check: Callable[..., Any], *limits: Any) -> Callable[[Any], bool]:
    """Whether a value passes a check of `arguments`."""

    def passes(value: Any) -> bool:
        try:
            check("", value, *limits)
        except ValueError:
            return False
        return True

    return passes


_is_number = _passes(arguments.finite)
_is_rank = _passes(arguments.integer, 1)
_is_dropout = _passes(arguments.probability)
_is_bool = _passes(arguments.flag)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _name_or_names(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_indices(value: Any) -> bool:
    listed = value if isinstance(value, list) else [0 if value is None else value]
    return all(isinstance(v, int) and not isinstance(v, bool) for v in listed)


def _mapping(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and all(map(is_value, value.values())))
    )


# Field of PEFT's LoraConfig that is followed -> whether a value has its type, and that in words.
FOLLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "alpha_pattern": (_mapping(_is_number), "an object of finite numbers"),
    "exclude_modules": (_name_or_names, "a regular expression or a list of names"),
    "layers_pattern": (_name_or_names, "a name or a list of names"),
    "layers_to_transform": (_are_indices, "an integer or a list of integers"),
    "lora_bias": (_is_bool, "true or false"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (_is_dropout, "a number in [0, 1)"),
    "modules_to_save": (_are_names, "a list of names"),
    "r": (_is_rank, "an integer of at least 1"),
    "rank_pattern": (_mapping(_is_rank), "an object of integers of at least 1"),
    "target_modules": (_name_or_names, "a regular expression or a list of names"),
    "use_dora": (_is_bool, "true or false"),
    "use_rslora": (_is_bool, "true or false"),
}
# Fields that change nothing in a saved adapter, whatever they hold. Any other field that is set,
# now or in a later PEFT, asks for more than plain LoRA and is refused.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
# Fields of which these values ask for plain LoRA on an unchanged base model, and no other.
PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration. Raises ValueError, in a line that names the field, for what is not LoRA's.

    Raises FileNotFoundError where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is no PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object")
    if config.get("peft_type") != "LORA":
        found = _short(config.get("peft_type"))
        raise ValueError(f"{path}: peft_type={found} cannot be represented, only 'LORA' can")
    refused = [
        f"{key}={_short(value)}"
        for key, value in config.items()
        if value and key not in FOLLOWED.keys() | NEUTRAL
        if value not in PLAIN_VALUES.get(key, ())
    ]
    if refused:
        raise ValueError(f"{path}: plain LoRA layers cannot represent {', '.join(refused)}")
    for key, (is_right, words) in FOLLOWED.items():
        if key in config and not is_right(config[key]):
            raise ValueError(f"{path}: {key}={_short(config[key])} is not {words}")
    _check_expressions(path, config)
    return config


def _check_expressions(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for what should be a regular expression and is none that can be followed."""
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        for pattern in (
            [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
        ):
            try:
                check_expression(pattern)
            except ValueError as error:
                raise ValueError(f"{path}: {key}: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
