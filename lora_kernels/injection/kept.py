"""What an adapter must hold besides LoRA and the modules trained in full, and what to say of it.

The base model, when it is loaded again, does not have these values: running statistics that move
while the model trains, weights that were drawn at random because the checkpoint lacks them, and
embeddings whose vocabulary was resized.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from ..layers.linear import FusedLoRALinear
from .methods import Method
from .peft_names import names_for_peft, twice
from .targets import inside

RECORD = "lora_kernels"  # the field of a transformers config that says what LoRA the model has


def running_statistics(model: nn.Module) -> list[str]:
    """Keys of the buffers of batch norms and their like, which training moves though frozen."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if module._buffers.get("running_mean") is not None
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def drawn_at_random(model: nn.Module) -> list[str]:
    """Keys of the parameters that transformers drew because the checkpoint lacks them.

    `from_pretrained` marks every parameter that it has read. A model without marks has none.
    """
    found = []
    for path, module in _of_transformers(model):
        named = dict(module.named_parameters(prefix=path))
        if any(getattr(p, "_is_hf_initialized", False) for p in named.values()):
            found += [key for key, p in named.items() if not hasattr(p, "_is_hf_initialized")]
    return found


def embeddings(model: nn.Module) -> list[str]:
    """Keys of the tensors of a model's input and output embeddings, under all their names."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            module = getattr(model, name)()
            paths = [path for path, other in model.named_modules() if other is module]
            found += [f"{path}.{key}" for path in paths for key in module.state_dict()]
    return found


def resized(model: nn.Module) -> list[str]:
    """Keys of the embeddings of transformers models whose vocabulary is not the checkpoint's.

    Both sizes are those of configurations, as `resize_token_embeddings` leaves them. A checkpoint
    whose configuration cannot be read any more is warned of.
    """
    found = []
    for path, module in _of_transformers(model):
        now = _vocabulary(module.config)
        if now is None or not (name := getattr(module.config, "_name_or_path", "")):
            continue
        try:
            before = type(module.config).from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            warnings.warn(
                f"the configuration of {name} is not at hand, so whether the vocabulary was "
                "resized is not known, and the adapter holds no rows of new entries: if there are "
                "any, save again with that configuration at hand",
                stacklevel=2,
            )
            continue
        if _vocabulary(before) not in (now, None):
            start = path and path + "."
            once = dict(module.named_parameters()).keys() & set(embeddings(module))  # of tied ones
            found += [start + key for key in sorted(once) if "lora_" not in key]
    return found


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def kept_keys(model: nn.Module, train: Iterable[str]) -> list[str]:
    """Keys of the frozen values that go into the model's adapter."""
    marked = getattr(model, "lora_kept", ())
    keys = dict.fromkeys((*running_statistics(model), *marked, *resized(model)))
    return [key for key in keys if not inside(key, train)]


def notes_on(model: nn.Module, layers: set[str], train: list[str]) -> tuple[str, ...]:
    """What a user should know of the model before training, a sentence each."""
    notes = []
    half = {
        path: p.dtype
        for path in train
        for p in model.get_submodule(path).parameters()
        if p.dtype.itemsize < 4
    }
    if half:
        dtype = next(iter(half.values()))
        notes.append(
            f"{_few(half)} trained in {dtype}: small updates vanish, and torch.amp.GradScaler "
            f"refuses fp16; call .float() on it and train under autocast"
        )
    kept = getattr(model, "lora_kept", ())
    fresh = [key for key in drawn_at_random(model) if key in kept and not inside(key, train)]
    # A layer with LoRA trains, whatever weight lies below.
    if owners := dict.fromkeys(p for key in fresh if (p := key.rpartition(".")[0]) not in layers):
        notes.append(
            f"{_few(owners)} drawn at random, since the checkpoint lacks it, and frozen; the "
            "adapter holds it; name it in train= to train it"
        )
    if grown := [key for key in resized(model) if key not in fresh and not inside(key, train)]:
        owners = dict.fromkeys(key.rpartition(".")[0] for key in grown)
        notes.append(
            f"{_few(owners)} frozen, with a vocabulary that is not the checkpoint's; the adapter "
            "holds it; name it in train= to train it"
        )
    if moving := [key for key in running_statistics(model) if not inside(key, train)]:
        owners = dict.fromkeys(key.rpartition(".")[0] for key in moving)
        notes.append(
            f"{_few(owners)} frozen, but its running statistics move; the adapter holds them"
        )
    if train and names_for_peft(model, layers, train)["modules_to_save"] is None:
        notes.append(
            f"{_few(train)} trained here, but not by PEFT if it goes on from the adapter: PEFT "
            "reads the values, and its modules_to_save cannot name exactly these modules"
        )
    if shared := [path for path in twice(model).values() if path in layers]:
        notes.append(f"{_few(shared)} in the model twice: PEFT puts LoRA on the first place alone")
    return tuple(notes)


def _few(names: Iterable[str]) -> str:
    """`a is`, `a and b are`, or `a, b and 3 more are`."""
    names = list(names)
    if len(names) < 3:
        return " and ".join(names) + (" is" if len(names) == 1 else " are")
    return f"{names[0]}, {names[1]} and {len(names) - 2} more are"


def remember(model: nn.Module, layers: dict[str, FusedLoRALinear], train: Iterable[str]) -> None:
    """Let transformers models inside `model`, or it itself, save their adapter alone.

    Their configs get a record of what LoRA there is, for checkpoints of the whole model, which hold
    LoRA under the names of our layers. `load_adapter` needs alpha and columns too.
    """
    model.disable_adapter = Method("disable_adapter", model)  # type: ignore[assignment]
    for prefix, module in _of_transformers(model):
        start = prefix and prefix + "."
        own = {path: layer for path, layer in layers.items() if path.startswith(start)}
        if own:
            first = next(iter(own.values()))
            record: dict[str, Any] = {
                "prefix": start,
                "rslora": first.rslora,
                "dropout": first.dropout,
                "alpha": {path.removeprefix(start): layer.alpha for path, layer in own.items()},
                "columns": {
                    path.removeprefix(start): [list(columns) for columns in layer.columns]
                    for path, layer in own.items()
                    if layer.columns
                },
                "train": [path.removeprefix(start) for path in train if path.startswith(start)],
            }
            setattr(module.config, RECORD, record)
            module.save_pretrained = Method("save_pretrained", module)
            if getattr(module, "is_quantized", False):
                module._hf_peft_config_loaded = True  # or Trainer refuses to train the model
            if start:  # a part that is saved by itself, as sentence-transformers does
                names = tuple("re:" + re.escape(path) for path in record["train"])
                module.lora_config = replace(model.lora_config, train=names)  # type: ignore[type-var]
                kept = (key for key in model.lora_kept if key.startswith(start))  # type: ignore[union-attr]
                module.lora_kept = tuple(key.removeprefix(start) for key in kept)


def forget(model: nn.Module) -> None:
    """Undo `remember`, and what else was noted on the model."""
    inner = [module for _, module in _of_transformers(model)]
    for module in inner:
        vars(module.config).pop(RECORD, None)
    for module in (model, *inner):
        for name in (
            "lora_config",
            "lora_kept",
            "save_pretrained",
            "disable_adapter",
            "_hf_peft_config_loaded",
        ):
            vars(module).pop(name, None)


def _of_transformers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost modules that transformers saves and loads, by path."""
    found: list[str] = []
    for path, module in model.named_modules():
        outermost = inside(path, found) is None and "" not in found
        if outermost and "config" in vars(module) and hasattr(module, "save_pretrained"):
            found.append(path)
            yield path, module
