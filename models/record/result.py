"""What `result.json` says of a run: what was asked, the data, the model, and how training went."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import nn

from lora_kernels.injection.inject import fused_layers

from ..arguments import Arguments
from ..data.tasks import Task, TaskData, majority_baseline, repeated_texts
from ..methods import METHODS
from ..model.adaptive import ranks_of
from ..model.attach import Attached, parameter_counts
from ..model.loading import model_name
from ..training.trainer import ExactTrainer, clean

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "triton", "peft", "lora-kernels")

Splits = Mapping[str, datasets.Dataset]


def describe_run(arguments: Arguments, task: Task, source: str) -> dict[str, Any]:
    """What was asked for, and what it runs on."""
    threads = torch.get_num_threads()
    gpu = torch.cuda.is_available()
    return {
        "task": task.name,
        "model": source,
        "model_name": model_name(source),
        "method": arguments.method,
        "arguments": arguments.identity() | {"learning_rate": arguments.rate()},
        "seed": arguments.seed,
        "command": arguments.command(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {threads} threads",
        "versions": _versions(),
        "primary_metric": task.metrics[0],
        "saved": METHODS[arguments.method].saved,
    }


def describe_data(task: Task, data: TaskData, used: Splits, scored: Splits) -> dict[str, Any]:
    """Where the rows came from, how many are `used` and `scored`, and what a constant scores."""
    return {
        "data": data.origin,
        "dropped": dict(data.dropped),
        "rows": {name: len(split) for name, split in used.items()},
        "scored": {name: len(split) for name, split in scored.items()},
        "baseline": {
            "name": _baseline(task),
            "splits": majority_baseline(task, used),
        },
        "repeated_texts": repeated_texts(used),
    }


def _baseline(task: Task) -> str:
    if task.generation is not None:
        return "none"
    return "mse of the mean" if task.regression else "majority class"


def describe_model(attached: Attached) -> dict[str, Any]:
    """What trains and what is frozen, and which layers got LoRA."""
    return {
        "parameters": parameter_counts(attached.model),
        "fused": [dataclasses.asdict(row) for row in attached.fused],
        "skipped": [dataclasses.asdict(row) for row in attached.skipped],
        "new": list(attached.new),
    }


def describe_ranks(model: nn.Module) -> dict[str, Any]:
    """The rank that is left of each layer, and how many LoRA parameters that makes."""
    ranks, layers = ranks_of(model), fused_layers(model)
    sizes = {path: layer.lora_A.numel() + layer.lora_B.numel() for path, layer in layers.items()}
    kept = sum(sizes[path] * rank // layers[path].rank for path, rank in ranks.items())
    return {"ranks": ranks, "lora_parameters_left": kept}


def describe_training(task: Task, trainer: ExactTrainer) -> dict[str, Any]:
    """The history by epoch, time and memory of a run that has trained and scored.

    The scores of train in an epoch's row are those of its rows as they were trained on.
    """
    losses, args = trainer.step_losses, trainer.args
    batches = math.ceil(len(trainer.train_dataset) / args.train_batch_size)
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    rates = [log for log in trainer.state.log_history if "learning_rate" in log]
    scores = [log for log in trainer.state.log_history if "eval_loss" in log]
    history: list[dict[str, Any]] = []
    for epoch, row in enumerate(trainer.epochs):
        own = losses[epoch * per_epoch : (epoch + 1) * per_epoch]
        history.append({"epoch": epoch + 1, "train_loss": sum(own) / len(own), **row})
        history[-1]["learning_rate"] = rates[epoch]["learning_rate"]
        if scores:
            validation = clean(scores[epoch], "eval")
            history[-1] |= {f"validation_{name}": value for name, value in validation.items()}
    whole, steps = divmod(len(losses), per_epoch)
    rest = steps * args.gradient_accumulation_steps * args.train_batch_size
    seconds = trainer.meter.read()
    return {
        "history": history,
        "best_epoch": _best_epoch(history, f"validation_{task.metrics[0]}"),
        "steps_per_epoch": per_epoch,
        "seconds": trainer.seconds,
        "seconds_of": {name: seconds.get(name, 0.0) for name in ("training", "scoring", "saving")},
        "samples_per_second": (whole * len(trainer.train_dataset) + rest) / seconds["training"],
        "peak_memory": trainer.meter.memory(),
    }


def _best_epoch(history: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The first epoch with the highest `metric`; None where no epoch has one."""
    scored = [row for row in history if math.isfinite(row.get(metric, math.nan))]
    return max(scored, key=lambda row: row[metric])["epoch"] if scored else None


def logits_of(predictions: Any) -> Any:
    """What the head says, [rows, num_labels], of all that a model returns."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def predictions_of(
    task: Task,
    scored: Splits,
    order: Mapping[str, Sequence[int]],
    predictions: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A row for each row that was scored: split, number within it, label, prediction.

    `order` holds the numbers, split by split. Classes are numbers, as in the data.
    """
    found = []
    for name, split in scored.items():
        logits = logits_of(predictions[name])
        guesses = logits.reshape(-1) if task.regression else logits.argmax(axis=-1)
        rows = zip(order[name], split["labels"], guesses.tolist(), strict=True)
        found += [
            {"split": name, "row": row, "label": label, "prediction": guess}
            for row, label, guess in sorted(rows)
        ]
    return found


def describe_numbers(result: Mapping[str, Any], losses: Sequence[float]) -> dict[str, Any]:
    """The scores and history with None for what is not a number, `diverged`, and notes on both.

    JSON knows neither NaN nor infinity. A run diverged if its last loss or that of a split is no
    finite number.
    """
    wrong = [step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    metrics = {split: _finite(scores) for split, scores in result["metrics"].items()}
    notes = list(result["notes"])
    if wrong:
        notes.append(
            f"the training loss is not a finite number at {len(wrong)} of {len(losses)} steps, "
            f"first at step {wrong[0]}: try a lower --learning-rate or --precision fp32"
        )
    for split, scores in metrics.items():
        undefined = [name for name, score in scores.items() if score is None]
        if undefined:
            notes.append(
                f"{split}: {', '.join(undefined)} is not defined: the predictions or labels are "
                "constant, or not finite"
            )
    return {
        "metrics": metrics,
        "history": [_finite(row) for row in result["history"]],
        "diverged": not math.isfinite(losses[-1])
        or any(scores["loss"] is None for scores in metrics.values()),
        "notes": notes,
    }


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in numbers.items()
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
