"""The cells of a recipe as a table: one row a run, with NaN where there is none.

Every table and figure of a report is made from this frame.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ..arguments import Arguments
from ..recipes.recipe import Cell, Labels, Published, Recipe
from ..record.run_directory import PREDICTIONS, RESULT, read_json
from ..sweeping.cells import ERROR

MIB = 2**20
WRITTEN = ("rouge_l", "nist", "meteor", "cider")  # scores of texts besides BLEU, on test


def frame_of(recipe: Recipe, runs: Path) -> pd.DataFrame:
    """A row for each cell of `recipe`: its labels, seed, state, score, sizes and times.

    `state` is "done", "failed" or "missing", and `why` says more. A score that is not defined is
    NaN. `curve` holds the validation scores by epoch.
    """
    places = (runs / recipe.name).glob("*/seed-*")
    ends = [place.name.removeprefix("seed-") for place in places]
    seeds = max([recipe.seeds, *(int(end) + 1 for end in ends if end.isdigit())])
    return pd.DataFrame([_row(recipe, cell, runs) for cell in recipe.cells(seeds)])


def _row(recipe: Recipe, cell: Cell, runs: Path) -> dict[str, Any]:
    directory = cell.directory(runs)
    row: dict[str, Any] = {**cell.labels, "seed": cell.seed, "cell": cell.name, "why": ""}
    row |= dict.fromkeys(("score", "epoch", *NUMBERS), math.nan)
    row |= {"curve": [], "result": None, "directory": directory}
    if not (directory / RESULT).is_file():
        failed = (directory / ERROR).is_file()
        why = read_json(directory / ERROR)["error"] if failed else ""
        return row | {"state": "failed" if failed else "missing", "why": why}
    result = read_json(directory / RESULT)
    before = Arguments().identity() | result["arguments"]  # a flag that came later had its default
    changed = [
        f"{name} {before[name]!r}, not {value!r}"
        for name, value in cell.flags.items()
        if name not in ("data", "model") and before[name] != value
    ]
    if changed:
        return row | {"state": "missing", "why": f"a run with {'; '.join(changed)} is there"}
    score, epoch, why = _score(recipe, result)
    row |= {name: column(result) for name, column in NUMBERS.items()}
    row |= {"state": "done", "why": why, "score": score, "epoch": epoch, "result": result}
    metric = recipe.metric or result["primary_metric"]
    row["curve"] = [_number(epoch.get(f"validation_{metric}")) for epoch in result["history"]]
    if result.get("diverged"):
        row["why"] = "diverged"
    elif worse := _worse(recipe.split, result, metric, score):
        row["why"] = "; ".join(filter(None, (row["why"], worse)))
    return row


def _score(recipe: Recipe, result: Mapping[str, Any]) -> tuple[float, float, str]:
    """The score of a run, the epoch that it is of, and why there is none."""
    metric = recipe.metric or result["primary_metric"]
    history, scores = result["history"], result["metrics"]
    if recipe.split not in scores:
        return math.nan, math.nan, f"the data has no {recipe.split} split"
    if metric not in scores[recipe.split]:
        return math.nan, math.nan, f"{metric} is not a metric of {result['task']}"
    if recipe.pick == "best":
        curve = [_number(row.get(f"{recipe.split}_{metric}")) for row in history]
        finite = [value for value in curve if math.isfinite(value)]
        if not finite:
            return math.nan, math.nan, f"{metric} is not defined in any epoch"
        return max(finite), curve.index(max(finite)) + 1, ""
    score = _number(scores[recipe.split][metric])
    why = "" if math.isfinite(score) else f"{metric} is not defined"
    return score, len(history), why


def _worse(split: str, result: Mapping[str, Any], metric: str, score: float) -> str:
    """Whether a constant guess does as well, in words; a score other than accuracy cannot tell."""
    baseline = result["baseline"]["splits"].get(split)
    scores = result["metrics"].get(split, {})
    if baseline is None:
        return ""
    if "mse" in scores:
        error = _number(scores["mse"])
        return "" if error < baseline else "worse than the mean of the labels"
    accuracy = score if metric == "accuracy" else _number(scores.get("accuracy"))
    return "" if accuracy > baseline else f"no better than the largest class, {baseline:.3f}"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _method_parameters(result: Mapping[str, Any]) -> float:
    """What the method trains: LoRA or adapters, or else all but the head.

    Of adaptive ranks it is what is left at the end.
    """
    if "lora_parameters_left" in result:
        return float(result["lora_parameters_left"])
    counts = {group: count["trainable"] for group, count in result["parameters"].items()}
    return counts["lora"] + counts.get("adapter", 0) or counts["all"] - counts["head"]


def _of(split: str, metric: str | None) -> Callable[[Mapping[str, Any]], float]:
    def read(result: Mapping[str, Any]) -> float:
        return _number(
            result["metrics"].get(split, {}).get(metric or result["primary_metric"], math.nan)
        )

    return read


# Column -> its value of a result.
NUMBERS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "trained": lambda result: result["parameters"]["all"]["trainable"],
    "method's parameters": _method_parameters,
    "seconds an epoch": lambda result: (
        sum(row["seconds"] for row in result["history"]) / len(result["history"])
    ),
    "steps a second": lambda result: (
        result["samples_per_second"]
        / (result["arguments"]["batch_size"] * result["arguments"]["gradient_accumulation"])
    ),
    "minutes": lambda result: result["seconds"] / 60,
    "memory, MiB": lambda result: result["peak_memory"]["bytes"] / MIB,
    **{split: _of(split, None) for split in ("train", "validation", "test")},
    **{f"{split} loss": _of(split, "loss") for split in ("train", "validation", "test")},
    **{name: _of("validation", name) for name in ("precision", "recall", "f1")},
    **{name: _of("test", name) for name in WRITTEN},
}


class Quantity(NamedTuple):
    """A number of a group of runs, and how it is printed."""

    of: Callable[[pd.DataFrame, str], float]
    form: str


def variation(scores: pd.Series) -> float:
    """The coefficient of variation: standard deviation over mean."""
    mean = abs(scores.mean())
    return scores.std() / mean if len(scores.dropna()) > 1 and mean > 0 else math.nan


def _at(epoch: int) -> Callable[[pd.DataFrame, str], float]:
    return lambda group, _: variation(
        pd.Series([curve[epoch] for curve in group["curve"] if curve], dtype=float)
    )


def _mean(column: str) -> Callable[[pd.DataFrame, str], float]:
    return lambda group, _: group[column].mean()


QUANTITIES: dict[str, Quantity] = {
    "score": Quantity(lambda group, statistic: group["score"].agg(statistic), ".4f"),
    "seconds an epoch": Quantity(_mean("seconds an epoch"), ".3g"),
    "steps a second": Quantity(_mean("steps a second"), ".3g"),
    "memory, MiB": Quantity(_mean("memory, MiB"), ",.0f"),
    "method's parameters": Quantity(_mean("method's parameters"), ",.0f"),
    **{name: Quantity(_mean(name), ".4f") for name in WRITTEN},
    "variation, first epoch": Quantity(_at(0), ".2%"),
    "variation, last epoch": Quantity(_at(-1), ".2%"),
}


def matching(frame: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """The rows with these labels."""
    for axis, label in labels.items():
        frame = frame[frame[axis] == label]
    return frame


def summary(recipe: Recipe, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each combination of labels: n of N, mean, std, median, CV, best epoch, sizes."""
    rows = []
    for labels, group in groups(recipe, frame):
        scores = group["score"].dropna()
        rows.append(
            {
                **labels,
                "n of N": f"{len(scores)} of {len(group)}",
                "mean": scores.mean(),
                "std": scores.std(),
                "median": scores.median(),
                "CV": variation(scores),
                "best epoch": pd.Series([_best(curve) for curve in group["curve"]]).median(),
                "parameters": group["method's parameters"].mean(),
                "s an epoch": group["seconds an epoch"].mean(),
                "MiB": group["memory, MiB"].mean(),
                "published": _exact(recipe, labels),
                "remarks": "; ".join(
                    f"{why} ({count} of {len(group)})"
                    for why, count in group["why"].value_counts(sort=False).items()
                    if why
                ),
            }
        )
    return pd.DataFrame(rows)


