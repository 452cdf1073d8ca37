"""What a run leaves behind, and what is refused before it writes anything."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import HfArgumentParser

pytest.importorskip("datasets", reason="the models read their data by it")
from models.methods import METHODS
from models.model import loading
from models.train import Arguments, main, train
from tests.support.tiny_run import ROWS, read_csv

# --- what a run leaves behind ---------------------------------------------------------------------


def test_run_directory_is_whole(arguments):
    made = arguments()
    result = train(made)
    directory = made.directory()
    assert {path.name for path in directory.iterdir()} == {
        "adapter", "arguments.json", "history.csv", "plot.png", "predictions.csv", "result.json",
        "steps.csv",
    }  # fmt: skip
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["metrics"]) == set(ROWS)
    assert set(result["metrics"]["test"]) == {"loss", "accuracy", "precision", "recall", "f1"}
    assert result["rows"] == result["scored"] == ROWS
    assert result["seconds"] > 0 and result["samples_per_second"] > 0
    assert result["peak_memory"]["bytes"] > 2**20
    assert len(result["fused"]) == 4 and {"torch", "transformers"} <= set(result["versions"])
    assert (directory / "plot.png").read_bytes()[:4] == b"\x89PNG"
    history, steps = read_csv(directory / "history.csv"), read_csv(directory / "steps.csv")
    assert [row["epoch"] for row in history] == [1, 2]
    assert [row["step"] for row in steps] == list(range(1, 13))
    for epoch, row in enumerate(history, start=1):
        own = [step["loss"] for step in steps if step["epoch"] == epoch]
        assert row["train_loss"] == pytest.approx(sum(own) / len(own), rel=1e-12)
    assert history[-1]["validation_accuracy"] == result["metrics"]["validation"]["accuracy"]
    # The command in the result is the run.
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        result["command"].split()[3:]
    )
    assert parsed == made


def test_adapter_gives_the_scores_again(arguments, bert, data, tokenizer):
    from lora_kernels import load_adapter

    made = arguments(epochs=20, learning_rate=2e-2)
    result = train(made)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    load_adapter(model, made.directory() / "adapter")
    with (Path(data) / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([int(row["label"]) for row in rows])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-5)
    assert abs(loss - 0.693) > 0.01, "an untrained model would give this"


def test_full_fine_tuning_saves_a_plain_model(arguments):
    made = arguments(method="full", epochs=1)
    train(made)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        made.directory() / "model"
    )
    assert model.config.id2label == {0: "negative", 1: "positive"}


# --- refusals -------------------------------------------------------------------------------------


def test_unknown_flags_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--task", "sst2", "--learningrate", "1e-3"])
    assert "unknown arguments: --learningrate 1e-3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"learning_rate": -1.0}, "learning-rate"),
        ({"warmup_ratio": 2.0}, "warmup-ratio"),
        ({"weight_decay": float("nan")}, "weight-decay"),
        ({"scheduler": "linaer"}, "linear"),
        ({"strategy": "fastest"}, "strategy"),
        ({"task": "sst3"}, "did you mean sst2"),
        ({"data_dir": "/nowhere"}, "/nowhere is not a directory"),
        ({"model": "/nowhere/model"}, "/nowhere/model is not a directory"),
        ({"targets": ["querry"]}, "querry.*query"),
        ({"max_length": 65}, "64 positions"),
        ({"method": "full", "targets": ["query"]}, "leave out --targets"),
        ({"method": "full", "train_head": False}, "no-train-head"),
        ({"method": "peft", "strategy": "library"}, "peft: leave out --strategy, which"),
        ({"method": "ful"}, "unknown method 'ful'; known: lora, peft, full"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_is_written(arguments, changes, message):
    made = arguments(**changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(made)
    assert not made.directory().exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does fp16")
def test_half_precision_needs_a_gpu(arguments):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(arguments(precision="fp16"))


def test_overwrite_does_not_delete_a_strangers_folder(arguments):
    made = arguments(overwrite=True)
    made.directory().mkdir()
    (made.directory() / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a run directory"):
        train(made)
    assert (made.directory() / "thesis.tex").exists()


def test_default_model_is_found_without_importing_its_package(monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_MODEL_PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install"):
        loading.model_source(None)
    monkeypatch.setattr(loading, "DEFAULT_MODEL_PACKAGE", "json")
    with pytest.raises(FileNotFoundError, match=r"json/model is not a directory"):
        loading.model_source(None)


def test_command_line_prints_tables_and_errors(bert, data, tmp_path, capsys):
    words = ["--model", bert, "--task", "sst2", "--data-dir", data, "--epochs", "1"]
    words += [
        "--targets",
        "query",
        "value",
        "--no-train-head",
        "--max-length",
        "48",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--rank", "0"]) == 2
    assert "error: --rank 0" in capsys.readouterr().err
    assert main(words) == 0
    output = capsys.readouterr().out
    for expected in ("parameters", "head", "test", "majority class", "plot.png"):
        assert expected in output


def test_every_method_is_a_choice_on_the_command_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--method", "ful"])
    error = capsys.readouterr().err
    assert "invalid choice: 'ful'" in error and all(f"'{name}'" in error for name in METHODS)
