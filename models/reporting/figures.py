"""The figures of a report, drawn from its frame: curves, maps, and what a score costs."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # pyplot would choose a display
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from ..recipes.recipe import Labels, Recipe
from ..record.show import plot_ranks
from .frame import groups, matching

MOST_LINES = 20  # of a panel: more cannot be told apart
MOST_INSIDE = 6  # names of lines that leave room for the lines
MOST_BARS = 40


def figures(recipe: Recipe, frame: pd.DataFrame) -> Iterator[tuple[str, str, Figure]]:
    """A name for the file, a caption, and the figure, for each that the runs have numbers for."""
    done = frame[frame["state"] == "done"]
    if done.empty:
        return
    what = recipe.metric or "score"
    if any(sum(map(math.isfinite, curve)) > 1 for curve in done["curve"]):
        text = f"Validation {what} by epoch: mean over seeds, and a band of one standard deviation."
        yield "curves", text, _curves(recipe, done)
    if recipe.heat:
        rows, columns = recipe.heat
        yield "map", f"{what} over {rows} and {columns}.", _maps(recipe, frame, rows, columns)
    if done["method's parameters"].nunique() > 1 and done["score"].notna().any():
        text = f"{what} against the parameters that the method trains, besides the head."
        yield "parameters", text, _parameters(recipe, done)
    if len(groups(recipe, done)) <= MOST_BARS:
        text = "Seconds of training an epoch, and peak memory of training: means over seeds."
        yield "costs", text, _bars(recipe, done)
    for labels, group in groups(recipe, done):
        result = group.iloc[0]["result"]
        if "ranks" in result:
            name = f"ranks-{'-'.join(labels.values())}".replace(" ", "_")
            text = f"Ranks at the end, {_name(labels)}, seed {group.iloc[0]['seed']}."
            yield name, text, plot_ranks(result["ranks"])


def png(figure: Figure) -> bytes:
    """The figure as a PNG file that is the same for the same numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _name(labels: Labels) -> str:
    return ", ".join(labels.values())


def _panels(recipe: Recipe, frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A panel for each label of the first axis, where there are several axes."""
    if len(recipe.axes) < 2:
        return [("", frame)]
    axis = next(iter(recipe.axes))
    return [(f"{axis}: {label}", part) for label, part in frame.groupby(axis, sort=False)]


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _curves(recipe: Recipe, done: pd.DataFrame) -> Figure:
    panels = _panels(recipe, done)
    figure, all_axes = _grid(len(panels), 4.6, 3.4)
    for axes, (title, part) in zip(all_axes, panels, strict=True):
        lines = groups(recipe, part)
        colours = colormaps["viridis"]
        for number, (labels, group) in enumerate(lines):
            curves = pd.DataFrame([curve for curve in group["curve"] if curve])
            mean, spread = curves.mean(), curves.std()
            epochs = [epoch + 1 for epoch in curves.columns]
            colour = colours(number / max(1, len(lines) - 1) * 0.9)
            names = list(labels.values())[1:] if title else list(labels.values())
            axes.plot(epochs, mean, "o-", color=colour, label=", ".join(names), markersize=3)
            if len(curves) > 1:
                axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15)
        base = [result["baseline"] for result in part["result"]]
        if base and base[0]["name"] == "majority class" and "validation" in base[0]["splits"]:
            axes.axhline(base[0]["splits"]["validation"], color="0.5", linestyle="--",
                         label="largest class")  # fmt: skip
        metric = recipe.metric or part.iloc[0]["result"]["primary_metric"]
        axes.set(title=title, xlabel="epoch", ylabel=f"validation {metric}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(lines) <= MOST_LINES:
            beside = len(lines) > MOST_INSIDE
            place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if beside else {}
            axes.legend(fontsize=7, **place)
    return figure


def _maps(recipe: Recipe, frame: pd.DataFrame, rows: str, columns: str) -> Figure:
    """A map of the score for each combination of the other axes; an empty cell says so."""
    others = [axis for axis in recipe.axes if axis not in (rows, columns)]
    panels = list(frame.groupby(others, sort=False)) if others else [((), frame)]
    names = [list(recipe.axes[axis]) for axis in (rows, columns)]
    figure, all_axes = _grid(len(panels), 1.6 + 0.8 * len(names[1]), 1.4 + 0.42 * len(names[0]))
    low, high = frame["score"].min(), frame["score"].max()
    for axes, (labels, part) in zip(all_axes, panels, strict=True):
        table = [
            [
                matching(part, {rows: row, columns: column})["score"].agg(recipe.statistic)
                for column in names[1]
            ]
            for row in names[0]
        ]
        draw_map(axes, table, (rows, columns), names, (low, high))
        title = ", ".join(f"{a}: {v}" for a, v in zip(others, labels, strict=True))
        axes.set(title=title)
    return figure


def draw_map(
    axes: Axes,
    table: Sequence[Sequence[float]],
    titles: tuple[str, str],
    names: Sequence[Sequence[str]],
    ends: tuple[float, float],
) -> None:
    """A map of numbers with its rows' and columns' titles and names; `ends` are those of colour."""
    low, high = ends
    axes.imshow(table, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(names[1])), names[1])
    axes.set_yticks(range(len(names[0])), names[0])
    axes.set(xlabel=titles[1], ylabel=titles[0])
    for y, values in enumerate(table):
        for x, value in enumerate(values):
            missing = not math.isfinite(value)
            bright = not missing and high > low and (value - low) / (high - low) > 0.6
            axes.text(x, y, "missing" if missing else f"{value:.3f}", ha="center", va="center",
                      fontsize=8, color="black" if missing or bright else "white")  # fmt: skip


def _parameters(recipe: Recipe, done: pd.DataFrame) -> Figure:
    panels = _panels(recipe, done)
    figure, all_axes = _grid(len(panels), 4.2, 3.2)
    for axes, (title, part) in zip(all_axes, panels, strict=True):
        names: dict[tuple[float, float], list[str]] = {}  # of points at the same place
        for labels, group in groups(recipe, part):
            x, y = group["method's parameters"].mean(), group["score"].mean()
            name = list(labels.values())[1:] if title else list(labels.values())
            names.setdefault((x, y), []).append(", ".join(name))
            error = group["score"].std()
            axes.errorbar(x, y, None if math.isnan(error) else error, fmt="o", capsize=3)
        for place, found in names.items():
            axes.annotate("\n".join(found), place, fontsize=7, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
        if part["method's parameters"].min() > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="x", labelsize=8)
        axes.set(title=title, xlabel="parameters", ylabel=recipe.metric or "score")
        axes.margins(x=0.2, y=0.15)
        axes.grid(alpha=0.3)
    return figure


def _bars(recipe: Recipe, done: pd.DataFrame) -> Figure:
    lines = groups(recipe, done)
    figure = Figure(figsize=(9, 1.0 + 0.28 * len(lines)), layout="constrained")
    names = [_name(labels) for labels, _ in lines]
    for axes, column in zip(
        figure.subplots(1, 2, sharey=True), ("seconds an epoch", "memory, MiB"), strict=True
    ):
        values = [group[column].mean() for _, group in lines]
        bars = axes.barh(names, values, color="#4878a8")
        axes.bar_label(bars, fmt="{:,.3g}" if "seconds" in column else "{:,.0f}", fontsize=7)
        axes.set(xlabel=column)
        axes.margins(x=0.15)
    figure.axes[0].invert_yaxis()
    return figure
