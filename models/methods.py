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
from lora_kernels.injection.report import FusedRow, SkippedRow


@dataclass(frozen=True)
class Attached:
    """A model that is ready to train: which layers got LoRA, which were left alone, and why.

    `new` are the modules that the checkpoint does not hold; they are saved, trained or not.
    """

    model: nn.Module
    fused: tuple[FusedRow, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()
    new: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    `attach` freezes a model and puts LoRA into it. `save` writes what was trained into the folder
    `saved` of the run directory. `unread` names the flags that mean nothing to the method: a run
    that sets one is refused. `learning_rate` is the default peak.
    """

    name: str
    summary: str
    learning_rate: float
    attach: Callable[[nn.Module, LoRAConfig], Attached]
    save: Callable[[nn.Module, Path], Any]
    saved: str
    unread: tuple[str, ...] = ()


def parameter_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Group -> trainable and total parameters; the groups are the same for every method.

    They are lora, head, embeddings, backbone, and all. PEFT keeps a frozen copy of the head beside
    the one that it trains (`original_module`); that copy is not counted.
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
    """Draw every lora_A anew in module order, Kaiming-uniform as PEFT does; zero every lora_B."""
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
    return Attached(model, report.fused, report.skipped)


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
    # PEFT takes names as a list, but "all-linear" and a regular expression as a bare string.
    spelled: Any = list(targets)
    if len(targets) == 1 and targets[0] == "all-linear":
        spelled = "all-linear"
    elif len(targets) == 1 and targets[0].startswith("re:"):
        spelled = targets[0].removeprefix("re:")
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            # PEFT trains the heads of this task type unasked.
            task_type="SEQ_CLS" if set(heads_of(model)) & set(config.train) else None,
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            target_modules=spelled,
            modules_to_save=list(config.train) or None,
        ),
    )
    rows = (
        FusedRow(name, "peft", "the peft package's own layers")
        for name, module in wrapped.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    )
    return Attached(wrapped, tuple(rows))


def _attach_full(model: nn.Module, config: LoRAConfig) -> Attached:
    return Attached(model.requires_grad_(True))


def _save_pretrained(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "fused LoRA layers", 1e-3, _attach_lora, save_adapter, "adapter"),
        Method("peft", "PEFT's eager layers", 1e-3, _attach_peft, _save_pretrained, "adapter",
               unread=("strategy",)),
        Method("full", "every parameter", 5e-5, _attach_full, _save_pretrained, "model",
               unread=("rank", "alpha", "dropout", "rslora", "targets", "train_head", "strategy")),
    )
}  # fmt: skip


def attach(
    method: str,
    model: nn.Module,
    config: LoRAConfig,
    train_head: bool,
    seed: int,
    new: tuple[str, ...] = (),
) -> Attached:
    """Freeze the model and put LoRA into it as the method does, with a start drawn from `seed`.

    The modules `new` become a part of what is saved. They train with the head, or not at all.
    Raises ValueError where `train_head` finds no task head.
    """
    heads = heads_of(model) if train_head else ()
    if train_head and not heads:
        raise ValueError(f"no known task head on {type(model).__name__}: use --no-train-head")
    train = (*heads, *(path for path in new if path not in heads))
    attached = METHODS[method].attach(model, replace(config, train=train))
    if not train_head:
        base: Any = getattr(attached.model, "get_base_model", lambda: attached.model)()  # PEFT's
        for path in new:
            base.get_submodule(path).requires_grad_(False)
    redraw(attached.model, seed)
    return replace(attached, new=new)
