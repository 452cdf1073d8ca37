"""Cells that train together: each is the run that it is alone, whatever the others do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("datasets", reason="the models read their data by it")
from models.arguments import Arguments
from models.record.run_directory import RESULT
from models.sweeping.cells import State
from models.sweeping.together import run_together
from models.train import train
from tests.support.tiny_run import read_csv

CLOSE = 1e-6  # relative, of losses


def together(runs: list[Arguments], **options: Any) -> list[State]:
    """Run the cells as one pack; returns the state of each."""
    states: dict[int, State] = {}
    run_together(runs, states.__setitem__, **options)
    return [states[number] for number in range(len(runs))]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read_csv(directory / "steps.csv")]


def files(directory: Path) -> set[str]:
    """The files of a run, without the log that a sweep keeps."""
    paths = {path.relative_to(directory).as_posix() for path in directory.rglob("*.*")}
    return {path for path in paths if path != "log.txt" and not path.endswith(".lock")}


def check_same(packed: Arguments, solo: Arguments) -> None:
    """The two run directories hold the same: files, fields, losses, scores, weights."""
    ours, theirs = packed.directory(), solo.directory()
    assert files(ours) == files(theirs)
    assert losses(ours) == pytest.approx(losses(theirs), rel=CLOSE)
    one, other = (json.loads((place / RESULT).read_text()) for place in (ours, theirs))
    assert one.keys() == other.keys()
    assert one["history"][-1].keys() == other["history"][-1].keys()
    for split, scores in other["metrics"].items():
        assert one["metrics"][split] == pytest.approx(scores, rel=1e-5)
    tensors = [load_file(place / "adapter/adapter_model.safetensors") for place in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert (tensors[0][name] - tensor).abs().max() < 1e-4 * tensor.abs().max() + 1e-7


@pytest.fixture
def pair(arguments):
    """Makes the arguments of a run to be packed, and of the same alone."""

    def build(name: str, **changes: Any) -> tuple[Arguments, Arguments]:
        changes = {"model_dropout": 0.0, "epochs": 2, "learning_rate": 2e-3, **changes}
        packed = arguments(f"packed-{name}", **changes)
        solo = arguments(f"solo-{name}", **changes)
        train(solo)
        return packed, solo

    return build


def test_a_pack_trains_each_run_as_alone(pair):
    pairs = [
        pair("a", epochs=9),
        pair("b", epochs=9, seed=1, rank=1, alpha=4.0),
        pair("c", epochs=9, seed=2, rank=7, learning_rate=1e-3, scheduler="cosine"),
        pair("d", epochs=3, rank=3, rslora=True, weight_decay=0.1, label_smoothing=0.1),
        pair("e", epochs=2, gradient_accumulation=2, warmup_ratio=0.5, best_epoch=True),
    ]
    states = together([packed for packed, _ in pairs])
    assert [state.name for state in states] == ["done"] * 5
    assert len(losses(pairs[0][0].directory())) == 54
    for packed, solo in pairs:
        check_same(packed, solo)
        notes = json.loads((packed.directory() / RESULT).read_text())["notes"]
        assert any("up to 5 runs in one pass" in note for note in notes)
        assert not any("draws other masks" in note for note in notes)
