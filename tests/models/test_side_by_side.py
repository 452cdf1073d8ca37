"""Cells one by one and packed, side by side: what is written is what the runs have found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="the models read their data by it")
from models import recipes, side_by_side
from models.recipes.recipe import Recipe
from models.record.run_directory import RESULT, STEPS
from models.side_by_side import WAYS
from models.sweeping.together import PAYS, Turns
from models.training.pack import Pack
from tests.support.tiny_run import read_csv

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "models/results/packed"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def recipe(bert, data, tmp_path, monkeypatch) -> Recipe:
    row = Recipe(
        "toy",
        0,
        "A toy",
        {"model": bert, "task": "sst2", "epochs": 1, "batch_size": 8, "max_length": 48,
         "model_dropout": 0.0, "learning_rate": 2e-3},
        {"rank": {"2": {"rank": 2}, "4": {"rank": 4}},
         "alpha": {"4": {"alpha": 4.0}, "8": {"alpha": 8.0}}},
        seeds=1,
        metric="accuracy",
        split="test",
        heat=("rank", "alpha"),
    )  # fmt: skip
    monkeypatch.setitem(recipes.RECIPES, "toy", row)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sst2").symlink_to(data)
    return row


@pytest.fixture
def run(recipe, tmp_path):
    def start(*words: str) -> int:
        places = ["--runs", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")]
        return side_by_side.main(["toy", *places, *words])

    return start


def test_both_ways_run_in_turns_and_are_told_of(run, tmp_path, capsys, monkeypatch):
    order, cell, step = [], side_by_side.run_cell, Turns.step
    monkeypatch.setattr(side_by_side, "run_cell", lambda *a: (order.append("cell"), cell(*a))[1])
    monkeypatch.setattr(Turns, "step", lambda *a: (order.append("step"), step(*a))[1])
    monkeypatch.setattr(Pack, "speed", lambda self: 1.5)
    assert run("--flags", "epochs=2", "--out", str(tmp_path / "out/toy.json")) == 0
    # 12 steps of four cells: a cell by itself after every third.
    assert "".join(word[0] for word in order) == "c" + "ssssc" + "sssc" * 2 + "ss"

    found = json.loads((tmp_path / "out/toy.json").read_text())
    assert found["flags"] == {"epochs": 2} and found["gain"] == 1.5
    assert [(row["rank"], row["alpha"], row["steps"]) for row in found["cells"]] == [
        ("2", "4", 12), ("2", "8", 12), ("4", "4", 12), ("4", "8", 12)
    ]  # fmt: skip
    for row in found["cells"]:
        for way in WAYS:
            result = json.loads(
                (tmp_path / "runs" / way.replace(" ", "-") / row["cell"] / RESULT).read_text()
            )
            assert row["scores"][way] == result["metrics"]["test"]["accuracy"]
            assert row["losses"][way] == result["metrics"]["test"]["loss"]
            assert row["training seconds"][way] == result["seconds_of"]["training"]
            assert any("in one pass" in note for note in result["notes"]) == (way == "packed")
        assert row["difference"] < 1e-6
    for way in WAYS:
        training = sum(row["training seconds"][way] for row in found["cells"])
        assert found["spent"][way]["seconds"] > training
        assert found["spent"][way]["CPU seconds"] > 0
    printed = capsys.readouterr().out
    assert "toy/2-8/seed-0: one by one" in printed and "seconds of training" in printed
    assert (tmp_path / "out/toy.png").read_bytes()[:4] == b"\x89PNG"

    assert run() == 2 and "has runs already" in capsys.readouterr().err


def test_the_difference_is_the_largest_of_all_steps(run, recipe, tmp_path):
    assert run() == 0
    cell = next(recipe.cells())
    places = {way: tmp_path / "runs" / way.replace(" ", "-") / cell.name for way in WAYS}
    steps = places["packed"] / STEPS
    losses = [row["loss"] for row in read_csv(steps)]
    changed = [loss * (1 + 1e-3 * (n == 2) - 1e-2 * (n == 4)) for n, loss in enumerate(losses)]
    lines = [f"{n},1,{loss}" for n, loss in enumerate(changed, start=1)]
    steps.write_text("\n".join(["step,epoch,loss", *lines]))
    row = side_by_side.row(recipe, cell, places)
    assert row["difference"] == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sms-gird"], "did you mean sms-grid"),
        (["glue-small"], "glue-small has no map"),
        (["toy", "--only", "rank=3"], "toy has rank=2, 4"),
        (["toy", "--flags", "epoch=3"], "--flags epoch=3: not the flag of a run and a value"),
        (["toy", "--flags", "seed"], "--flags seed: not the flag of a run and a value"),
        (["toy", "--flags", "epochs=0"], "one-by-one/toy/2-4/seed-0: failed"),
        (["toy", "--only", "rank=2", "alpha=4"], "only 0 of 1 cells share a base"),
    ],
)
def test_bad_input_gets_one_line(recipe, tmp_path, words, told, capsys):
    places = ["--runs", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")]
    assert side_by_side.main([*words, *places]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0]


def test_the_picture_has_a_map_for_each_way_and_the_time_of_both():
    cells = [
        {"rank": rank, "alpha": alpha, "scores": {"one by one": 0.5, "packed": 0.75},
         "training seconds": {"one by one": 2.0, "packed": 1.0}}
        for rank in ("4", "8") for alpha in ("4", "8", "16")
    ]  # fmt: skip
    spent = {"one by one": {"CPU seconds": 20.0, "seconds": 40.0}}
    spent["packed"] = {"CPU seconds": 15.0, "seconds": 30.0}
    found = {"heat": ["rank", "alpha"], "score": "test accuracy", "spent": spent, "cells": cells}
    one, other, bars = side_by_side.picture(found).axes
    assert one.get_title() == "test accuracy, one by one" and one.get_ylabel() == "rank"
    assert [text.get_text() for text in one.texts] == ["0.500"] * 6
    assert [text.get_text() for text in other.texts] == ["0.750"] * 6
    assert [text.get_text() for text in bars.texts] == ["20", "40", "12", "15", "30", "6"]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == ["all, CPU time", "all, by the clock", "training, by the clock"]


# --- what README and docs/packs.md print ----------------------------------------------------------


def table(document: str, first_cells: str) -> list[list[str]]:
    """The rows of the table whose header begins so."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cells}"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def printed(rows: list[list[str]]) -> str:
    return "should say:\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_readme_has_the_grid_s_scores():
    cells = results("sms-grid-small")["cells"]
    assert len(cells) == 16
    wanted: dict[str, list[str]] = {}
    for cell in cells:
        one, packed = (f"{cell['scores'][way]:.3f}" for way in WAYS)
        wanted.setdefault(cell["rank"], [cell["rank"]]).append(f"{one}, {packed}")
    rows = list(wanted.values())
    assert table("README.md", "rank") == rows, printed(rows)
    difference = f"{max(cell['difference'] for cell in cells):.1e}"
    assert f"of all {sum(cell['steps'] for cell in cells)} steps is {difference}" in README
    assert "models/results/packed/sms-grid-small.png" in README
    assert (RESULTS / "sms-grid-small.png").is_file()


