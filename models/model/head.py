"""What a checkpoint lacks for a task: modules that are drawn anew, and a head of other classes.

A checkpoint may bring the head of another task. Its rows are put in the task's order by the names
of their classes. A head whose number of classes or names differ is drawn anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from lora_kernels.injection.families import heads_of
from lora_kernels.injection.targets import inside

from ..data.splits import normalise
from ..data.tasks import Task


def new_modules(model: nn.Module, parameters: Collection[str]) -> tuple[str, ...]:
    """The modules that hold `parameters`, the ones drawn anew; a head counts as a whole.

    Raises ValueError for weights that no run should draw: of embeddings, of one block of many, or
    of no module at all.
    """
    heads = heads_in(model)
    found: dict[str, None] = {}
    for name, _ in model.named_parameters():
        if name not in parameters:
            continue
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        is_part = any(piece.isdigit() for piece in path.split("."))
        head = inside(path, heads)
        if head is None and (not path or is_part or isinstance(module, nn.Embedding)):
            raise ValueError(
                f"its weights lack {name} ({len(parameters)} are missing in all), "
                "so they are not this architecture's"
            )
        found[head or path] = None
    return tuple(found)


def fit_head(
    model: nn.Module, task: Task, classes: Sequence[str], fresh: Collection[str]
) -> tuple[bool, str]:
    """Give the head the task's classes; returns whether it changed, and what was done, in words.

    `classes` are the checkpoint's, and `fresh` the parameters that were drawn anew. Raises
    ValueError for a head without a linear layer for the classes.
    """
    heads = heads_in(model)
    names = ", ".join(heads)
    layers = [
        (f"{head}.{name}" if name else head, layer)
        for head in heads
        for name, layer in model.get_submodule(head).named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == task.num_labels
    ]
    if not layers:
        raise ValueError(f"no linear layer with {task.num_labels} outputs in its head ({names})")
    path, layer = layers[-1]
    theirs, ours = ", ".join(classes), ", ".join(task.labels) or "one number"
    if f"{path}.weight" in fresh:
        return True, f"head {path}: new ({ours})"
    if task.regression:
        return False, f"head {path}: the checkpoint's, one number"
    if all(normalise(name).removeprefix("label ").isdigit() for name in classes):
        return False, f"head {path}: the checkpoint's, whose nameless classes are taken for {ours}"
    spelled = [normalise(name) for name in classes]
    wanted = [normalise(name) for name in task.labels]
    if sorted(spelled) != sorted(wanted):
        # transformers draws nothing over what it marked as read, and an adapter holds what is not.
        for parameter in layer.parameters():
            vars(parameter).pop("_is_hf_initialized", None)
        model._init_weights(layer)  # type: ignore[operator]
        return True, f"head {path}: new ({ours}), since the classes of the checkpoint are {theirs}"
    if spelled == wanted:
        return False, f"head {path}: the checkpoint's ({theirs})"
    rows = [spelled.index(name) for name in wanted]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[rows].clone())
    return True, f"head {path}: the classes of the checkpoint ({theirs}) put in the order {ours}"


def heads_in(model: nn.Module) -> tuple[str, ...]:
    """The task heads, or for an unknown family whatever stands beside the base model."""
    base = getattr(model, "base_model_prefix", "")
    beside = [
        n for n, m in model.named_children() if n != base and any(True for _ in m.parameters())
    ]
    return heads_of(model) or tuple(beside)
