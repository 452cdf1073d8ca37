"""The methods: fused LoRA, real PEFT and full fine-tuning, one row each.

`lora` and `peft` start from the very same numbers (`redraw`), so that with dropout 0 their losses
can be compared step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, save_adapter
from lora_kernels.injection.families import family_of, heads_of


@dataclass(frozen=True)
class Attached:
    """A model ready to train: what was replaced by which strategy, what was left out and why."""

    model: nn.Module
    fused: tuple[dict[str, str], ...] = ()
    skipped: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Method:
    """One way to fine-tune. `attach` freezes and injects; `save` writes what was trained."""

    name: str
    summary: str
    learning_rate: float  # the default
    attach: Callable[[nn.Module, LoRAConfig], Attached]
    save: Callable[[nn.Module, Path], Any]


def parameter_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Count trainable and total parameters by group: lora, head, embeddings, backbone.

    The same groups for every method. PEFT keeps a frozen second copy of the head
    (``original_module``), which is nobody's parameter and is left out.
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # PEFT's
    base: nn.Module = unwrap()
    heads = tuple(f"{name}." for name in heads_of(base))
    groups = ("lora", "head", "embeddings", "backbone")
    counts = {group: {"trainable": 0, "total": 0} for group in groups}
    for name, parameter in base.named_parameters():
        if ".original_module." in name:
            continue
        if "lora_" in name:
            group = "lora"
        elif name.startswith(heads):
            group = "head"
        elif any(word in name for word in ("embed", "wte", "wpe")):
            group = "embeddings"
        else:
            group = "backbone"
        counts[group]["total"] += parameter.numel()
        counts[group]["trainable"] += parameter.numel() if parameter.requires_grad else 0
    counts["all"] = {
        key: sum(counts[group][key] for group in groups) for key in ("trainable", "total")
    }
    return counts


def redraw(model: nn.Module, seed: int) -> None:
    """Draw every lora_A again in module order, Kaiming-uniform as PEFT does; zero every lora_B."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape)  # on the CPU: the same numbers on any device
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            with torch.no_grad():
                parameter.copy_(drawn)
        elif "lora_B" in name:
            nn.init.zeros_(parameter)
    torch.set_rng_state(generator_state)


def _attach_lora(model: nn.Module, config: LoRAConfig) -> Attached:
    report = add_lora(model, config)
    return Attached(
        model,
        tuple(
            {"name": row.name, "strategy": row.strategy, "reason": row.reason}
            for row in report.fused
        ),
        tuple({"name": row.name, "reason": row.reason} for row in report.skipped),
    )


def _attach_peft(model: nn.Module, config: LoRAConfig) -> Attached:
    try:
        import peft
    except ImportError as error:
        raise ImportError("--method peft needs the peft package: pip install peft") from error
    targets = config.targets
    if targets is None:
        family = family_of(model)
        if family is None:
            raise ValueError(
                f"no default targets for {type(model).__name__}: name them (--targets)"
            )
        targets = family.targets
    # PEFT spells these two otherwise: "all-linear" is a bare string, so is a regular expression.
    spelled: Any = list(targets)
    if len(targets) == 1 and targets[0] == "all-linear":
        spelled = "all-linear"
    elif len(targets) == 1 and targets[0].startswith("re:"):
        spelled = targets[0].removeprefix("re:")
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="SEQ_CLS" if config.train else None,
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            target_modules=spelled,
            modules_to_save=list(config.train) or None,
        ),
    )
    names = tuple(
        name
        for name, module in wrapped.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    )
    row = {"strategy": "peft", "reason": "the peft package's own layers"}
    return Attached(wrapped, tuple({"name": name, **row} for name in names))


def _attach_full(model: nn.Module, config: LoRAConfig) -> Attached:
    return Attached(model.requires_grad_(True))


def _save_pretrained(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "fused LoRA layers", 1e-3, _attach_lora, save_adapter),
        Method("peft", "PEFT's eager layers", 1e-3, _attach_peft, _save_pretrained),
        Method("full", "every parameter", 5e-5, _attach_full, _save_pretrained),
    )
}


def attach(
    method: str, model: nn.Module, config: LoRAConfig, train_head: bool, seed: int
) -> Attached:
    """Freeze and inject by the named method, and give LoRA its reproducible start."""
    if train_head:
        heads = heads_of(model)
        if not heads:
            raise ValueError(f"no known task head on {type(model).__name__}: use --no-train-head")
        config = replace(config, train=heads)
    attached = METHODS[method].attach(model, config)
    redraw(attached.model, seed)
    return attached