def splits(recipe: Recipe, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each combination of labels: means of the scores and losses of each split."""
    names = [
        *("train", "validation", "test", "train loss", "validation loss", "test loss"),
        *("precision", "recall", "f1", *WRITTEN, "minutes"),
    ]
    rows = [
        {**labels, **{name: group[name].mean() for name in names}}
        for labels, group in groups(recipe, frame)
    ]
    table = pd.DataFrame(rows)
    return table.drop(columns=[name for name in names if table[name].isna().all()])


def by_epoch(recipe: Recipe, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each combination of labels with several seeds: CV of validation by epoch."""
    rows = []
    for labels, group in groups(recipe, frame):
        curves = pd.DataFrame([curve for curve in group["curve"] if curve], dtype=float)
        if len(curves) > 1:
            of_epochs = {f"epoch {at + 1}": variation(curves[at]) for at in curves}
            rows.append({**labels, **of_epochs})
    return pd.DataFrame(rows)


def groups(recipe: Recipe, frame: pd.DataFrame) -> list[tuple[Labels, pd.DataFrame]]:
    """Labels -> the rows of all seeds, in the recipe's order."""
    axes = list(recipe.axes)
    return [
        (dict(zip(axes, labels, strict=True)), group)
        for labels, group in frame.groupby(axes, sort=False)
    ]


def _best(curve: list[float]) -> float:
    finite = [value for value in curve if math.isfinite(value)]
    return curve.index(max(finite)) + 1 if finite else math.nan


def _exact(recipe: Recipe, labels: Labels) -> str:
    rows = [
        row
        for row in recipe.published
        if row.quantity == "score" and row.where == labels and not (row.ratio_to or row.minus)
    ]
    return ", ".join(f"{_printed(row)} ({row.by})" for row in rows)


def _printed(row: Published) -> str:
    form = QUANTITIES[row.quantity].form
    if row.ratio_to or row.minus:
        form = "+.4f" if row.minus else ".3g"
    text = format(row.value, form)
    if row.high is not None:
        text += f" to {format(row.high, form)}"
    return text + (f" ± {format(row.spread, form)}" if row.spread is not None else "")


def published(recipe: Recipe, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each published number of cells that the recipe has: it, ours, the difference."""
    rows = []
    for row in recipe.published:
        wanted = [row.where, row.ratio_to or {}, row.minus or {}]
        if any(label not in recipe.axes[axis] for part in wanted for axis, label in part.items()):
            continue  # the small form leaves these labels out
        if recipe.is_small and row.by == "formula":
            continue  # it counts another base
        quantity = QUANTITIES[row.quantity]
        group = matching(frame, row.where)
        ours = quantity.of(group, recipe.statistic)
        name, form = row.quantity, quantity.form
        if row.ratio_to:
            ours /= quantity.of(matching(frame, row.ratio_to), recipe.statistic)
            name, form = f"{name}, over {_words(row.ratio_to)}", ".3g"
        elif row.minus:
            ours -= quantity.of(matching(frame, row.minus), recipe.statistic)
            name, form = f"{name}, minus {_words(row.minus)}", "+.4f"
        nearest = row.value if row.high is None else min(max(ours, row.value), row.high)
        done = (group["state"] == "done").sum()
        rows.append(
            {
                "of": _words(row.where),
                "what": name,
                "published": f"{_printed(row)} ({row.by})",
                "ours": "missing" if math.isnan(ours) else format(ours, form),
                "difference": "" if math.isnan(ours) else _signed(ours - nearest, form),
                "n of N": f"{done} of {len(group)}",
            }
        )
    return pd.DataFrame(rows)


def _signed(value: float, form: str) -> str:
    return format(value, "+" + form.removeprefix("+"))


def _words(labels: Labels) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in labels.items()) or "all"


def predictions(directory: Path, split: str) -> dict[int, tuple[str, str]]:
    """Row of a split -> label and prediction, of a run's `predictions.csv`; empty without one."""
    path = directory / PREDICTIONS
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            int(row["row"]): (row["label"], row["prediction"])
            for row in csv.DictReader(file)
            if row["split"] == split
        }
