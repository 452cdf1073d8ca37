"""What is told of a run by the epoch and by the row, and the flags that change how it trains."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

pytest.importorskip("datasets", reason="the models read their data by it")
from models.train import parse, train
from models.training.meter import Meter
from tests.models.test_resume import KillAt, KilledError, leftovers
from tests.models.test_train import Spy, losses
from tests.support.tiny_run import ROWS, label_of, read_csv

ROOT = Path(__file__).resolve().parents[2]


class Look(TrainerCallback):
    """Keep the settings that the Trainer gets, and the optimizer's."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.args, self.optimizer = args, optimizer


# --- by the epoch ---------------------------------------------------------------------------------


def test_an_epoch_s_row_has_scores_of_train_time_and_rate(arguments):
    class Remember(TrainerCallback):
        def __init__(self):
            self.seen = {1: [], 2: []}

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            def look(module, positional, inputs, output):
                if module.training:
                    labels = inputs["labels"].tolist()
                    guesses = output.logits.argmax(-1).tolist()
                    self.seen[int(state.epoch) + 1] += zip(guesses, labels, strict=True)

            model.register_forward_hook(look, with_kwargs=True)

    spy, made = Remember(), arguments(warmup_ratio=0.0)
    result = train(made, callbacks=(spy,))
    history = read_csv(made.directory() / "history.csv")
    for row in history:
        pairs = spy.seen[row["epoch"]]
        assert len(pairs) == ROWS["train"]
        hits = sum(guess == label for guess, label in pairs)
        assert row["train_accuracy"] == pytest.approx(hits / len(pairs), abs=1e-12)
    # Linear to zero over 12 steps; the rate of an epoch is that of its last step.
    assert [row["learning_rate"] for row in history] == pytest.approx([5e-3 * 7 / 12, 5e-3 / 12])
    of = result["seconds_of"]
    assert sum(row["seconds"] for row in history) == pytest.approx(of["training"], rel=0.5)
    assert sum(row["seconds"] for row in history) <= of["training"]
    assert min(of.values()) > 0 and sum(of.values()) == pytest.approx(result["seconds"], rel=0.05)
    best = max(history, key=lambda row: row["validation_accuracy"])
    assert result["best_epoch"] == best["epoch"]


def test_scoring_and_saving_are_no_training(arguments, monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            self.now += 1e-3
            return self.now

    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            clock.now += 400

    clock = Clock()
    monkeypatch.setattr("models.training.meter.time", clock)
    plain, slow = train(arguments("plain")), train(arguments("slow"), callbacks=(Slow(),))
    scoring, training = (
        [run["seconds_of"][phase] for run in (plain, slow)] for phase in ("scoring", "training")
    )
    assert scoring[0] < 1 and scoring[1] > 800 and 0 < training[0] < 1
    assert training[1] == pytest.approx(training[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets peaks")
def test_the_memory_of_a_phase_is_its_own():
    meter = Meter()
    with meter.phase("training"):
        kept = np.ones(2_000_000)
        with meter.phase("scoring"):
            np.ones(30_000_000).sum()
    found, mib = meter.memory(), 2**20
    if meter.bytes["training"] > found["before"] + 200 * mib:
        pytest.fail(f"training is charged with what scoring took: {found}, {len(kept)}")
    assert found["scoring"] > found["before"] + 200 * mib
    with meter.phase("saving"):
        pass
    assert meter.memory()["saving"] < found["scoring"] - 150 * mib


# --- by the row -----------------------------------------------------------------------------------


def test_predictions_stand_by_their_rows(arguments):
    made = arguments(epochs=10, learning_rate=2e-2)
    result = train(made)
    with (made.directory() / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    starts = {"train": 0, "validation": ROWS["train"], "test": ROWS["train"] + ROWS["validation"]}
    for split, count in ROWS.items():
        own = [row for row in rows if row["split"] == split]
        assert [int(row["row"]) for row in own] == list(range(count))
        labels = [label_of(starts[split] + number) for number in range(count)]
        assert [int(row["label"]) for row in own] == labels
        hits = sum(row["label"] == row["prediction"] for row in own)
        assert hits / count == pytest.approx(result["metrics"][split]["accuracy"], abs=1e-12)


# --- flags of training ----------------------------------------------------------------------------


def test_adam_and_trackers_reach_the_trainer(arguments):
    look = Look()
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    train(arguments(epochs=1, **changes), callbacks=(look,))
    group = look.optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.99) and group["eps"] == 1e-6
    with pytest.raises(ValueError, match=r"trackers tensorbord.*tensorboard"):
        train(arguments("tracked", trackers=["tensorbord"]))


def test_what_tensorboard_writes_outlives_the_run_and_no_overwriting(arguments):
    pytest.importorskip("tensorboard")
    made = arguments(trackers=["tensorboard"], save_steps=2)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(5),))
    train(made)
    written = list((made.directory() / "tracked").glob("events.out.tfevents.*"))
    assert written
    train(replace(made, overwrite=True, epochs=1))
    assert not any(path.exists() for path in written)


def test_accumulated_batches_are_the_large_batch(arguments):
    # All rows in one step, so that their order is no matter.
    common = {"model_dropout": 0.0, "epochs": 3}
    one = arguments("one", batch_size=44, **common)
    parts = arguments("parts", batch_size=11, gradient_accumulation=4, **common)
    results = train(one), train(parts)
    assert losses(parts) == pytest.approx(losses(one), rel=1e-4)
    assert [r["steps_per_epoch"] for r in results] == [1, 1]
    uneven = arguments("uneven", batch_size=8, gradient_accumulation=4, epochs=2)
    assert train(uneven)["steps_per_epoch"] == 2 and len(losses(uneven)) == 4


def test_a_run_of_accumulated_batches_resumes(arguments):
    changes = {"gradient_accumulation": 2, "dropout": 0.1, "save_steps": 1, "epochs": 2}
    train(arguments("whole", **changes))
    made = arguments("killed", **changes)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(4),))
    train(made)
    assert leftovers(made) == leftovers(arguments("whole", **changes))


