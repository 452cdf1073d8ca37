"""Tables and figures of a sweep, beside what was published: `python -m models.report runs/sweep`.

Writes one page, `report.html`, which holds its figures and needs no other file; the same as
`report.md` with its figures in a folder; and `cells.csv`, a row for each run. Cells that have no
run are shown as missing.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from lora_kernels.durable import replacing

from .recipes import RECIPES, recipe_of
from .recipes.recipe import Recipe
from .reporting.compare import claims
from .reporting.figures import figures, png
from .reporting.frame import NUMBERS, by_epoch, frame_of, published, splits, summary

CELLS = "cells.csv"
TEMPLATES = Path(__file__).parent / "reporting" / "templates"
# How columns of numbers are printed.
FORMS = {
    "parameters": ",.0f", "MiB": ",.0f", "s an epoch": ".3g", "CV": ".2%", "best epoch": "g",
    "minutes": ".2f", "p": ".3g", "difference": "+.4f", "detectable": ".3g",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table to print: its title, a sentence on it, the names of its columns, and its cells."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG file."""

    name: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as an address that holds all of it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """What a report says of one recipe."""

    name: str
    title: str
    done: int
    cells: int
    caption: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    absent: Sequence[str]
    notes: Sequence[str]
    runs: pd.DataFrame


def section_of(recipe: Recipe, runs: Path) -> Section:
    """Everything about a recipe's runs below `runs`."""
    frame = frame_of(recipe, runs)
    done = frame[frame["state"] == "done"]
    tested = claims(recipe, frame) if recipe.claims else pd.DataFrame()
    beside = published(recipe, frame)
    tables = [
        table(
            "Results",
            f"{_score_in_words(recipe, done)} Missing cells are not counted in n.",
            summary(recipe, frame),
        ),
        table("Beside the published numbers", _published_in_words(recipe), beside),
        table("Scores of each split", "After the last epoch, means over seeds.",
              splits(recipe, frame) if len(done) else pd.DataFrame()),
        table("Variation by epoch", "The coefficient of variation (CV) of the validation scores of "
              "all seeds, after each epoch.", by_epoch(recipe, frame), ".2%"),
        table("Does one beat the other?", "Two-sided tests at 5 %, not corrected for their number. "
              "McNemar's test takes the predictions after the last epoch. A difference as large as "
              "the column detectable says is found in four of five cases (a power of 80 %).",
              tested),
    ]  # fmt: skip
    return Section(
        recipe.name,
        recipe.title,
        len(done),
        len(frame),
        _caption(recipe, done),
        [found for found in tables if found.rows],
        [Picture(name, text, png(figure)) for name, text, figure in figures(recipe, frame)],
        [
            f"{row['cell']}: {row['state']}{', ' * bool(row['why'])}{row['why']}"
            for _, row in frame.iterrows()
            if row["state"] != "done"
        ],
        _notes(done),
        frame[["cell", "state", "why", "score", "epoch", *NUMBERS]],
    )


def table(title: str, text: str, frame: pd.DataFrame, form: str = ".4f") -> Table:
    """A frame made ready to print. A number that is not there is a dash.

    Columns without a row in `FORMS` are printed by `form`.
    """
    empty = [name for name in frame if frame[name].isin(["", None]).all()]
    frame = frame.drop(columns=[name for name in empty if name in ("published", "remarks")])
    rows = [
        [
            _cell(value, FORMS.get(name, form))
            for name, value in zip(frame.columns, row, strict=True)
        ]
        for row in frame.itertuples(index=False)
    ]
    return Table(title, text, list(frame.columns), rows)


def _cell(value: Any, form: str) -> str:
    if isinstance(value, str):
        return value
    return "-" if math.isnan(value) else format(value, form)


def _score_in_words(recipe: Recipe, done: pd.DataFrame) -> str:
    firsts = dict.fromkeys(result["primary_metric"] for result in done["result"])
    metric = recipe.metric or " or ".join(firsts) or "the task's first metric"
    when = "in the best epoch" if recipe.pick == "best" else "after the last epoch"
    text = f"The score is {metric} on {recipe.split}, {when}, summed up by its {recipe.statistic}."
    return f"{text} CV is std over mean. Seconds and MiB are those of training."


