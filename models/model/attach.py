"""What a method does to a model: freezes it, adds what trains, and later writes what was trained.

`lora` and `peft` start from the very same numbers (`redraw`), so that with dropout 0 their losses
can be compared step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from lora_kernels import LoRAConfig, add_lora, save_adapter
from lora_kernels.injection.families import family_of, heads_of
from lora_kernels.injection.report import FusedRow, SkippedRow
from lora_kernels.injection.targets import find_train
from lora_kernels.layers.embedding import FusedLoRAEmbedding

from ..arguments import Arguments
from ..data.tasks import task_of
from . import houlsby
from .adaptive import AdaptiveRanks, save_shrunk


@dataclass(frozen=True)
class Attached:
    """A model that is ready to train: which layers got LoRA, which were left alone, and why.

    `new` are the modules that the checkpoint does not hold; they are saved, trained or not.
    `callbacks` take part in training. `notes` are for the result.
    """

    model: nn.Module
    fused: tuple[FusedRow, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()
    new: tuple[str, ...] = ()
    callbacks: tuple[TrainerCallback, ...] = ()
    notes: tuple[str, ...] = ()


def parameter_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Group -> trainable and total parameters; the groups are the same for every method.

    They are lora, adapter, head, embeddings, backbone, and all. PEFT keeps a frozen copy of the
    head beside the one that it trains (`original_module`); that copy is not counted.
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # PEFT's
    base: nn.Module = unwrap()
    heads = tuple(f"{name}." for name in heads_of(base))
    groups = ("lora", "adapter", "head", "embeddings", "backbone")
    counts = {group: {"trainable": 0, "total": 0} for group in groups}
    for name, parameter in base.named_parameters():
        if ".original_module." in name:
            continue
        if "lora_" in name:
            group = "lora"
        elif f".{houlsby.NAME}." in name:
            group = "adapter"
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
    """Draw LoRA anew in module order, as PEFT does.

    lora_A is Kaiming-uniform and lora_B zero; of embeddings lora_A is zero and lora_B normal.
    """
    embeddings = [m for m in model.modules() if isinstance(m, FusedLoRAEmbedding)]
    embedded = {id(p) for layer in embeddings for p in layer.parameters()}
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_A, is_B = (f"lora_{m}" in name or f"lora_embedding_{m}" in name for m in "AB")
        if not (is_A or is_B):
            continue
        of_embedding = "lora_embedding_" in name or id(parameter) in embedded
        drawn = torch.zeros(parameter.shape)  # on the CPU: the same numbers on any device
        if is_A and not of_embedding:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        elif is_B and of_embedding:
            nn.init.normal_(drawn)
        with torch.no_grad():
            parameter.copy_(drawn)
    torch.set_rng_state(generator_state)


def _lora(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    report = add_lora(model, config)
    return Attached(model, report.fused, report.skipped)


def _peft(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
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


def _full(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    return Attached(model.requires_grad_(True))


def _lora_adaptive(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    start = arguments.first_rank()
    # The update is scaled as that of a run with the fixed rank, so that the two can be compared.
    larger = (start / config.rank) ** (0.5 if config.rslora else 1.0)
    attached = _lora(model, replace(config, rank=start, alpha=config.alpha * larger), arguments)
    return replace(attached, callbacks=(AdaptiveRanks(model, arguments),))


def _adapter(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    names = houlsby.add_adapters(model, arguments.reduction, config.train)
    return Attached(model, tuple(FusedRow(name, "adapter", "eager PyTorch") for name in names))


def _bitfit(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    train_only(model, config.train)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return Attached(model)


def _last_block(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    blocks, norms = last_block(model)
    train_only(model, (*config.train, blocks, *norms))
    return Attached(model)


def _last_layer(model: nn.Module, config: LoRAConfig, arguments: Arguments) -> Attached:
    train_only(model, config.train)
    return Attached(model)


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze all but the modules `names`. Raises ValueError for a name that matches nothing."""
    paths = find_train(model, tuple(names))
    model.requires_grad_(False)
    for path in paths:
        model.get_submodule(path).requires_grad_(True)


FINAL_NORMS = ("ln_f", "norm", "final_norm", "final_layer_norm", "layernorm")


def last_block(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """The path of the last block, and those of the norm that follows the blocks, if there is one.

    The blocks are the longest list of modules that lies in no other list; of two as long (encoder
    and decoder) the later one. Raises ValueError where there is none.
    """
    lists = {
        path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    outer = {
        path: len(blocks)
        for path, blocks in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists)
    }
    if not outer:
        raise ValueError(f"{type(model).__name__} has no list of blocks")
    found = max(outer, key=lambda path: (outer[path], list(outer).index(path)))
    parents = [found.rpartition(".")[0]]
    parents.append(parents[0].rpartition(".")[0])  # of ViT the norm lies one level above
    norms = (
        f"{parent}.{name}" if parent else name
        for parent in parents
        for name, _ in model.get_submodule(parent).named_children()
        if name in FINAL_NORMS
    )
    return f"{found}.{outer[found] - 1}", tuple(norms)


def _save_pretrained(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)


class Way(NamedTuple):
    """`attach` readies a plain model to train, `save` writes what was trained into a folder."""

    attach: Callable[[nn.Module, LoRAConfig, Arguments], Attached]
    save: Callable[[nn.Module, Path], Any]


WAYS: dict[str, Way] = {
    "lora": Way(_lora, save_adapter),
    "lora_adaptive": Way(_lora_adaptive, save_shrunk),
    "peft": Way(_peft, _save_pretrained),
    "full": Way(_full, _save_pretrained),
    "adapter": Way(_adapter, houlsby.save_adapters),
    "bitfit": Way(_bitfit, _save_pretrained),
    "last_block": Way(_last_block, _save_pretrained),
    "last_layer": Way(_last_layer, _save_pretrained),
}


def attach(arguments: Arguments, model: nn.Module, new: tuple[str, ...] = ()) -> Attached:
    """Freeze the model and add what trains, as the method does, with a start drawn from the seed.

    The modules `new` become a part of what is saved. They train with the head, or not at all, or
    because `arguments.train` names them. A head that is a target gets LoRA and does not train in
    full. A language model has no task head: its own is its embeddings. Raises ValueError where no
    task head is found that should train, where nothing would train, and for a name in
    `arguments.train` that matches nothing.
    """
    wants_head = arguments.train_head and task_of(arguments.task).generation is None
    heads = heads_of(model) if wants_head else ()
    if wants_head and not heads:
        raise ValueError(f"no known task head on {type(model).__name__}: use --no-train-head")
    targets, asked = arguments.targets or [], tuple(arguments.train or ())
    named = find_train(model, asked)
    whole = (path for path in (*heads, *new) if path not in targets)
    config = replace(arguments.lora_config(), train=tuple(dict.fromkeys((*whole, *asked))))
    attached = WAYS[arguments.method].attach(model, config, arguments)
    if not arguments.train_head:
        base: Any = getattr(attached.model, "get_base_model", lambda: attached.model)()  # PEFT's
        for path in new:
            if path not in named and path not in targets:
                base.get_submodule(path).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in attached.model.parameters()):
        raise ValueError(f"--method {arguments.method} trains nothing of {type(model).__name__}")
    redraw(attached.model, arguments.seed)
    drawn = ", ".join(path for path in new if path in targets)
    held = "PEFT's adapter lacks" if arguments.method == "peft" else "the adapter holds"
    note = f"LoRA on {drawn}, whose weight was drawn at random: {held} that weight"
    return replace(attached, new=new, notes=(note,) if drawn else ())
