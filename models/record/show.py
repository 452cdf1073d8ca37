"""A result for the eye: the plot, and the tables that the command line prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # pyplot would choose a display
from rich.console import Console
from rich.table import Table


def plot(result: Mapping[str, Any], losses: Sequence[float]) -> Figure:
    """On the left the loss of every step and epoch; on the right the task's first metric."""
    history = [
        {k: math.nan if v is None else v for k, v in row.items()} for row in result["history"]
    ]
    metric = result["primary_metric"]
    epochs = [row["epoch"] for row in history]
    ends = [min(epoch * result["steps_per_epoch"], len(losses)) for epoch in epochs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="train, each step"
    )
    left.plot(ends, [row["train_loss"] for row in history], "o-", label="train, epoch mean")
    if "validation_loss" in history[0]:
        left.plot(ends, [row["validation_loss"] for row in history], "s-", label="validation")
    if f"validation_{metric}" in history[0]:
        values = [row[f"validation_{metric}"] for row in history]
        right.plot(epochs, values, "s-", label="validation")
    if "test" in result["metrics"]:
        test = result["metrics"]["test"].get(metric)
        if test is not None:
            right.plot(epochs[-1:], [test], "*", markersize=12, label=f"test {test:.3f}")
    if metric == "accuracy":
        splits = result["baseline"]["splits"]
        name = next(name for name in ("validation", "test", "train") if name in splits)
        label = f"majority class, {name} {splits[name]:.3f}"
        right.axhline(splits[name], color="0.5", linestyle="--", label=label)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel=metric, xticks=epochs[:: max(1, len(epochs) // 8)])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(f"{result['task']}, {result['model_name']}, {result['method']}", fontsize=10)
    return figure


def plot_ranks(ranks: Mapping[str, int]) -> Figure:
    """The rank of each layer as a map: a column for each block, a row for each layer of a block."""
    places: dict[tuple[str, str], int] = {}
    for path, rank in ranks.items():
        pieces = path.split(".")
        at = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
        block, name = ("", path) if at is None else (pieces[at], ".".join(pieces[at + 1 :]))
        places[name, block] = rank
    names, blocks = (list(dict.fromkeys(keys)) for keys in zip(*places, strict=True))
    table = [[places.get((name, block), math.nan) for block in blocks] for name in names]
    size = (2.5 + 0.5 * len(blocks), 1.4 + 0.4 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.6 * max(ranks.values()), aspect="auto")
    axes.set_xticks(range(len(blocks)), blocks)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="block", title="rank of each layer")
    for (name, block), rank in places.items():
        axes.text(blocks.index(block), names.index(name), str(rank), ha="center", va="center")
    return figure


def _console() -> Console:
    """The terminal; where output goes to a file, lines of a width that the tables fit in."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def print_parameters(result: Mapping[str, Any]) -> None:
    """Print what trains and what is frozen, before the first step."""
    table = Table(title="parameters", title_justify="left")
    table.add_column("group")
    for column in ("trainable", "total", "share"):
        table.add_column(column, justify="right")
    for group, count in result["parameters"].items():
        if count["total"]:
            share = count["trainable"] / count["total"]
            table.add_row(group, f"{count['trainable']:,}", f"{count['total']:,}", f"{share:.2%}")
    console = _console()
    console.print(table)
    strategies = sorted({row["strategy"] for row in result["fused"]})
    if result["fused"]:
        console.print(f"{len(result['fused'])} layers with LoRA, strategy {', '.join(strategies)}")
    for row in result["skipped"]:
        console.print(f"left alone: {row['name']} ({row['reason']})")
    for note in result["notes"]:
        console.print(f"note: {note}")


def print_result(result: Mapping[str, Any], directory: Path) -> None:
    """Print the scores of a finished run, its size, time and memory, and the files it left."""
    title = f"{result['task']} · {result['model_name']} · {result['method']} on {result['device']}"
    table = Table(title=title, title_justify="left")
    # Held-out splits may have more scores than train, and of written texts there is no baseline.
    names = list(dict.fromkeys(name for row in result["metrics"].values() for name in row))
    guesses = result["baseline"]["splits"]
    table.add_column("split")
    table.add_column("rows scored", justify="right")
    for name in (*names, *([result["baseline"]["name"]] if guesses else [])):
        table.add_column(name, justify="right")
    for split, metrics in result["metrics"].items():
        found = [metrics.get(name) for name in names] + ([guesses[split]] if guesses else [])
        numbers = ["-" if number is None else f"{number:.4f}" for number in found]
        table.add_row(split, f"{result['scored'][split]:,}", *numbers)
    console = _console()
    console.print(table)
    counts, memory = result["parameters"], result["peak_memory"]
    console.print(
        f"trained {counts['all']['trainable']:,} of {counts['all']['total']:,} parameters "
        f"(LoRA {counts['lora']['trainable']:,}, head {counts['head']['trainable']:,}) in "
        f"{result['seconds']:.0f} s, {result['samples_per_second']:.0f} samples/s, "
        f"peak memory {memory['bytes'] / 2**20:,.0f} MiB ({memory['of']})"
    )
    if "ranks" in result:
        ranks = result["ranks"].values()
        console.print(
            f"ranks from {min(ranks)} to {max(ranks)}, {sum(ranks)} in all, which are "
            f"{result['lora_parameters_left']:,} parameters"
        )
    for split, count in result["repeated_texts"].items():
        if count:
            console.print(f"note: {count} {split} rows have a text that is in train too")
    for note in result.get("notes", ()):  # earlier versions wrote none
        console.print(f"note: {note}")
    names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in directory.iterdir())
    console.print(f"{directory}/: {', '.join(names)}")
