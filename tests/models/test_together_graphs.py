"""Cells that train together from CUDA graphs, for which a recorder stands in (`support.graphs`)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("datasets", reason="the models read their data by it")
from models.record.run_directory import RESULT
from models.sweeping.together import packs_of
from tests.models.test_together import Cell, check_same, losses, pair, together
from tests.support.graphs import recording

__all__ = ["pair"]  # the fixture


def notes_of(arguments):
    return json.loads((arguments.directory() / RESULT).read_text())["notes"]


def test_a_pack_trains_each_run_as_alone_without_graphs(pair, monkeypatch):
    changes = {"pad_to_max": True, "dropout": 0.3, "max_train_samples": 40}
    pairs = [
        pair("a", epochs=4, **changes),
        pair("b", epochs=4, seed=1, rank=1, label_smoothing=0.1, **changes),
        pair("c", epochs=2, seed=2, gradient_accumulation=2, **changes),
    ]
    recorder = recording(monkeypatch)
    runs = [replace(packed, graphs=True) for packed, _ in pairs]
    states = together(runs)
    assert [state.name for state in states] == ["done"] * 3, states
    # Forward and backward, of three cells for 10 batches and then of the two that are left for 10.
    assert len(losses(runs[0].directory())) == 20
    assert recorder.captures == 2 * 2 and recorder.replays == 2 * (20 - 2 * 2)
    for (packed, solo), made in zip(pairs, (2, 2, 1), strict=True):
        check_same(packed, solo)
        assert [n for n in notes_of(packed) if n.endswith("graphs")] == [f"{made} CUDA graphs"]
        assert any("warm-up" in note for note in notes_of(packed))


def test_what_is_no_equal_block_runs_as_it_is(pair, monkeypatch):
    changes = {"pad_to_max": True, "epochs": 4}
    pairs = [
        pair("a", max_train_samples=12, **changes),
        pair("b", max_train_samples=24, seed=1, **changes),
    ]
    recorder = recording(monkeypatch)
    monkeypatch.setattr("lora_kernels.layers.packed.is_capturing", lambda: recorder.capturing)
    runs = [replace(packed, graphs=True) for packed, _ in pairs]
    together(runs)
    for packed, solo in pairs:
        check_same(packed, solo)
    # Blocks of 8 and 8, and of 4 and 8, four times each; then "b" goes on alone, four times.
    assert recorder.replays == 2 * (2 + 2)
    why = "2 steps ran as they are: the step cannot be captured: a CUDA graph would replay the rows"
    assert any(note.startswith(why) for note in notes_of(runs[1]))


def test_cells_with_graphs_make_a_pack(arguments):
    work = {
        Cell("toy", {"n": str(n)}, 0, {}): arguments(str(n), seed=n, graphs=graphs)
        for n, graphs in enumerate((True, True, False))
    }
    packs = [[cell.labels["n"] for cell in pack] for pack in packs_of(work, "auto", 1)]
    assert packs == [["0", "1"], ["2"]]
