"""A recipe: one experiment as a row of data, and the cells that it is made of.

A cell is one run of `models.train`: a label on each axis and a seed.

    flags of a cell = base | flags of its label on each axis | seed
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import Arguments
from ..methods import METHODS

Flags = Mapping[str, Any]
Labels = Mapping[str, str]  # axis -> label

SMALL = "-small"  # ends the name of a small form
SMALL_SEEDS = 2


@dataclass(frozen=True)
class Published:
    """A number that somebody printed, to be set beside ours.

    `where` names the labels that it is of; ours is the mean over the axes that it leaves out. With
    `high` it is a range. `ratio_to` and `minus` name the labels of a second group: the number is
    then the first over the second, or their difference. `by` is "report", "paper", or "formula" for
    a count that nobody measured. `quantity` is a row of `frame.QUANTITIES`.
    """

    where: Labels
    value: float
    spread: float | None = None
    high: float | None = None
    quantity: str = "score"
    by: str = "report"
    ratio_to: Labels | None = None
    minus: Labels | None = None


@dataclass(frozen=True)
class Claim:
    """On `axis` one label is said to beat another, all else equal. The report tests that."""

    axis: str
    better: str
    worse: str


@dataclass(frozen=True, eq=False)  # so it can be the key of a table
class Cell:
    """One run: the recipe's name, a label for each axis, the seed, and the flags of the run.

    The flag `data` names a folder of `--data-dir` where that is not the task's own.
    """

    recipe: str
    labels: Labels
    seed: int
    flags: Flags

    @property
    def name(self) -> str:
        """Its directory below the runs: `recipe/label-label/seed-0`."""
        labels = "-".join(re.sub(r"[^\w.=+]+", "_", label) for label in self.labels.values())
        return f"{self.recipe}/{labels or 'run'}/seed-{self.seed}"

    def directory(self, runs: Path) -> Path:
        """Its run directory."""
        return runs / self.name


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    `item` numbers what it reproduces. `base` are flags of every cell, `axes` maps an axis to its
    labels and a label to its flags. A score is that of `split` after the last epoch, or with `pick`
    "best" that of the best epoch of validation; `metric` None is the task's first. `statistic` says
    how seeds are summed up. `heat` names two axes for a map.

    The small form has `small` over `base`. Of the axes in `small_axes` it has the labels there,
    with their flags over those of the full form.
    """

    name: str
    item: int
    title: str
    base: Flags
    axes: Mapping[str, Mapping[str, Flags]]
    seeds: int
    metric: str | None = None
    split: str = "validation"
    pick: str = "last"
    statistic: str = "mean"
    published: tuple[Published, ...] = ()
    claims: tuple[Claim, ...] = ()
    heat: tuple[str, str] | None = None
    note: str = ""
    small: Flags = field(default_factory=dict)
    small_axes: Mapping[str, Mapping[str, Flags]] = field(default_factory=dict)

    def small_form(self) -> Recipe:
        """The same experiment for a machine without a hub and without a large GPU."""
        axes = {
            axis: {
                label: {**labels[label], **changes}
                for label, changes in self.small_axes.get(axis, _as_they_are(labels)).items()
            }
            for axis, labels in self.axes.items()
        }
        base = {**self.base, **self.small}
        seeds = min(self.seeds, SMALL_SEEDS) if self.seeds > 1 else 1
        return dataclasses.replace(self, name=self.name + SMALL, base=base, axes=axes, seeds=seeds)

    @property
    def is_small(self) -> bool:
        """Whether this is a small form."""
        return self.name.endswith(SMALL)

    def cells(self, seeds: int | None = None) -> Iterator[Cell]:
        """Every cell, seed by seed, so that a sweep that is cut off has whole tables.

        A flag that a cell's method does not read is left out: full fine-tuning has no rank.
        """
        for seed in range(self.seeds if seeds is None else seeds):
            for labels in itertools.product(*self.axes.values()):
                chosen = dict(zip(self.axes, labels, strict=True))
                flags = dict(self.base)
                for axis, label in chosen.items():
                    flags |= self.axes[axis][label]
                method = flags.get("method", Arguments.method)
                unread = METHODS[method].unread
                flags = {name: value for name, value in flags.items() if name not in unread}
                yield Cell(self.name, chosen, seed, flags | {"seed": seed})


def _as_they_are(labels: Iterable[str]) -> dict[str, Flags]:
    return {label: {} for label in labels}