def test_readme_has_the_grid_s_times():
    one, packed = (side_by_side.seconds(results("sms-grid-small"), way) for way in WAYS)
    rows = [[name, f"{one[name]:.0f}", f"{packed[name]:.0f}", f"{one[name] / packed[name]:.2f}"]
            for name in one]  # fmt: skip
    assert table("README.md", "seconds of the 16 cells") == rows, printed(rows)


def test_readme_has_the_grid_on_gpt2():
    found = results("sms-grid-tiny-gpt2")
    cells, (one, packed) = found["cells"], (side_by_side.seconds(found, way) for way in WAYS)
    assert len(cells) == 16 and all(cell["difference"] == 0 for cell in cells)
    scores = [cell["scores"][way] for cell in cells for way in WAYS]
    assert all(cell["scores"]["packed"] == cell["scores"]["one by one"] for cell in cells)
    times = list(one.values())[-1] / list(packed.values())[-1]
    for words in (
        f"All {sum(cell['steps'] for cell in cells):,} losses", f"{times:.2f} times as long one",
        f"{min(scores):.3f} to {max(scores):.3f}", "models/results/packed/sms-grid-tiny-gpt2.json",
    ):  # fmt: skip
        assert words in README, words


def test_packs_md_has_what_auto_chose():
    rows = []
    for batch in (1, 4, 16):
        found = results(f"tiny-batch-{batch}")
        assert found["flags"]["batch_size"] == batch
        one, packed = (side_by_side.seconds(found, way) for way in WAYS)
        chose = "packed" if found["gain"] >= PAYS else "one by one"
        ratios = [one[name] / packed[name] for name in one]
        rows.append([str(batch), f"{found['gain']:.2f}", chose, *(f"{r:.2f}" for r in ratios)])
        # Never slower where it chose to pack, in CPU time and in training.
        assert chose == "one by one" or min(ratios[0], ratios[2]) >= 1
    assert table("docs/packs.md", "batch") == rows, printed(rows)
