"""The cells of a recipe one by one and packed, side by side: the numbers and the time of both.

    python -m models.side_by_side sms-grid-small --only "data=as committed" --data-dir path/to/data

Both ways run in one process and take turns: after every few steps of the pack comes a whole cell by
itself. So what else the machine does hits both alike. CPU time is that of the process, and has all
that a run does: loading, training, scoring, saving. Training alone is told by the clock. `gain` is
what `--together auto` measures before it chooses.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_kernels.durable import replacing

from .arguments import Arguments
from .recipes import recipe_of
from .recipes.recipe import Cell, Recipe
from .record.run_directory import RESULT, STEPS, read_json
from .reporting.figures import draw_map, png
from .sweep import PRELOAD, chosen
from .sweeping.cells import State, arguments_of, run_cell
from .sweeping.together import Turns

WAYS = ("one by one", "packed")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run both ways, write the numbers and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m models.side_by_side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a row of models/recipes; its map's axes make the picture")
    add("--only", nargs="+", default=[], metavar="AXIS=LABEL", help="cells with these labels")
    add("--flags", nargs="+", default=[], metavar="NAME=VALUE", help="flags over the recipe's")
    add("--runs", type=Path, default=Path("runs/side-by-side"), help="where run directories lie")
    add("--data-dir", type=Path, help="a folder for each task, such as sst2 (default: the hub)")
    add("--out", type=Path, help="the file of numbers (default: side_by_side.json in the runs); "
        "the picture is beside it")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        recipe = recipe_of(options.recipe)
        flags = dict(_flag(text) for text in options.flags)
        cells = [
            dataclasses.replace(cell, flags={**cell.flags, **flags})
            for cell in chosen(recipe, options.only)
        ]
        runs = {
            way: [
                arguments_of(cell, options.runs / way.replace(" ", "-"), options.data_dir)
                for cell in cells
            ]
            for way in WAYS
        }
        if options.runs.exists() and any(options.runs.glob(f"*/{recipe.name}")):
            raise ValueError(f"{options.runs} has runs already: choose other --runs")
        if recipe.heat is None:
            raise ValueError(f"{recipe.name} has no map to draw")
        found = {"recipe": recipe.name, "flags": flags, **measure(recipe, cells, runs)}
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    out = options.out or options.runs / "side_by_side.json"
    for path, content in ((out, _json(found)), (out.with_suffix(".png"), png(picture(found)))):
        with replacing(path) as aside:
            aside.write_bytes(content)
    print(*told(found), out, sep="\n")
    return 0


def measure(
    recipe: Recipe, cells: Sequence[Cell], runs: Mapping[str, Sequence[Arguments]]
) -> dict[str, Any]:
    """Run the cells both ways, in turns, on one thread: the numbers of each cell, and the times.

    Raises ValueError where a run fails or has no place in the pack.
    """
    import torch

    for name in PRELOAD:  # or the first cell would import them in its time
        importlib.import_module(name)
    torch.set_num_threads(1)
    spent = {what: {"CPU seconds": 0.0, "seconds": 0.0} for what in (*WAYS, "gain")}

    def spend(way: str, work: Callable[..., Any], *given: Any) -> Any:
        began = time.process_time(), time.perf_counter()
        answer = work(*given)
        spent[way]["CPU seconds"] += time.process_time() - began[0]
        spent[way]["seconds"] += time.perf_counter() - began[1]
        return answer

    alone, packed = list(runs["one by one"]), list(runs["packed"])

    def tell(run: Arguments, state: State) -> None:
        if state.name != "done":
            raise ValueError(f"{run.directory()}: {state.name}, {state.why}")

    def by_itself() -> None:
        run = alone.pop(0)
        tell(run, spend("one by one", run_cell, run, 1))

    by_itself()
    steps = len(_losses(runs["one by one"][0].directory()))
    turns = Turns(packed, lambda n, state: tell(packed[n], state), 1, halving=False)
    try:
        spend("packed", turns.begin)
        if turns.pack.most < len(cells):
            raise ValueError(f"only {turns.pack.most} of {len(cells)} cells share a base")
        gain = spend("gain", turns.pack.speed)
        made = 0
        while turns.asked:
            if len(alone) > len(cells) * (1 - made / steps):
                by_itself()
            spend("packed", turns.step, turns.batches())
            made += 1
    finally:
        turns.close()
    while alone:
        by_itself()
    return {
        "heat": recipe.heat,
        "score": f"{recipe.split} {recipe.metric}",
        "gain": gain,
        "spent": spent,
        "cells": [
            row(recipe, cell, {way: runs[way][n].directory() for way in WAYS})
            for n, cell in enumerate(cells)
        ],
    }


def row(recipe: Recipe, cell: Cell, places: Mapping[str, Path]) -> dict[str, Any]:
    """What the runs of a cell have found, and the largest relative difference of a step's loss."""
    found: dict[str, Any] = {"cell": cell.name, **cell.labels}
    found |= {name: {} for name in ("scores", "losses", "training seconds")}
    losses = []
    for way, place in places.items():
        result = read_json(place / RESULT)
        metrics = result["metrics"][recipe.split]
        found["scores"][way] = metrics[recipe.metric or result["primary_metric"]]
        found["losses"][way] = metrics["loss"]
        found["training seconds"][way] = result["seconds_of"]["training"]
        losses.append(np.array(_losses(place)))
    one, other = losses
    return found | {"steps": len(one), "difference": float((abs(other - one) / abs(one)).max())}


