"""The tasks: one row each, and one loader that turns any of them into the same columns.

A row says where the texts and labels are. `load` reads them from the Hugging Face hub or from a
directory of CSV files, or builds them. Each split becomes a `datasets.Dataset` with the columns
`text`, `labels` and, for sentence pairs, `text_pair`. Where a target is to be written, the columns
are `text`, the prompt, and `target`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from . import digits, docstrings
from .splits import SPLITS, normalise, stratified_split


@dataclass(frozen=True)
class Task:
    """A task: where its texts and labels are, and how it is scored.

    `columns` lists the known spellings of the text columns; the first one that is present is read.
    Two columns are a sentence pair, or one text with `join`. `labels` are the names of the classes;
    none means regression. `hub` is the path on the Hugging Face hub, `hub_splits` maps our names
    of splits to the hub's. The first of `metrics` is the one to compare runs by; precision, recall
    and F1 are added to those of every classification. A task with `build` is built here and read
    from nowhere. The rows of `images` are pixels, in place of texts.

    A task with `generation` has a prompt and the target that a language model is to write, and no
    label. `generation` says how the model searches: arguments of transformers' `generate`.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    hub: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    join: bool = False
    hub_splits: Mapping[str, str] = field(default_factory=lambda: {name: name for name in SPLITS})
    build: Callable[[], docstrings.Docstrings] | None = None
    images: bool = False
    generation: Mapping[str, Any] | None = None

    @property
    def regression(self) -> bool:
        """Whether the label is a number, and not a class."""
        return not self.labels and self.generation is None

    @property
    def scores(self) -> tuple[str, ...]:
        """All the metrics of a run."""
        rest = ("precision", "recall", "f1") if self.labels else ()
        return tuple(dict.fromkeys((*self.metrics, *rest)))

    @property
    def num_labels(self) -> int:
        """The width of the model's head."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class TaskData:
    """The splits of a task, where they came from, and what of the source they lack, in `notes`.

    `dropped` counts the rows of each split that have no label.
    """

    splits: dict[str, datasets.Dataset]
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)


_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("docstrings", (), tuple(docstrings.PACKAGES), build=docstrings.build),
        Task("digits", (), tuple("0123456789"), build=digits.build, images=True),
        Task("sst2", (("sentence",),), ("negative", "positive"), ("nyu-mll/glue", "sst2")),
        Task("cola", (("sentence",),), ("unacceptable", "acceptable"), ("nyu-mll/glue", "cola"),
             metrics=("matthews", "accuracy")),
        Task("mrpc", (("sentence1", "sentence2"),), ("not_equivalent", "equivalent"),
             ("nyu-mll/glue", "mrpc"), metrics=("accuracy", "f1")),
        Task("rte", (("sentence1", "sentence2"),), _ENTAILMENT, ("nyu-mll/glue", "rte")),
        Task("stsb", (("sentence1", "sentence2"),), (), ("nyu-mll/glue", "stsb"),
             metrics=("pearson", "spearman", "mse")),
        Task("qnli", (("question", "sentence"),), _ENTAILMENT, ("nyu-mll/glue", "qnli")),
        Task("qqp", (("question1", "question2"),), ("not_duplicate", "duplicate"),
             ("nyu-mll/glue", "qqp"), metrics=("accuracy", "f1")),
        Task("mnli", (("premise", "hypothesis"),), _NLI, ("nyu-mll/glue", "mnli"),
             hub_splits={"train": "train", "validation": "validation_matched",
                         "test": "test_matched"}),
        Task("snli", (("premise", "hypothesis"),), _NLI, ("stanfordnlp/snli",)),
        Task("ag_news", (("text",), ("title", "description")),
             ("World", "Sports", "Business", "Sci/Tech"), ("fancyzhx/ag_news",), join=True),
        Task("sms_spam", (("text",), ("sms",)), ("ham", "spam"), ("ucirvine/sms_spam",),
             metrics=("accuracy", "f1")),
        Task("e2e_nlg", (("mr", "ref"), ("meaning_representation", "human_reference")), (),
             ("tuetschek/e2e_nlg",), metrics=("bleu", "rouge_l", "nist", "meteor", "cider"),
             generation={"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4}),
    )
}  # fmt: skip


def task_of(name: str) -> Task:
    """The row called `name`. Raises ValueError with near misses if there is none."""
    if name not in TASKS:
        close = difflib.get_close_matches(name.lower().replace("-", ""), TASKS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(TASKS)}"
        raise ValueError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def load(task: Task, data_dir: str | Path | None = None) -> TaskData:
    """Every labelled split of `task`, from `data_dir` if it is given, or else from the hub.

    Rows without a label, or with the class -1, are dropped and counted: their label is hidden, or
    the annotators did not agree. A split of such rows alone is left out. A source with a single
    split is split 80/10/10 by `stratified_split`.

    Raises FileNotFoundError for a missing directory or file, and ValueError for missing columns and
    labels that do not parse, naming the file and what was found.
    """
    if task.build is not None:
        if data_dir is not None:
            raise ValueError(f"the {task.name} task is built here; it takes no --data-dir")
        built = task.build()
        column = "pixels" if task.images else "text"
        splits = {
            name: datasets.Dataset.from_dict(
                {column: [content for content, _ in rows], "labels": [label for _, label in rows]}
            )
            for name, rows in built.splits.items()
        }
        return TaskData(splits, {"from": "built", "python": built.python, "sha256": built.sha256})
    if data_dir is not None:
        raw = _read_directory(Path(data_dir))
        origin = {"from": "directory", "files": {name: path for name, (path, _) in raw.items()}}
        found = {name: _examples(task, *rows) for name, rows in raw.items()}
    else:
        try:
            loaded = datasets.load_dataset(*task.hub)
        except OSError as error:  # no network, or the hub does not have it
            raise FileNotFoundError(
                f"task {task.name} could not be fetched from the hub ({error}); "
                "--data-dir reads it from local files"
            ) from error
        origin = {"from": "hub", "path": list(task.hub)}
        found = {
            name: _examples(task, f"{task.hub[0]} [{split}]", loaded[split])
            for name, split in task.hub_splits.items()
            if split in loaded
        }
    notes = [
        f"{name}: {drop} rows without a label are dropped"
        for name, (_, drop) in found.items()
        if drop
    ]
    dropped = {name: drop for name, (_, drop) in found.items()}
    splits = {name: split for name, (split, _) in found.items() if len(split)}
    if "train" not in splits:
        raise ValueError(f"task {task.name}: no labelled train split in {origin}")
    if len(splits) == 1:
        splits = _split_one(task, splits["train"])
        origin["split"] = "80/10/10 by a hash of the text, repeats kept together"
        if not len(splits["train"]):
            raise ValueError(f"task {task.name}: too few different texts to split in {origin}")
        found |= {name: (split, 0) for name, split in splits.items()}
    empty = [name for name in found if not len(splits.get(name, ()))]
    notes += [f"{name}: left out, since no row of it is left" for name in empty]
    kept = {name: split for name, split in splits.items() if len(split)}
    return TaskData(kept, origin, tuple(notes), dropped)


def majority_baseline(task: Task, splits: Mapping[str, datasets.Dataset]) -> dict[str, float]:
    """Split -> the score of one constant guess: train's commonest label, or the mean of its labels.

    The score is the accuracy for classes, the mean squared error for regression. Where a target is
    to be written there is none.
    """
    if task.generation is not None:
        return {}
    train = splits["train"]["labels"]
    if task.regression:
        guess = sum(train) / len(train)
        return {
            name: sum((label - guess) ** 2 for label in split["labels"]) / len(split)
            for name, split in splits.items()
        }
    guess = Counter(train).most_common(1)[0][0]
    return {
        name: sum(label == guess for label in split["labels"]) / len(split)
        for name, split in splits.items()
    }


def repeated_texts(splits: Mapping[str, datasets.Dataset]) -> dict[str, int]:
    """Held-out split -> how many of its rows have a text of train: a leak that inflates scores."""
    seen = set(_keys(splits["train"]))
    return {
        name: sum(key in seen for key in _keys(split))
        for name, split in splits.items()
        if name != "train"
    }


def metrics_of(task: Task, predictions: Any, labels: Any) -> dict[str, float]:
    """Metric -> score of `predictions` [rows, num_labels] against `labels` [rows].

    Precision, recall and F1 are those of class 1 where there are two classes, and otherwise means
    over the classes that occur; one that is never predicted has precision 0 there. A score that is
    not defined is NaN: a correlation with a constant, precision where nothing is predicted as
    positive.
    """
    import numpy as np
    from scipy import stats
    from sklearn import metrics

    guesses = predictions.reshape(-1) if task.regression else predictions.argmax(axis=-1)
    varied = all(np.isfinite(v).all() and v.min() < v.max() for v in (guesses, labels))
    options: dict[str, Any] = {"average": "macro", "zero_division": 0.0}
    if task.num_labels == 2:
        options = {"average": "binary", "zero_division": math.nan}
    formulas: dict[str, Callable[[], float]] = {
        "accuracy": lambda: (guesses == labels).mean(),
        "precision": lambda: metrics.precision_score(labels, guesses, **options),
        "recall": lambda: metrics.recall_score(labels, guesses, **options),
        "f1": lambda: metrics.f1_score(labels, guesses, **options),
        "matthews": lambda: metrics.matthews_corrcoef(labels, guesses),
        "pearson": lambda: stats.pearsonr(labels, guesses).statistic if varied else math.nan,
        "spearman": lambda: stats.spearmanr(labels, guesses).statistic if varied else math.nan,
        "mse": lambda: np.square(labels - guesses).mean(),
    }
    return {name: float(formulas[name]()) for name in task.scores}


def _read_directory(directory: Path) -> dict[str, tuple[str, list[dict[str, str]]]]:
    """Split -> (path, rows) of `<split>.csv` or `<split>.csv.gz`; `all.csv` is train if alone."""
    if not directory.is_dir():
        raise FileNotFoundError(f"--data-dir {directory} is not a directory")
    found: dict[str, tuple[str, list[dict[str, str]]]] = {}
    for name in (*SPLITS, "all"):
        for path in (directory / f"{name}.csv", directory / f"{name}.csv.gz"):
            if path.is_file():
                found[name] = (str(path), _read_csv(path))
                break
    if "all" in found and "train" not in found:
        found["train"] = found["all"]
    found.pop("all", None)
    if "train" not in found:
        there = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"no train.csv, train.csv.gz or all.csv in --data-dir {directory}; it holds {there}"
        )
    return found


def _read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; blank lines are no rows."""
    opener = gzip.open if path.suffix == ".gz" else open
    limit = csv.field_size_limit(sys.maxsize)  # a text may be long
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)  # a quote that is never closed is an error
            header, *lines = [line for line in reader if line] or [[]]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(limit)
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise ValueError(f"{path}: the header names {', '.join(map(repr, twice))} more than once")
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            kind = "fewer" if len(line) < len(header) else "more"
            raise ValueError(f"{path}: row {number} has {kind} fields than the header")
    return [dict(zip(header, line, strict=True)) for line in lines]


