"""Checkpoints of a whole model with our layers, read: what `save_pretrained` and the Trainer write.

They hold LoRA beside the frozen weights, under the names of our layers. What LoRA it is stands in
the transformers config beside the file (`injection.kept.remember`), or in the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..injection.inject import fused_layers, trained_paths
from ..injection.kept import RECORD, running_statistics
from ..injection.targets import inside
from .files import Adapter, LayerValues, split_lora, take_vectors, under_all_names

PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of weights in a checkpoint's directory; empty if it is none."""
    found = (sorted(directory.glob(pattern)) for pattern in PATTERNS)
    return next((files for files in found if files), [])


def is_checkpoint(tensors: Mapping[str, Tensor]) -> bool:
    """Whether LoRA values lie beside the weights that they adapt, as in a whole model's state."""
    return any(
        key.endswith(".lora_A") and key.removesuffix("lora_A") + "weight" in tensors
        for key in tensors
    )


def read_checkpoint(source: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> Adapter:
    """The adapter in a whole model's `tensors`; the rest of them must be the model's own values.

    Raises ValueError where it is not, or nothing says what was trained.
    """
    record = _read_record(source)
    layers, own = fused_layers(model), model.state_dict()
    if layers:
        prefix, train = record.get("prefix", ""), trained_paths(model)
    elif record:
        prefix, train = record["prefix"], record["train"]
    else:
        raise ValueError(
            f"{source} holds a whole model, and nothing says what of it was trained: load it into "
            "a model that add_lora has prepared, or write the adapter by save_adapter"
        )
    if not all(prefix + key in own or "lora_" in key for key in tensors):
        prefix = ""  # the very module that was saved, not one that holds it
    own_tensors = {prefix + key: value for key, value in tensors.items()}
    vectors = take_vectors(own_tensors, "lora_magnitude", "lora_bias")
    pairs, others = split_lora(own_tensors, "", source)
    if not layers:
        train = [prefix + path for path in train]
    others |= under_all_names(model, others)  # transformers writes a tied weight under one
    kept = {*running_statistics(model), *getattr(model, "lora_kept", ())}
    for key, value in list(others.items()):
        if inside(key, train) or key in kept:
            continue
        if not (key in own and _same(value, own[key])):
            raise ValueError(
                f"{source}: {key} is frozen, and has other values than in this model: load the "
                "base model that it was trained on"
            )
        del others[key]
    values = {}
    for path, (lora_A, lora_B) in pairs.items():
        name = path.removeprefix(prefix)
        layer: Any = layers.get(path)
        columns = record.get("columns", {}).get(name) if layer is None else layer.columns
        columns = columns and tuple((int(start), int(stop)) for start, stop in columns)
        alpha = record.get("alpha", {}).get(name)
        values[path] = LayerValues(lora_A, lora_B, alpha, columns, **vectors.get(path, {}))
    rest = record.get("dropout", 0.0), record.get("rslora", False)
    return Adapter(source, values, others, tuple(train), tuple(kept & others.keys()), *rest)


def _read_record(source: Path) -> dict[str, Any]:
    """What the transformers config beside a checkpoint says of its LoRA, or nothing."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")).get(RECORD, {})
        if record:
            types = {"prefix": str, "train": list, "alpha": dict, "columns": dict, "rslora": bool}
            wrong = [name for name, kind in types.items() if not isinstance(record.get(name), kind)]
            if wrong:
                raise ValueError(f"{RECORD}.{wrong[0]} is missing, or of another type")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return record


def _same(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and torch.equal(value.to(own), own)
