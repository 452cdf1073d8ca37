"""Checkpoints: a damaged one is passed over, and a run that mixes with another is stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="the models read their data by it")
from models.record.checkpoints import NEEDED, last_checkpoint, seal
from models.train import train
from tests.models.test_resume import KillAt, KilledError, leftovers


@pytest.fixture
def cut_off(arguments):
    """Arguments of a run that was killed at step 5, with checkpoints of steps 2 and 4."""

    def build(name: str):
        made = arguments(name, dropout=0.1, save_steps=2)
        with pytest.raises(KilledError):
            train(made, callbacks=(KillAt(5),))
        return made

    return build


def test_damaged_checkpoints_are_passed_over_and_the_run_ends_as_it_would_have(
    arguments, cut_off, capsys
):
    whole = arguments("whole", dropout=0.1, save_steps=2)
    train(whole)
    made = cut_off("damaged")
    folder = made.directory() / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    counter = KillAt()
    train(made, callbacks=(counter,))
    assert "checkpoint-4 is passed over: optimizer.pt is missing" in capsys.readouterr().out
    assert counter.steps == 10
    assert leftovers(made) == leftovers(whole)


def test_a_run_without_a_whole_checkpoint_starts_anew(arguments, cut_off):
    whole = arguments("whole", dropout=0.1, save_steps=2)
    train(whole)
    made = cut_off("all-damaged")
    for checkpoint in (made.directory() / "checkpoints").iterdir():
        (checkpoint / "scheduler.pt").write_bytes(b"")
    train(made)
    assert leftovers(made) == leftovers(whole)


@pytest.fixture
def sealed(tmp_path) -> Path:
    """A directory with sealed checkpoints of steps 2 and 4."""
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in NEEDED:
            (folder / name).write_text(f"{name} of {step}")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "progress.json").write_text(json.dumps({"losses": [0.5] * step, "epochs": []}))
        seal(folder)
    return tmp_path


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("damage", ["missing", "empty", "changed"])
def test_every_file_of_a_checkpoint_counts(sealed, name, damage):
    assert last_checkpoint(sealed) == (sealed / "checkpoint-4", [])
    path = sealed / "checkpoint-4" / name
    path.unlink() if damage == "missing" else path.write_text("" if damage == "empty" else "{}")
    found, passed_over = last_checkpoint(sealed)
    assert found == sealed / "checkpoint-2"
    assert len(passed_over) == 1 and name in passed_over[0]


def test_a_checkpoint_counts_once_it_is_sealed_with_as_many_losses_as_steps(sealed):
    (sealed / "checkpoint-4" / "seal.json").unlink()
    assert last_checkpoint(sealed)[0] == sealed / "checkpoint-2"
    for progress, damage in (
        ({"losses": [0.5], "epochs": []}, "step 2, and it holds 1 losses"),
        ({"losses": [0.5, 0.5]}, "an earlier version wrote it"),
    ):
        (sealed / "checkpoint-2" / "progress.json").write_text(json.dumps(progress))
        seal(sealed / "checkpoint-2")
        found, passed_over = last_checkpoint(sealed)
        assert found is None and damage in passed_over[1]
    shutil.copytree(sealed / "checkpoint-2", sealed / "checkpoint-old")
    assert last_checkpoint(sealed)[0] is None and last_checkpoint(sealed / "nowhere") == (None, [])


def test_training_stops_where_steps_and_losses_disagree(arguments):
    class Forget(KillAt):
        def on_step_end(self, args, state, control, **kwargs):
            state.global_step = 0

    with pytest.raises(RuntimeError, match="step 0 comes with 1 losses"):
        train(arguments(epochs=1), callbacks=(Forget(),))


def test_checkpoints_hold_a_head_that_is_new_though_it_does_not_train(arguments):
    made = arguments(train_head=False, save_steps=2)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(3),))
    from safetensors.torch import load_file

    saved = load_file(made.directory() / "checkpoints/checkpoint-2/trained.safetensors")
    assert torch.count_nonzero(saved["classifier.weight"])