def _examples(
    task: Task, source: str, rows: Iterable[Mapping[str, Any]]
) -> tuple[datasets.Dataset, int]:
    """Raw rows, turned into the columns that every task shares, and how many have no label."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"{source} holds no rows")
    columns = next((c for c in task.columns if set(c) <= rows[0].keys()), None)
    if columns is None or (task.generation is None and "label" not in rows[0]):
        wanted = " or ".join("+".join(c) for c in task.columns)
        wanted += ", and label" if task.generation is None else ""
        raise ValueError(
            f"{source}: task {task.name} needs the columns {wanted}; "
            f"found {', '.join(map(str, rows[0]))}"
        )
    if task.generation is not None:
        return _prompts(columns, rows, source)
    table: dict[str, list[Any]] = {"text": [], "labels": []}
    pair = len(columns) == 2 and not task.join
    dropped = 0
    if pair:
        table["text_pair"] = []
    for number, row in enumerate(rows, start=1):
        texts = [row[column] for column in columns]
        if any(text is None for text in texts):
            raise ValueError(f"{source}: row {number} holds no text")
        label = _label(task, row["label"], f"{source}: row {number}")
        if label is None:
            dropped += 1
            continue
        table["text"].append(texts[0] if pair else " ".join(texts))
        table["labels"].append(label)
        if pair:
            table["text_pair"].append(texts[1])
    return datasets.Dataset.from_dict(table), dropped


def _prompts(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], source: str
) -> tuple[datasets.Dataset, int]:
    """Prompts and their targets, and how many rows have no target."""
    pairs = [[row[column] for column in columns] for row in rows]
    for number, (prompt, _) in enumerate(pairs, start=1):
        if not prompt:
            raise ValueError(f"{source}: row {number} holds no text")
    kept = [(prompt, target) for prompt, target in pairs if target and target.strip()]
    table = {"text": [prompt for prompt, _ in kept], "target": [target for _, target in kept]}
    return datasets.Dataset.from_dict(table), len(pairs) - len(kept)


def _label(task: Task, value: Any, where: str) -> int | float | None:
    """The label that `value` spells: a class id, a class name or a score; None if it is missing."""
    label: int | float
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    try:
        label = float(value) if task.regression else int(value)
    except ValueError:
        label = math.nan
    if not (math.isfinite(label) if task.regression else -1 <= label < task.num_labels):
        known = ", ".join(f"{i}={name}" for i, name in enumerate(task.labels))
        wanted = "a finite number" if task.regression else f"one of {known}"
        raise ValueError(f"{where}: label {value!r} is not {wanted}")
    return None if label == -1 and not task.regression else label


def _split_one(task: Task, whole: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """The splits of a source that has none of its own."""
    keys = _keys(whole)
    classes = whole["labels"] if task.labels else [0] * len(whole)
    names = stratified_split(keys, classes, keys)
    return {
        name: whole.select([row for row, split in enumerate(names) if split == name])
        for name in SPLITS
    }


def _keys(split: datasets.Dataset) -> list[str]:
    """Two rows with the same key are the same example: their normalised texts are equal."""
    if "pixels" in split.column_names:
        return [str(pixels) for pixels in split["pixels"]]
    pairs = split["text_pair"] if "text_pair" in split.column_names else [""] * len(split)
    return [f"{normalise(a)}|{normalise(b)}" for a, b in zip(split["text"], pairs, strict=True)]
