"""The same run again: killed and resumed, with the same seed, and already finished."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

pytest.importorskip("datasets", reason="the models read their data by it")
from models.record.checkpoints import last_checkpoint
from models.train import Arguments, train
from tests.support.tiny_run import read_csv


class KilledError(Exception):
    """Raised by a callback in the middle of training."""


class KillAt(TrainerCallback):
    """Cut the run off once ``step`` steps are done; count the steps made here."""

    def __init__(self, step: int | None = None, scoring: bool = False) -> None:
        self.step, self.scoring, self.steps = step, scoring, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.scoring:
            raise KilledError

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.scoring:
            raise KilledError


def leftovers(arguments: Arguments) -> dict[str, Any]:
    """What must be the same in two runs, to the last digit."""
    directory = arguments.directory()
    return {
        "steps": (directory / "steps.csv").read_text().splitlines(),
        "history": [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in read_csv(directory / "history.csv")
        ],
        "predictions": (directory / "predictions.csv").read_text().splitlines(),
        "metrics": json.loads((directory / "result.json").read_text())["metrics"],
        "weights": {
            name: tensor.tolist()
            for name, tensor in load_file(directory / "adapter/adapter_model.safetensors").items()
        },
    }


@pytest.fixture
def whole(arguments):
    made = arguments("whole", dropout=0.1, save_steps=2, epochs=3)
    train(made)
    return leftovers(made)


def test_resumed_runs_end_as_the_uninterrupted_one(arguments, whole):
    assert len(whole["steps"]) == 1 + 18 and len(whole["history"]) == 3
    # Killed twice each: within an epoch and within the next, at the ends of epochs, and both.
    for first, second, left in ((3, 9, 10), (6, 12, 6), (12, 17, 2)):
        made = arguments(f"killed-{first}", dropout=0.1, save_steps=2, epochs=3)
        for step in (first, second):
            with pytest.raises(KilledError):
                train(made, callbacks=(KillAt(step),))
            assert not (made.directory() / "result.json").exists()
        counter = KillAt()
        train(made, callbacks=(counter,))
        assert counter.steps == left, "it did not go on from the last checkpoint"
        assert leftovers(made) == whole


def test_run_killed_while_an_epoch_is_scored_scores_it_again(arguments, whole):
    made = arguments("scoring", dropout=0.1, save_steps=2, epochs=3)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(6, scoring=True),))
    train(made)
    assert leftovers(made) == whole


def test_same_seed_same_run_other_seed_other_run(arguments, whole):
    again = arguments("again", dropout=0.1, save_steps=2, epochs=3)
    other = arguments("other", dropout=0.1, save_steps=2, epochs=3, seed=1)
    train(again), train(other)
    assert leftovers(again) == whole
    assert leftovers(other)["steps"] != whole["steps"]


def test_checkpoints_hold_what_trains(arguments):
    made = arguments(save_steps=2)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(5),))
    checkpoint, _ = last_checkpoint(made.directory() / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    saved = load_file(checkpoint / "trained.safetensors")
    assert len(saved) == 2 * 2 * 2 + 2
    assert all("lora_" in name or name.startswith("classifier.") for name in saved)
    assert not (checkpoint / "model.safetensors").exists()


def test_finished_run_is_read_back_and_another_is_not_overwritten(arguments):
    made = arguments(epochs=1)
    result = train(made)
    counter = KillAt()
    assert json.loads(json.dumps(result)) == train(made, callbacks=(counter,))
    assert counter.steps == 0
    with pytest.raises(ValueError, match=r"rank 4 -> 5.*--overwrite"):
        train(arguments(epochs=1, rank=5))
    with pytest.raises(ValueError, match="holds a run already"):
        train(arguments(epochs=1, resume=False))
    assert train(arguments(epochs=1, rank=5, overwrite=True))["arguments"]["rank"] == 5