def test_max_steps_take_the_place_of_epochs(arguments):
    made = arguments(max_steps=8, epochs=1, warmup_ratio=0.0)
    result = train(made)
    assert len(losses(made)) == 8
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    assert result["history"][1]["train_loss"] == pytest.approx(np.mean(losses(made)[6:]))
    assert result["history"][1]["learning_rate"] == pytest.approx(5e-3 / 8)
    assert "validation_accuracy" in result["history"][1]


def test_a_run_killed_behind_its_last_step_trains_no_further(arguments, monkeypatch):
    made = arguments(max_steps=8, epochs=1)
    with monkeypatch.context() as broken:
        broken.setattr(
            "models.record.run_directory.write_csv", lambda *a: (_ for _ in ()).throw(OSError)
        )
        with pytest.raises(OSError, match="the same command goes on"):
            train(made)
    counter = KillAt()
    train(made, callbacks=(counter,))
    assert counter.steps == 0 and len(losses(made)) == 8


def test_model_dropout_takes_the_place_of_the_config_s(arguments):
    spy = Spy()
    train(arguments("none", model_dropout=0.0, epochs=1), callbacks=(spy,))
    drops = [m.p for m in spy.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and set(drops) == {0.0}
    losses_of = {}
    for name, dropout in (("default", None), ("as-default", 0.1), ("half", 0.5)):
        made = arguments(name, model_dropout=dropout, epochs=1)
        train(made)
        losses_of[name] = losses(made)
    assert losses_of["default"] == losses_of["as-default"] != losses_of["half"]


def test_the_best_epoch_is_what_is_scored_and_saved(arguments):
    changes = {"epochs": 4, "learning_rate": 0.3, "scheduler": "constant", "model_dropout": 0.0}
    last = train(arguments("last", **changes))
    made = arguments("best", best_epoch=True, **changes)
    best = train(made)
    curve = [row["validation_accuracy"] for row in best["history"]]
    assert curve == [row["validation_accuracy"] for row in last["history"]]
    assert last["metrics"]["validation"]["accuracy"] == curve[-1] < max(curve), "nothing to tell"
    assert best["metrics"]["validation"]["accuracy"] == max(curve)
    validation = best["history"][best["best_epoch"] - 1]["validation_loss"]
    assert best["metrics"]["validation"]["loss"] == pytest.approx(validation, rel=1e-6)


def test_the_best_epoch_needs_a_validation_split(arguments, data, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("train.csv", "test.csv"):
        (folder / name).write_bytes((Path(data) / name).read_bytes())
    with pytest.raises(ValueError, match="--best-epoch: task sst2 has no validation split"):
        train(arguments(best_epoch=True, data_dir=str(folder)))


# --- the command line -----------------------------------------------------------------------------


def test_flags_stand_over_those_of_a_config_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "{task: mrpc, rank: 4, targets: [query, value], train-head: false, model: null}"
    )
    found = parse(["--config", str(file), "--rank", "2"])
    assert (found.task, found.rank, found.targets) == ("mrpc", 2, ["query", "value"])
    assert found.train_head is False and found.model is None
    for content, message in (
        ("ranks: 4", "ranks is no flag; did you mean rank?"),
        ("- rank", "no mapping"),
        ("rank: [", "while parsing"),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit, match="2"):
            parse(["--config", str(file)])
        assert message in capsys.readouterr().err


def test_a_run_s_own_arguments_make_the_run_again(arguments, tmp_path):
    made = arguments(epochs=1)
    result = train(made)
    again = parse(
        [
            "--config",
            str(made.directory() / "arguments.json"),
            "--output-dir",
            str(tmp_path / "again"),
        ]
    )
    assert train(again)["metrics"] == result["metrics"]


def test_directories_are_named_by_what_differs(arguments):
    from models.arguments import Arguments

    plain = Arguments(task="sst2")
    assert plain.directory() == Path("runs/sst2-lora-0")
    names = {
        Arguments(**changes).directory()
        for changes in (
            {"task": "sst2"},
            {"task": "sst2", "rank": 4},
            {"task": "sst2", "seed": 1},
            {"task": "sst2", "model": "roberta-base"},
            {"task": "sst2", "model": "roberta-large"},
            {"task": "sst2", "targets": ["query"]},
            {"task": "sst2", "train_head": False},
            {"task": "sst2", "targets": ["query", "a" * 200]},
            {"task": "sst2", "targets": ["query", "a" * 200, "b"]},
        )
    }
    assert len(names) == 9
    assert Path("runs/sst2-lora-0-model-roberta-base") in names
    assert Path("runs/sst2-lora-0-no-train-head") in names
    assert max(len(name.name) for name in names) < 200
    assert Arguments(task="sst2", trackers=["wandb"]).directory() == plain.directory()


@pytest.mark.parametrize(
    ("command", "told"), [("train.parse", "--best-epoch"), ("sweep.main", "--stop-losers")]
)
def test_help_imports_no_torch(command, told):
    script = (
        "import sys; from models import train, sweep\n"
        f"try: {command}(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'torch', 'datasets', 'matplotlib'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "" and told in done.stdout


def test_help_tells_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in told and "(default: linear)" in told
    assert "--no_resume, --no-resume the opposite of --resume" in told
