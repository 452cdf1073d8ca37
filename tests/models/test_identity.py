"""Which run a directory holds: one process writes it, and only the same run continues it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

pytest.importorskip("datasets", reason="the models read their data by it")
from models.record.run_directory import DIGESTS
from models.train import train
from tests.models.test_resume import KillAt, KilledError


class During(TrainerCallback):
    """Do something else in the middle of training."""

    def __init__(self, action) -> None:
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.action()


def test_two_runs_in_one_directory_are_refused_while_the_first_one_writes(arguments):
    made, other = arguments(epochs=1), arguments(epochs=1, rank=2, overwrite=True)

    def second():
        for one in (made, other):
            with pytest.raises(ValueError, match="another process is writing the run in"):
                train(one)

    result = train(made, callbacks=(During(second),))
    assert train(made) == json.loads(json.dumps(result))
    assert not [path for path in made.directory().iterdir() if path.name.startswith(".")]


def cut_off(made):
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(5),))


@pytest.mark.parametrize(
    "what", ["row", "split", "config.json", "model.safetensors", "tokenizer.json"]
)
def test_a_run_on_other_rows_or_another_model_does_not_continue(
    arguments, bert, data, tmp_path, what
):
    model, rows = tmp_path / "model", tmp_path / "rows"
    shutil.copytree(bert, model), shutil.copytree(data, rows)
    made = arguments(model=str(model), data_dir=str(rows), save_steps=2)
    cut_off(made)
    if what == "row":
        text = (rows / "train.csv").read_text()
        (rows / "train.csv").write_text(text.replace("word7", "word8", 1))
    elif what == "split":
        (rows / "test.csv").unlink()
    elif what == "model.safetensors":
        content = bytearray((model / what).read_bytes())
        content[-1] ^= 1
        (model / what).write_bytes(content)
    else:
        (model / what).write_text((model / what).read_text() + "\n")
    name = "data_sha256" if what in ("row", "split") else "model_sha256"
    with pytest.raises(ValueError, match=rf"other arguments \({name} "):
        train(made)


def test_a_file_that_vanishes_while_it_is_looked_at_is_another_process_s(arguments, monkeypatch):
    made = arguments(save_steps=2)
    cut_off(made)

    def vanished(path):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr("models.record.checkpoints.file_digest", vanished)
    with pytest.raises(ValueError, match=r"another process is changing the run in \S+run "):
        train(made)


def test_a_start_that_failed_does_not_block_the_mended_command(arguments):
    class OutOfMemory(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(arguments(epochs=1), callbacks=(OutOfMemory(),))
    assert train(arguments(epochs=1, batch_size=4, resume=False))["arguments"]["batch_size"] == 4


def without_digests(directory: Path) -> None:
    """Make `arguments.json` what earlier versions wrote."""
    path = directory / "arguments.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in before.items() if k not in DIGESTS}))


def test_runs_of_earlier_versions_are_read_back_if_finished_and_refused_if_not(arguments):
    finished, unfinished = arguments("finished", epochs=1), arguments("unfinished", save_steps=2)
    result = train(finished)
    without_digests(finished.directory())
    assert train(finished) == json.loads(json.dumps(result))
    cut_off(unfinished)
    without_digests(unfinished.directory())
    with pytest.raises(ValueError, match="did not note which rows and model"):
        train(unfinished)
    train(arguments("unfinished", epochs=1, overwrite=True))


def test_a_flag_that_came_later_had_its_default_in_an_earlier_run(arguments):
    made = arguments(epochs=1)
    result = train(made)
    path = made.directory() / "arguments.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in before.items() if k != "adam_beta2"}))
    assert train(made) == json.loads(json.dumps(result))
    with pytest.raises(ValueError, match=r"adam_beta2 0\.999 -> 0\.99"):
        train(arguments(epochs=1, adam_beta2=0.99))


def test_checkpoints_of_nobody_are_not_taken_over(arguments):
    made = arguments(save_steps=2)
    cut_off(made)
    (made.directory() / "arguments.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints, which this run would replace"):
        train(made)
    assert (made.directory() / "checkpoints/checkpoint-4").is_dir()