def _published_in_words(recipe: Recipe) -> str:
    if recipe.is_small:
        return (
            "Published numbers are of the full form, on another base and more rows: a small form "
            "does not reproduce them, and the difference says only that."
        )
    return "The difference is ours less the published number, or less the nearest end of a range."


def _caption(recipe: Recipe, done: pd.DataFrame) -> list[str]:
    """What the numbers are of: base, rows, seeds, machine."""
    if done.empty:
        return ["No cell has been run."]
    results = list(done["result"])
    bases = dict.fromkeys(result["model_name"] for result in results)
    rows = dict.fromkeys(
        f"{result['task']} "
        + ", ".join(f"{name} {count:,}" for name, count in result["rows"].items())
        for result in results
    )
    seeds = sorted(set(done["seed"]))
    lines = [
        f"Base: {', '.join(bases)}. Seeds: {', '.join(map(str, seeds))}. "
        f"Device: {', '.join(dict.fromkeys(result['device'] for result in results))}.",
        f"Rows: {'; '.join(rows)}.",
    ]
    if recipe.is_small:
        full = recipe_of(recipe.name.removesuffix("-small"))
        base = full.base.get("model") or ", ".join(full.axes.get("model", {}))
        lines.insert(
            0,
            f"Small form: the base and the rows below stand in for {base}. Its learning rates are "
            "not tuned, which hurts full fine-tuning most, so it does not rank the methods.",
        )
    if any(name.startswith("tiny") for name in bases):
        lines.append("A tiny random base shows that the command works; its scores say nothing.")
    return lines + ([recipe.note] if recipe.note else [])


def _notes(done: pd.DataFrame) -> list[str]:
    """What the runs note: each note once, with the number of cells that have it."""
    counts: dict[str, int] = {}
    for result in done["result"]:
        found = list(result.get("notes", ()))
        found += [
            f"rows of {result['task']}'s {split} split whose text is in train too: {count}"
            for split, count in result["repeated_texts"].items()
            if count
        ]
        for note in dict.fromkeys(found):
            counts[note] = counts.get(note, 0) + 1
    return [f"{note} ({count} of {len(done)} cells)" for note, count in counts.items()]


def sections_of(runs: Path) -> list[Section]:
    """A section for each recipe with a folder in `runs`, in the order of the recipes.

    Raises FileNotFoundError where there is none, with near misses.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"{runs} is not a directory")
    forms = [form for recipe in RECIPES.values() for form in (recipe, recipe.small_form())]
    found = [form for form in forms if (runs / form.name).is_dir()]
    if not found:
        names = sorted(path.name for path in runs.iterdir() if path.is_dir())
        known = [form.name for form in forms]
        close = [c for name in names for c in difflib.get_close_matches(name, known, n=1)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(
            f"{runs} holds no recipe's runs, but {', '.join(names) or 'nothing'}{hint}"
        )
    return [section_of(recipe, runs) for recipe in found]


def render(sections: Sequence[Section], template: str, **values: Any) -> str:
    """The report in HTML or Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(sections=sections, **values)


def write(sections: Sequence[Section], out: Path, command: str) -> Mapping[str, Path]:
    """Write the page, the Markdown and its figures into `out`."""
    paths = {name: out / name for name in ("report.html", "report.md")}
    for section in sections:
        for picture in section.pictures:
            with replacing(out / "figures" / f"{section.name}-{picture.name}.png") as aside:
                aside.write_bytes(picture.png)
    with replacing(out / CELLS) as aside:
        rows = pd.concat([section.runs for section in sections])
        rows.dropna(axis="columns", how="all").to_csv(aside, index=False)
    for name, path in paths.items():
        with replacing(path) as aside:
            aside.write_text(render(sections, name, command=command), encoding="utf-8")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the report; the exit status is 2 where nothing is found."""
    parser = argparse.ArgumentParser(
        prog="python -m models.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, help="the --runs of the sweep")
    parser.add_argument("--out", type=Path, help="where to write (default: into the runs)")
    options = parser.parse_args(argv)
    try:
        sections = sections_of(options.runs)
        out = options.out or options.runs
        paths = write(sections, out, f"python -m models.report {options.runs}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for section in sections:
        print(f"{section.name}: {section.done} of {section.cells} cells")
    print(*paths.values(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
