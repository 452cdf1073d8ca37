"""A report has the numbers of the runs; its tests are the textbook's, and its page is whole."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

pytest.importorskip("datasets", reason="the models read their data by it")
from models import recipes, report
from models.recipes.recipe import Cell, Claim, Published, Recipe
from models.record.run_directory import write_csv, write_json
from models.reporting.compare import claims, mcnemar, paired_t, t_power
from models.reporting.figures import figures
from models.reporting.frame import by_epoch, frame_of, published, splits, summary

SCORES = {"lora": (0.80, 0.90, 0.85), "full": (0.60, 0.64, None)}
LABELS = [0, 1, 1, 0, 1, 0, 1, 1, 0, 1]


@pytest.fixture
def toy(monkeypatch) -> Recipe:
    """A recipe of two methods by two tasks and three seeds, with its published numbers."""
    lora, full = {"method": "lora"}, {"method": "full"}
    recipe = Recipe(
        "toy",
        0,
        "A <toy> | of two",
        {"task": "sst2"},
        {
            "task": {"easy": {"epochs": 2}, "hard": {"epochs": 3}},
            "method": {"lora": {}, "full": {"method": "full"}},
        },
        3,
        metric="accuracy",
        published=(
            Published({"task": "easy", "method": "lora"}, 0.86, 0.01),
            Published({"task": "easy", **lora}, 1.3, high=1.4, ratio_to={"task": "easy", **full}),
            Published({"task": "easy", **lora}, 0.5, minus={"task": "easy", **full}, by="paper"),
            Published({"task": "easy", **full}, 50.0, quantity="seconds an epoch"),
            Published({"task": "easy", **lora}, 0.01, quantity="variation, first epoch"),
            Published({"task": "hard", **lora}, 0.7),
        ),
        claims=(Claim("method", "lora", "full"),),
        heat=("task", "method"),
    )
    monkeypatch.setitem(recipes.RECIPES, "toy", recipe)
    return recipe


def write_run(cell: Cell, runs: Path, score: float | None, **changes: Any) -> Path:
    """A run directory as `models.train` leaves it, with an accuracy that rises to `score`."""
    directory = cell.directory(runs)
    directory.mkdir(parents=True)
    method = cell.flags.get("method", "lora")
    first = None if score is None else score - 0.1 * (cell.seed + 1)
    validation = {"loss": 0.5, "accuracy": score, "precision": 0.5, "recall": 0.25, "f1": 1 / 3}
    result = {
        "task": "sst2", "model_name": "toy-base", "method": method, "primary_metric": "accuracy",
        "device": "CPU", "arguments": {**cell.flags, "batch_size": 8, "gradient_accumulation": 2},
        "parameters": {
            "lora": {"trainable": 100 if method == "lora" else 0},
            "head": {"trainable": 10},
            "all": {"trainable": 110 if method == "lora" else 5010},
        },
        "metrics": {"train": {"loss": 0.1, "accuracy": 1.0}, "validation": validation},
        "history": [
            {"epoch": 1, "seconds": 30.0, "validation_accuracy": first},
            {"epoch": 2, "seconds": 50.0, "validation_accuracy": score},
        ],
        "baseline": {"name": "majority class", "splits": {"validation": 0.61}},
        "rows": {"train": 99}, "repeated_texts": {"validation": 7}, "notes": ["a <note>"],
        "seconds": 120.0, "samples_per_second": 160.0, "peak_memory": {"bytes": 3 * 2**20},
        "diverged": False,
        **changes,
    }  # fmt: skip
    write_json(directory / "result.json", result)
    write_csv(
        directory / "predictions.csv",
        [
            {"split": "validation", "row": row, "label": label,
             "prediction": label if row < (9 if method == "lora" else 2) else 1 - label}
            for row, label in enumerate(LABELS)
        ],
    )  # fmt: skip
    return directory


@pytest.fixture
def runs(toy, tmp_path) -> Path:
    """The runs of the easy task; of the hard one a run has failed and the others are missing."""
    for cell in toy.cells():
        if cell.labels["task"] == "easy":
            write_run(cell, tmp_path, SCORES[cell.labels["method"]][cell.seed])
    failed = next(cell for cell in toy.cells() if cell.labels["task"] == "hard")
    failed.directory(tmp_path).mkdir(parents=True)
    write_json(failed.directory(tmp_path) / "error.json", {"error": "ValueError: no such thing"})
    return tmp_path


def row_of(table: pd.DataFrame, **labels: str) -> pd.Series:
    for axis, label in labels.items():
        table = table[table[axis] == label]
    assert len(table) == 1
    return table.iloc[0]


# --- the numbers ----------------------------------------------------------------------------------


def test_seeds_are_summed_up(toy, runs):
    row = row_of(summary(toy, frame_of(toy, runs)), task="easy", method="lora")
    assert row["n of N"] == "3 of 3"
    assert row["mean"] == pytest.approx(0.85) and row["median"] == pytest.approx(0.85)
    assert row["std"] == pytest.approx(statistics.stdev(SCORES["lora"]))
    assert row["CV"] == pytest.approx(statistics.stdev(SCORES["lora"]) / 0.85)
    assert row["best epoch"] == 2 and row["parameters"] == 100
    assert row["s an epoch"] == 40 and row["MiB"] == 3
    assert row["published"] == "0.8600 ± 0.0100 (report)"


def test_what_is_not_defined_or_missing_is_not_counted(toy, runs):
    table = summary(toy, frame_of(toy, runs))
    row = row_of(table, task="easy", method="full")
    assert row["n of N"] == "2 of 3" and row["mean"] == pytest.approx(0.62)
    assert "accuracy is not defined" in row["remarks"]
    assert "no better than the largest class, 0.610 (1 of 3)" in row["remarks"]  # seed 0
    row = row_of(table, task="hard", method="lora")
    assert row["n of N"] == "0 of 3" and math.isnan(row["mean"])
    assert row["remarks"] == "ValueError: no such thing (1 of 3)"


def test_the_best_epoch_and_another_split_are_picked(toy, runs):
    fields = {**vars(toy), "pick": "best", "claims": ()}
    cell = next(toy.cells())
    early = [{"validation_accuracy": value, "seconds": 1.0} for value in (0.95, None, 0.7)]
    shutil.rmtree(cell.directory(runs))
    write_run(cell, runs, 0.7, history=early)
    frame = frame_of(Recipe(**fields), runs)
    assert frame.iloc[0]["score"] == 0.95 and frame.iloc[0]["epoch"] == 1
    low = {"validation": {"loss": 1.0, "accuracy": 0.3}, "train": {"loss": 1.0}}
    shutil.rmtree(cell.directory(runs))
    write_run(cell, runs, 0.3, history=early, metrics=low)
    assert frame_of(Recipe(**fields), runs).iloc[0]["why"] == "", "the best epoch is better"
    absent = frame_of(Recipe(**{**fields, "pick": "last", "split": "test"}), runs)
    assert absent["score"].isna().all()
    assert absent.iloc[0]["why"].startswith("the data has no test split")
    unknown = frame_of(Recipe(**{**fields, "pick": "last", "metric": "pearson"}), runs)
    assert "pearson is not a metric of sst2" in unknown.iloc[0]["why"]


def test_a_regression_worse_than_the_mean_says_so(toy, runs):
    cell = next(toy.cells())
    for mse, told in ((1.0, "worse than the mean"), (0.5, "")):
        shutil.rmtree(cell.directory(runs))
        scores = {"validation": {"loss": mse, "mse": mse, "accuracy": 0.1}, "train": {"mse": 1}}
        base = {"name": "mse of the mean", "splits": {"validation": 0.9}}
        write_run(cell, runs, 0.1, metrics=scores, baseline=base)
        why = frame_of(toy, runs).iloc[0]["why"]
        assert why.startswith(told) and bool(why) == bool(told)


def test_a_run_of_other_flags_is_missing(toy, runs):
    cell = next(toy.cells())
    shutil.rmtree(cell.directory(runs))
    write_run(cell, runs, 0.9, arguments={**cell.flags, "epochs": 77})
    row = frame_of(toy, runs).iloc[0]
    assert row["state"] == "missing" and "epochs 77, not 2" in row["why"]


def test_published_numbers_stand_beside_ours(toy, runs):
    table = published(toy, frame_of(toy, runs))
    score, ratio, gain, seconds, variation, missing = (row for _, row in table.iterrows())
    assert (score["ours"], score["difference"]) == ("0.8500", "-0.0100")
    assert score["of"] == "task easy, method lora" and score["n of N"] == "3 of 3"
    assert ratio["published"] == "1.3 to 1.4 (report)"
    assert ratio["ours"] == format(0.85 / 0.62, ".3g") and float(ratio["difference"]) == 0
    assert gain["published"] == "+0.5000 (paper)"
    assert float(gain["ours"]) == pytest.approx(0.85 - 0.62)
    assert float(gain["difference"]) == pytest.approx(0.23 - 0.5, abs=1e-4)
    assert (seconds["ours"], seconds["difference"]) == ("40", "-10")
    firsts = [score - 0.1 * (seed + 1) for seed, score in enumerate(SCORES["lora"])]
    expected = statistics.stdev(firsts) / statistics.mean(firsts)
    assert variation["ours"] == format(expected, ".2%")
    assert missing["ours"] == "missing" and missing["n of N"] == "0 of 3"


def test_a_count_by_formula_stands_beside_the_full_form_alone(toy, tmp_path):
    count = Published({"method": "lora"}, 7, quantity="method's parameters", by="formula")
    full = Recipe(**{**vars(toy), "published": (count,)})
    for form, rows in ((full, 1), (full.small_form(), 0)):
        assert len(published(form, frame_of(form, tmp_path))) == rows


def test_adaptive_ranks_count_by_what_is_left(toy, tmp_path):
    write_run(next(toy.cells()), tmp_path, 0.9, lora_parameters_left=42)
    assert frame_of(toy, tmp_path).iloc[0]["method's parameters"] == 42


def test_the_variation_over_seeds_is_told_for_each_epoch(toy, runs):
    table = by_epoch(toy, frame_of(toy, runs))
    assert table["method"].tolist() == ["lora", "full"] and set(table["task"]) == {"easy"}
    row = row_of(table, method="lora")
    firsts = [score - 0.1 * (seed + 1) for seed, score in enumerate(SCORES["lora"])]
    for epoch, scores in ((1, firsts), (2, SCORES["lora"])):
        expected = statistics.stdev(scores) / statistics.mean(scores)
        assert row[f"epoch {epoch}"] == pytest.approx(expected)
    (shown,) = (t for t in report.section_of(toy, runs).tables if t.title == "Variation by epoch")
    assert shown.rows[0][-1] == f"{row['epoch 2']:.2%}"


def test_a_first_metric_is_named(toy, runs):
    unnamed = Recipe(**{**vars(toy), "metric": None})
    text = report.section_of(unnamed, runs).tables[0].text
    assert text.startswith("The score is accuracy on validation, after the last epoch")


def test_splits_have_scores_losses_and_minutes(toy, runs):
    table = splits(toy, frame_of(toy, runs))
    row = row_of(table, task="easy", method="lora")
    assert row["train"] == 1 and row["validation"] == pytest.approx(0.85)
    assert row["train loss"] == pytest.approx(0.1) and row["minutes"] == 2 and row["recall"] == 0.25
    assert "test" not in table


# --- the tests ------------------------------------------------------------------------------------


def test_the_paired_test_is_scipys_and_knows_its_power():
    first, second = [0.9, 0.8, 0.85, 0.7, 0.95], [0.85, 0.79, 0.8, 0.71, 0.9]
    found = paired_t(first, second)
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert found.difference == pytest.approx(np.subtract(first, second).mean())
    # Cohen's table for paired samples: 10 pairs, an effect of 1.0.
    assert t_power(10, 1.0) == pytest.approx(0.803, abs=0.002)
    assert t_power(10, 1e-6) == pytest.approx(0.05, abs=1e-3)
    deviation = np.subtract(first, second).std(ddof=1)
    assert t_power(5, found.detectable / deviation) == pytest.approx(0.8)
    assert paired_t([1.0], [0.5]) is None and paired_t([1.0, math.nan], [0.5, 0.5]) is None
    assert paired_t([0.5, 0.5], [0.5, 0.5]).p == 1.0


def test_mcnemar_is_exact_and_knows_its_power():
    first = [True] * 12 + [False] * 3 + [True] * 85
    second = [False] * 12 + [True] * 3 + [True] * 85
    found = mcnemar(first, second)
    assert found.p == pytest.approx(stats.binomtest(12, 15).pvalue)
    assert found.difference == pytest.approx(0.09) and "12 rows" in found.of
    # An excess as large as `detectable`, drawn many times, is found in four of five cases.
    share = 0.5 + found.detectable * 100 / 15 / 2
    drawn = np.random.default_rng(0).binomial(15, share, 4000)
    power = np.mean([stats.binomtest(int(k), 15).pvalue < 0.05 for k in drawn])
    assert power == pytest.approx(0.8, abs=0.03)
    few = mcnemar([True] * 5 + [True], [False] * 5 + [True])
    assert few.p > 0.05 and math.isnan(few.detectable) and "too few" in few.verdict
    assert mcnemar([], []) is None and mcnemar([True], [True]).p == 1.0


def test_claims_are_tested_on_pairs_of_the_same_seed(toy, runs):
    table = claims(toy, frame_of(toy, runs))
    easy = table[table["where"] == "task easy"]
    t = easy[easy["test"] == "paired t"].iloc[0]
    assert t["p"] == pytest.approx(stats.ttest_rel([0.8, 0.9], [0.6, 0.64]).pvalue)
    assert t["of"] == "2 seeds" and t["verdict"].startswith("not told apart")
    rows = easy[easy["test"].str.startswith("McNemar")]
    assert len(rows) == 3
    assert rows.iloc[0]["p"] == pytest.approx(stats.binomtest(7, 7).pvalue)
    assert rows.iloc[0]["verdict"] == "better"
    absent = Recipe(**{**vars(toy), "claims": (Claim("method", "lora", "adapter"),)})
    assert claims(absent, frame_of(toy, runs)).empty
    hard = table[table["where"] == "task hard"]
    assert hard["verdict"].tolist() == ["needs two seeds of both"]


def test_predictions_of_other_rows_are_not_paired(toy, runs):
    cell = next(toy.cells())
    path = cell.directory(runs) / "predictions.csv"
    path.write_text(path.read_text().replace("validation,9,1", "validation,9,0"))
    table = claims(toy, frame_of(toy, runs))
    assert "McNemar, seed 0" not in table["test"].tolist()
    assert "McNemar, seed 1" in table["test"].tolist()


def test_points_at_one_place_share_a_name_that_can_be_read(toy, tmp_path):
    for cell in toy.cells():
        write_run(cell, tmp_path, 0.9, lora_parameters_left=100_000 * (1 + cell.seed))
    one = Recipe(**{**vars(toy), "axes": {"method": toy.axes["method"]}, "heat": None})
    frame = frame_of(toy, tmp_path)
    (figure,) = (found for name, _, found in figures(one, frame) if name == "parameters")
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["lora\nfull"]
    ticks = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
    ticks = [box for box in ticks if axes.bbox.x0 <= box.x0 + box.width / 2 <= axes.bbox.x1]
    assert len(ticks) > 1
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(ticks)), "ticks overlap"


# --- the page -------------------------------------------------------------------------------------
