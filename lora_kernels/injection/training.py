"""What training asks of a model with LoRA: the base model's output, and other rules for A and B."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import arguments
from ..layers.embedding import FusedLoRAEmbedding
from .inject import fused_layers, trained_paths
from .methods import METHODS


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the LoRA layers of a model compute y = x weight^T + bias, as the base model does.

    So DPO and its like need no second model as reference. `model.disable_adapter()` does the same
    for a model of `add_lora`. Merged layers use the weight from before the merge.

    Modules that train in full have no former values to go back to: they stay, and a warning names
    them. Raises ValueError for a model without LoRA layers of `add_lora`.

    >>> with torch.no_grad(), disable_adapter(model):
    ...     reference = model(**batch).logits
    """
    layers = list(fused_layers(arguments.module("model", model)).values())
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layer of add_lora (a PEFT model has a "
            "disable_adapter of its own; models of add_loras have none)"
        )
    if train := trained_paths(model):
        warnings.warn(
            f"without its LoRA the model is not the base model: {', '.join(train)} trains in full "
            "and keeps its trained values",
            stacklevel=3,
        )
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.disabled = was


METHODS["disable_adapter"] = disable_adapter


def lora_plus(
    model: nn.Module, learning_rate: float, ratio: float = 16, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer by LoRA+: lora_B learns `ratio` times as fast as the rest.

    For models of `add_lora` and of PEFT. Biases and other vectors learn as fast as lora_B, and
    vectors get no weight decay; LoRA of embeddings learns at 1e-6. These are PEFT's groups. Raises
    ValueError for a model without a lora_B that trains. Source: Hayou et al., 2024 (LoRA+).

    >>> optimizer = torch.optim.AdamW(lora_plus(model, 1e-4, ratio=16))
    """
    arguments.module("model", model)
    for name, value in (("learning_rate", learning_rate), ("ratio", ratio)):
        arguments.finite(name, value)
    arguments.finite("weight_decay", weight_decay)
    slow: dict[str, Any] = {"params": [], "lr": learning_rate, "weight_decay": weight_decay}
    embedded = {**slow, "params": [], "lr": 1e-6}
    fast = {**slow, "params": [], "lr": learning_rate * ratio}
    vectors = {**fast, "params": [], "weight_decay": 0.0}
    found, of_embeddings = False, _of_embeddings(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_B = "lora_B" in name.split(".")
        found |= is_B
        if "lora_embedding_" in name or id(parameter) in of_embeddings:
            group = embedded
        elif is_B or parameter.dim() == 1:
            group = vectors if parameter.dim() == 1 else fast
        else:
            group = slow
        group["params"].append(parameter)
    if not found:
        raise ValueError(f"{type(model).__name__} has no lora_B that trains: call add_lora first")
    return [group for group in (slow, embedded, fast, vectors) if group["params"]]


def _of_embeddings(model: nn.Module) -> set[int]:
    """id of each parameter that LoRA of `add_lora` has on an embedding."""
    layers = fused_layers(model).values()
    embeddings = [layer for layer in layers if isinstance(layer, FusedLoRAEmbedding)]
    return {id(getattr(layer, name)) for layer in embeddings for name in layer.adapter_names}


def lora_fa(model: nn.Module) -> nn.Module:
    """Freeze lora_A, in place, so that lora_B alone trains (LoRA-FA); returns `model`.

    Backward then needs h [M, R] and not x [M, K], and saves no activation of a LoRA layer. For
    models of `add_lora` and of PEFT. LoRA of embeddings trains as a whole, since its lora_A starts
    at zero. Raises ValueError for a model without lora_A of a linear layer. Source: Zhang et al.,
    2023 (LoRA-FA).

    >>> add_lora(model, config)
    >>> lora_fa(model)
    """
    of_embeddings = _of_embeddings(arguments.module("model", model))
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if "lora_A" in name.split(".") and id(parameter) not in of_embeddings
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no lora_A: call add_lora first")
    for parameter in found:
        parameter.requires_grad_(False)
    return model
