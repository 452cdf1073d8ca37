"""Overwriting deletes what a run wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the models read their data by it")
from models.arguments import Arguments
from models.methods import METHODS
from models.record.run_directory import ARGUMENTS, RESULT, WRITTEN, find_run, opened
from models.train import train

IDENTITY = Arguments(task="sst2", method="lora", rank=4, seed=0).identity()
FILES = (
    *("result.json", "steps.csv", "history.csv", "predictions.csv", "plot.png", "arguments.json"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("checkpoints/checkpoint-2/optimizer.pt", "checkpoints/checkpoint-2/seal.json"),
    *(".steps.csv.host-12-34.new.csv", ".adapter.a-host.org-1-2.new/adapter_config.json"),
    *(".adapter.host-1-2.old/adapter_config.json", ".plot.png.99.part.png", ".run.lock"),
)


def fill(directory: Path) -> Path:
    """Make `directory` what a killed run may have left."""
    for name in FILES:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({ARGUMENTS: IDENTITY, RESULT: {"metrics": {}}}.get(name, {})))
    return directory


def overwrite(directory: Path) -> None:
    with opened(directory, {**IDENTITY, "rank": 5}, resume=True, overwrite=True) as checkpoint:
        assert checkpoint is None


def names(directory: Path) -> set[str]:
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def test_all_that_a_run_wrote_goes_and_what_others_wrote_stays(tmp_path):
    run = fill(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / ".steps.old").write_text("mine")
    nested = fill(run / "inner")
    overwrite(run)
    assert names(run) == {ARGUMENTS, "notes.txt", ".steps.old", *(f"inner/{n}" for n in FILES)}
    assert find_run(nested, IDENTITY, resume=True, overwrite=False) == {"metrics": {}}


def test_a_run_of_each_method_leaves_only_what_overwriting_deletes(arguments):
    for method in METHODS:
        if method == "peft":
            pytest.importorskip("peft")
        made = arguments(method, method=method, epochs=1)
        train(made)
        overwrite(made.directory())
        assert names(made.directory()) == {ARGUMENTS}


def test_the_result_goes_first_and_the_arguments_last(tmp_path, monkeypatch):
    run, gone = fill(tmp_path / "run"), []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: (gone.append(path.name), unlink(path, **options))
    )
    overwrite(run)
    gone = [name for name in gone if not name.startswith(".")]
    assert gone[0] == RESULT and gone.index(ARGUMENTS) == len(gone) - 1


@pytest.mark.parametrize("name", ["adapter/notes.txt", "checkpoints/mine/a.pt", "model/x.gguf"])
def test_a_stranger_within_a_folder_of_the_run_is_named(tmp_path, name):
    run = fill(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name}, which no run wrote"):
        overwrite(run)
    assert names(run) == {*FILES, name} - {".run.lock"}


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "steps.csv", "run"])
def test_links_are_not_followed(tmp_path, name):
    run, elsewhere = fill(tmp_path / "run"), fill(tmp_path / "elsewhere")
    if name == "run":
        (tmp_path / "link").symlink_to(run)
        run = tmp_path / "link"
    else:
        for path in sorted((run / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (run / name).rmdir() if (run / name).is_dir() else (run / name).unlink()
        (run / name).symlink_to(elsewhere / name)
    before = names(elsewhere)
    with pytest.raises(ValueError, match=r"which no run wrote|is a link"):
        overwrite(run)
    assert names(elsewhere) == before


@pytest.mark.parametrize("content", ["{}", "[]", "not json", json.dumps({"rank": 3, "seed": 1})])
def test_a_file_called_arguments_does_not_make_a_run(tmp_path, content):
    folder = fill(tmp_path / "project")
    (folder / ARGUMENTS).write_text(content)
    before = names(folder)
    for overwriting in (True, False):
        with pytest.raises(ValueError, match=r"no arguments.json of a run"):
            find_run(folder, IDENTITY, resume=True, overwrite=overwriting)
    assert names(folder) == before


def test_no_run_inside_a_run_is_overwritten_or_lies_in_its_folders(tmp_path):
    run = fill(tmp_path / "run")
    for inner, overwriting in (("adapter", False), ("checkpoints/new", False), ("new", True)):
        with pytest.raises(ValueError, match="lies inside the run"):
            find_run(run / inner, IDENTITY, resume=True, overwrite=overwriting)
    assert find_run(run / "new", IDENTITY, resume=True, overwrite=False) is None


@pytest.mark.parametrize("name", ["adapter", "model", "steps.csv", "plot.png"])
def test_a_new_run_replaces_nothing(arguments, name):
    made = arguments()
    made.directory().mkdir()
    (made.directory() / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds {name}, which this run would replace"):
        train(made)


def test_a_new_run_may_share_its_directory(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert find_run(tmp_path, IDENTITY, resume=True, overwrite=False) is None
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        find_run(tmp_path / "file", IDENTITY, resume=True, overwrite=False)


def test_a_result_that_is_none_is_refused(tmp_path):
    run = fill(tmp_path / "run")
    for content in ("{}", "[1]", "{"):
        (run / RESULT).write_text(content)
        with pytest.raises(ValueError, match=r"result.json is no .*--overwrite it"):
            find_run(run, IDENTITY, resume=True, overwrite=False)


def test_every_file_is_named_once():
    assert len(set(WRITTEN)) == len(WRITTEN) and WRITTEN[-1] == ARGUMENTS
