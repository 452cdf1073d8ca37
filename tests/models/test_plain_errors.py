"""What cannot work is one line that names file and remedy; what is not a number is noted."""

from __future__ import annotations

import csv
import gzip
import json
import math
import resource
import shutil
import signal

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the models read their data by it")
from models.arguments import SCHEDULERS, WORLD_SIZES, check
from models.data import tasks
from models.train import main, train
from tests.models.test_resume import leftovers
from tests.support.tiny_run import ROWS, WORDS, read_csv, write_csv

# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_trains(arguments, name):
    assert train(arguments(scheduler=name, epochs=1))["metrics"]["test"]["loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "warmup_stable_decay"}, "warmup_stable_decay needs arguments of its own"),
        ({"scheduler": "cosine_with_min_lr"}, "min_lr needs arguments .*choose cosine_with_res"),
        ({"scheduler": "reduce_lr_on_plateau"}, "needs arguments of its own"),
        ({"scheduler": "polynomial", "learning_rate": 1e-8}, "polynomial ends at 1e-07"),
        ({"method": "full", "rank": 4}, "full: leave out --rank"),
        ({"method": "full", "alpha": 4.0}, "full: leave out --alpha"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_flags_that_cannot_work_together_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        train(arguments(**changes))


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_processes_of_no_known_launcher_are_refused(arguments, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    check(arguments())
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{name}=2: start several processes by torchrun"):
        train(arguments())


@pytest.mark.parametrize(
    "environment, changes, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP splits the model"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed splits the model"),
        ({}, {"batch_size": 1}, "--batch-size 1 is that of all processes together"),
        ({}, {"graphs": True}, "--graphs"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    arguments, monkeypatch, environment, changes, message
):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in (launched | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check(arguments(**changes))


# --- files of the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "null"])
def test_damaged_files_of_a_model_are_named(arguments, bert, tmp_path, name, damage):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    path = folder / name
    path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:100], "null": b"null"}[damage])
    made = arguments(model=str(folder))
    with pytest.raises(ValueError, match=rf"--model: \S*{name} is damaged, fetch it again: "):
        train(made)
    assert not made.directory().exists()


def test_weights_cut_in_the_middle_are_named(arguments, bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        train(arguments(model=str(folder)))


def test_an_error_is_one_line(arguments, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-model"}')
    assert main(["--task", "docstrings", "--model", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: --model {tmp_path}/model cannot be loaded: ")


# --- files of the data ----------------------------------------------------------------------------


def test_long_fields_blank_lines_and_empty_column_names_are_read(tmp_path):
    long = "word " * 40_000
    text = f"\n\n\nsentence,label,,\n{long},1,,\n\nshort,0,,\n"
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "validation.csv").write_text("sentence,label\ngood,1\n")
    before = csv.field_size_limit()
    found = tasks.load(tasks.task_of("sst2"), tmp_path).splits["train"]
    assert found["text"][:] == [long, "short"] and found["labels"][:] == [1, 0]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence,label,sentence\na,1,b\n", "the header names 'sentence' more than once"),
        ("sentence,label\na,1\nb,c,0\n", "row 2 has more fields than the header"),
        ('sentence,label\n"a,1\nb,0\n', "train.csv is no CSV file in UTF-8: unexpected end"),
        ("\n\n", "train.csv holds no rows"),
    ],
    ids=["twice", "more", "quote", "blank"],
)
def test_tables_that_would_be_misread_are_refused(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks.load(tasks.task_of("sst2"), tmp_path)


def test_a_truncated_or_damaged_archive_is_named(tmp_path):
    whole = gzip.compress("\n".join(["sentence,label", *(f"{w},1" for w in WORDS)]).encode())
    for content in (whole[:-20], whole[:30] + b"\x00\xff" * 9 + whole[48:]):
        (tmp_path / "train.csv.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"train.csv.gz is no CSV file in UTF-8: "):
            tasks.load(tasks.task_of("sst2"), tmp_path)


def test_dropped_rows_and_empty_splits_are_counted(tmp_path):
    header = ["premise", "hypothesis", "label"]
    write_csv(tmp_path / "train.csv", header, [["a", "b", 2], ["c", "d", -1], ["e", "f", " "]])
    write_csv(tmp_path / "validation.csv", header, [["g", "h", 1]])
    write_csv(tmp_path / "test.csv", header, [["i", "j", -1]])
    found = tasks.load(tasks.task_of("snli"), tmp_path)
    assert found.dropped == {"train": 2, "validation": 0, "test": 1}
    assert found.notes == (
        "train: 2 rows without a label are dropped",
        "test: 1 rows without a label are dropped",
        "test: left out, since no row of it is left",
    )


def test_a_file_too_small_to_split_is_refused_or_its_empty_splits_named(tmp_path):
    write_csv(tmp_path / "all.csv", ["sentence", "label"], [["a", 0], ["b", 0]])
    with pytest.raises(ValueError, match="too few different texts to split"):
        tasks.load(tasks.task_of("sst2"), tmp_path)
    write_csv(tmp_path / "all.csv", ["sentence", "label"], [["a", 0], ["A!", 0], ["b", 0]])
    found = tasks.load(tasks.task_of("sst2"), tmp_path)
    assert "train" in found.splits and all(len(split) for split in found.splits.values())
    assert len(found.notes) == 3 - len(found.splits)


# --- numbers that are not -------------------------------------------------------------------------


def test_scores_of_constants_are_not_a_number():
    constant, varied = np.array([[1.0], [1.0]]), np.array([[1.0], [2.0]])
    for predictions, labels in (
        (constant, varied[:, 0]),
        (varied, constant[:, 0]),
        (varied[:1], varied[:1, 0]),
        (np.array([[math.nan], [1.0]]), varied[:, 0]),
        (np.array([[math.inf], [1.0]]), varied[:, 0]),
    ):
        scores = tasks.metrics_of(tasks.task_of("stsb"), predictions, labels)
        assert math.isnan(scores["pearson"]) and math.isnan(scores["spearman"])
    negative = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert math.isnan(tasks.metrics_of(tasks.task_of("mrpc"), negative, np.array([0, 0]))["f1"])
    assert tasks.metrics_of(tasks.task_of("mrpc"), negative, np.array([0, 1]))["f1"] == 0.0


def test_undefined_scores_are_null_with_a_note(arguments, tmp_path, capsys):
    for split, count in ROWS.items():
        rows = [[f"row{i}", WORDS[i % 5], 1.0 if split == "test" else i % 3] for i in range(count)]
        write_csv(tmp_path / f"{split}.csv", ["sentence1", "sentence2", "label"], rows)
    made = arguments(task="stsb", data_dir=str(tmp_path), epochs=1)
    result = train(made)
    assert result["metrics"]["test"]["pearson"] is None and not result["diverged"]
    assert any(note.startswith("test: pearson, spearman is not def") for note in result["notes"])
    text = (made.directory() / "result.json").read_text()
    assert "NaN" not in text and json.loads(text) == json.loads(json.dumps(result))


@pytest.mark.filterwarnings("ignore:.* tensors hold values that are not finite")
def test_a_run_that_diverged_says_so_and_fails(arguments, bert, data, tmp_path, capsys):
    words = ["--model", bert, "--task", "sst2", "--data-dir", data, "--epochs", "1"]
    words += ["--max-length", "48", "--learning-rate", "1e30", "--scheduler", "constant"]
    words += ["--output-dir", str(tmp_path / "run")]
    for _ in ("run", "read back"):
        assert main(words) == 1
        output = " ".join(capsys.readouterr().out.split())
        assert "the training loss is not a finite number at" in output
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["diverged"] and result["metrics"]["test"]["loss"] is None
    losses = [row["loss"] for row in read_csv(tmp_path / "run/steps.csv")]
    assert math.isnan(losses[-1])


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2_000, 6_000, 12_000])
def test_a_run_that_found_no_room_goes_on_later(arguments, limit):
    whole, made = (arguments(name, dropout=0.1, save_steps=2) for name in ("whole", "made"))
    train(whole)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError, match=r"made could not be written \(.*same command goes on"):
            train(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    train(made)
    assert leftovers(made) == leftovers(whole)