def picture(found: Mapping[str, Any]) -> Figure:
    """A map of the scores for each way, and bars of the time of both."""
    rows, columns = found["heat"]
    cells = found["cells"]
    names = [list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (rows, columns)]
    scores = [cell["scores"][way] for cell in cells for way in WAYS]
    figure = Figure(figsize=(12, 1.4 + 0.42 * len(names[0])), layout="constrained")
    *maps, bars = figure.subplots(1, 3)
    for axes, way in zip(maps, WAYS, strict=True):
        at = {(cell[rows], cell[columns]): cell["scores"][way] for cell in cells}
        table = [[at[row, column] for column in names[1]] for row in names[0]]
        draw_map(axes, table, (rows, columns), names, (min(scores), max(scores)))
        axes.set(title=f"{found['score']}, {way}")
    times = [seconds(found, way) for way in WAYS]
    for number, (way, colour) in enumerate(zip(WAYS, ("#4878a8", "#d08040"), strict=True)):
        places = [place + 0.4 * number for place in range(len(times[number]))]
        drawn = bars.barh(places, list(times[number].values()), 0.38, color=colour, label=way)
        bars.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=2)
    bars.set_yticks([place + 0.2 for place in range(len(times[0]))], list(times[0]))
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set(xlabel="seconds", title=f"{len(cells)} cells, one thread")
    bars.legend(fontsize=8)
    return figure


def seconds(found: Mapping[str, Any], way: str) -> dict[str, float]:
    """What all cells took one way, in seconds."""
    training = sum(cell["training seconds"][way] for cell in found["cells"])
    spent = found["spent"][way]
    return {
        "all, CPU time": spent["CPU seconds"],
        "all, by the clock": spent["seconds"],
        "training, by the clock": training,
    }


def told(found: Mapping[str, Any]) -> list[str]:
    """What was found, in lines."""
    lines = []
    for cell in found["cells"]:
        scores = ", ".join(f"{way} {score:.4f}" for way, score in cell["scores"].items())
        lines.append(f"{cell['cell']}: {scores}; losses differ by {cell['difference']:.1e}")
    one, other = (seconds(found, way) for way in WAYS)
    for name in one:
        ratio = one[name] / other[name]
        lines.append(f"seconds of {name}: {one[name]:.1f} {WAYS[0]}, {other[name]:.1f} {WAYS[1]} "
                     f"({ratio:.2f})")  # fmt: skip
    return lines


def _flag(text: str) -> tuple[str, Any]:
    """A flag of a run and its value, which is JSON or else a word."""
    name, found, value = text.partition("=")
    if not found or name not in {field.name for field in dataclasses.fields(Arguments)}:
        raise ValueError(f"--flags {text}: not the flag of a run and a value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _json(found: Mapping[str, Any]) -> bytes:
    """A line for all cells, and a line for each."""
    cells = ",\n".join(json.dumps(cell) for cell in found["cells"])
    head = json.dumps({name: value for name, value in found.items() if name != "cells"})
    return f'{head[:-1]}, "cells": [\n{cells}\n]}}\n'.encode()


def _losses(place: Path) -> list[float]:
    with (place / STEPS).open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    sys.exit(main())
