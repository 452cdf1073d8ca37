"""Cells that train together: each is the run that it is alone, whatever the others do."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("datasets", reason="the models read their data by it")
from models.arguments import Arguments
from models.recipes.recipe import Cell
from models.record.checkpoints import last_checkpoint
from models.record.run_directory import CHECKPOINTS, RESULT
from models.sweeping.cells import STOPPED, State, state_of
from models.sweeping.estimate import estimate
from models.sweeping.together import Together, most_that_fit, packs_of, run_together
from models.train import train
from models.training.pack import Pack, stack
from models.training.seat import Seat
from models.training.strand import Strand
from tests.support.tiny_run import read_csv

ROOT = Path(__file__).resolve().parents[2]
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
        found = one["metrics"][split]
        assert found.keys() == scores.keys()
        for name, score in scores.items():
            assert found[name] == (score if score is None else pytest.approx(score, rel=1e-5))
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


def test_masks_of_lora_s_dropout_are_those_of_the_run_alone(pair):
    changes = {"dropout": 0.3, "pad_to_max": True}
    pairs = [pair("a", **changes), pair("b", seed=1, rank=1, **changes)]
    together([packed for packed, _ in pairs])
    for packed, solo in pairs:
        check_same(packed, solo)


def test_gradients_of_several_batches_and_activations_that_are_recomputed(pair):
    changes = {"gradient_checkpointing": True, "dropout": 0.3, "pad_to_max": True}
    pairs = [
        pair("a", gradient_accumulation=4, **changes),
        pair("b", seed=1, gradient_accumulation=1, **changes),
    ]
    together([packed for packed, _ in pairs])
    for packed, solo in pairs:
        check_same(packed, solo)


def test_a_pack_that_is_killed_goes_on_to_the_same_numbers(arguments, pair, monkeypatch):
    changes = {"save_steps": 2, "epochs": 3, "dropout": 0.1, "pad_to_max": True}
    pairs = [pair("a", **changes), pair("b", seed=1, **changes)]
    runs = [packed for packed, _ in pairs]
    for after in (5, 4):  # joint steps; the first end lies between two checkpoints
        with monkeypatch.context() as broken:
            count, forward = iter(range(after)), Pack.forward

            def until(self, batches, count=count, forward=forward):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return forward(self, batches)

            broken.setattr(Pack, "forward", until)
            with pytest.raises(KeyboardInterrupt):
                together(runs)
        assert not (runs[0].directory() / RESULT).exists()
    made = []
    backward = Pack.backward
    monkeypatch.setattr(Pack, "backward", lambda *a: (made.append(1), backward(*a)))
    together(runs)
    assert len(made) == 18 - 8, "they did not go on from their checkpoints"
    for packed, solo in pairs:
        check_same(packed, solo)


# A process that runs a pack, whose arguments it reads, and kills itself where it is told to: at a
# joint step, or after the first cell has saved its second checkpoint and before the others.
KILLED = """
import os, pickle, signal, sys
from models.sweeping.together import run_together
from models.training.pack import Pack
from models.training.trainer import ExactTrainer

owner, name, count, runs = pickle.load(sys.stdin.buffer)
owner = {"Pack": Pack, "ExactTrainer": ExactTrainer}[owner]
method, calls = getattr(owner, name), []

def until(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *args, **kwargs)

setattr(owner, name, until)
run_together(runs, print)
"""


@pytest.mark.parametrize(
    ("where", "steps"),
    [(("Pack", "forward", 4), [2, 2, 2]), (("ExactTrainer", "_save_checkpoint", 5), [4, 2, 2])],
    ids=["at a step", "between two checkpoints"],
)
def test_a_process_that_is_killed_leaves_no_trace(arguments, where, steps):
    changes = {"save_steps": 2, "epochs": 3, "dropout": 0.1, "pad_to_max": True}
    changes |= {"model_dropout": 0.0, "max_train_samples": 40}
    runs, whole = (
        [arguments(f"{place}-{seed}", seed=seed, **changes) for seed in range(3)]
        for place in ("killed", "whole")
    )
    together(whole)
    process = subprocess.run(
        [sys.executable, "-c", KILLED], input=pickle.dumps((*where, runs)), cwd=ROOT,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    saved = [last_checkpoint(run.directory() / CHECKPOINTS)[0] for run in runs]
    assert [path.name for path in saved] == [f"checkpoint-{step}" for step in steps]
    together(runs)
    for run, other in zip(runs, whole, strict=True):
        found, wanted = losses(run.directory()), losses(other.directory())
        assert len(found) == 15
        # Cells that are at unlike steps end at unlike times, and the last steps are of fewer rows.
        exact = len(set(steps)) == 1
        assert found == (wanted if exact else pytest.approx(wanted, rel=CLOSE))
        check_same(run, other)


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_a_run_that_diverges_or_fails_leaves_the_others_alone(arguments, pair):
    good = [pair("a", epochs=3), pair("b", seed=1, epochs=3)]
    lost = arguments("lost", epochs=3, model_dropout=0.0, learning_rate=1e30)
    wrong = arguments("wrong", task="none")
    states = together([good[0][0], lost, wrong, good[1][0]])
    assert [state.name for state in states] == ["done", "done", "failed", "done"]
    assert states[1].why == "diverged" and "unknown task" in states[2].why
    for packed, solo in good:
        check_same(packed, solo)
    result = json.loads((lost.directory() / RESULT).read_text())
    assert result["diverged"] and len(losses(lost.directory())) < 6
    assert any("it left the others at step" in note for note in result["notes"])


def test_a_run_whose_frozen_head_is_its_own_trains_alone(pair):
    changes = {"targets": ["query", "classifier"]}
    pairs = [pair("a", **changes), pair("b", **changes, rank=2), pair("c", seed=1, **changes)]
    together([packed for packed, _ in pairs])
    notes = []
    for packed, solo in pairs:
        check_same(packed, solo)
        found = json.loads((packed.directory() / RESULT).read_text())["notes"]
        notes.append(any("in one pass" in note for note in found))
    assert notes == [True, True, False]


def test_the_base_is_in_memory_once(arguments, monkeypatch):
    places: dict[str, set[int]] = {}
    opened = Pack.open

    def spy(self, seats):
        found = opened(self, seats)
        for seat in seats:
            for name, parameter in seat.trainer.model.named_parameters():
                places.setdefault(name, set()).add(parameter.data_ptr())
        return found

    monkeypatch.setattr(Pack, "open", spy)
    together([arguments(str(seed), seed=seed, epochs=1) for seed in range(3)])
    for name, found in places.items():
        assert len(found) == (3 if "lora_" in name or "classifier" in name else 1), name


def test_a_pack_is_kept_only_if_it_is_faster(pair, monkeypatch, capsys):
    pairs = [pair("a"), pair("b", seed=1)]
    monkeypatch.setattr(Pack, "speed", lambda self: 1.01)
    together([packed for packed, _ in pairs], measure=True)
    assert "2 cells run one by one: a pack is 1.01 times as fast" in capsys.readouterr().out
    for packed, solo in pairs:
        assert losses(packed.directory()) == losses(solo.directory())  # to the bit
        check_same(packed, solo)
        result = json.loads((packed.directory() / RESULT).read_text())
        assert not any("in one pass" in note for note in result["notes"])


def test_a_pause_of_the_machine_does_not_choose(arguments, monkeypatch):
    """A pack that is twice as fast is taken for that, whichever measurement is disturbed."""
    times = iter([2.0, 1.0, 90.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 70.0, 2.0, 1.0])
    ways = []
    monkeypatch.setattr(
        "models.training.pack._seconds",
        lambda work: (ways.append(work.func.__name__), next(times))[1],
    )
    gains, speed = [], Pack.speed
    monkeypatch.setattr(Pack, "speed", lambda self: gains.append(speed(self)) or 1.0)
    for name in ("first", "second"):
        together([arguments(f"{name}-{seed}", seed=seed) for seed in range(2)], measure=True)
    assert gains == [2.0, 2.0]
    assert ways == ["_solo", "_packed"] * 6


def test_measuring_changes_no_number(pair, monkeypatch):
    changes = {"dropout": 0.3, "pad_to_max": True}
    pairs = [pair("a", **changes), pair("b", seed=1, **changes)]
    gains, speed = [], Pack.speed
    monkeypatch.setattr(Pack, "speed", lambda self: gains.append(speed(self)) or 2.0)
    together([packed for packed, _ in pairs], measure=True)
    assert 0 < gains[0] < 20
    for packed, solo in pairs:
        check_same(packed, solo)


def test_losers_stop_and_go_on_when_they_may(pair, monkeypatch):
    changes = {"epochs": 4, "save_steps": 0}
    pairs = [pair(name, seed=seed, **changes) for seed, name in enumerate("abcd")]
    runs = [packed for packed, _ in pairs]
    best = {"packed-a": 0.1, "packed-b": 0.4, "packed-c": 0.3, "packed-d": 0.2}
    with monkeypatch.context() as scored:
        scored.setattr(
            Seat, "score", lambda seat, _: best[Path(seat.trainer.args.output_dir).parent.name]
        )
        states = together(runs, stop_losers=4)
    assert [state.name for state in states] == ["stopped", "done", "stopped", "stopped"]
    assert [state.why[:20] for state in states[::2]] == [
        "stopped after 1 epoc",
        "stopped after 2 epoc",
    ]
    assert state_of(runs[0]).name == "stopped" and not (runs[0].directory() / RESULT).exists()
    check_same(*pairs[1])
    # Those that are left do not halve anew.
    (runs[2].directory() / STOPPED).unlink()
    together([runs[2]])
    check_same(*pairs[2])


def test_packs_are_of_cells_that_differ_in_what_they_may(arguments, monkeypatch):
    def cells(*changes: dict[str, Any]) -> dict[Cell, Arguments]:
        return {
            Cell("toy", {"n": str(n)}, 0, {}): arguments(str(n), **change)
            for n, change in enumerate(changes)
        }

    work = cells(
        {}, {"seed": 1, "rank": 2}, {"method": "full"}, {"learning_rate": 1e-4}, {"batch_size": 4},
        {"targets": ["query"]}, {"dropout": 0.1}, {"method": "lora_adaptive"}, {"max_length": 40},
    )  # fmt: skip

    def packed(together: Together, jobs: int = 1) -> list[list[str]]:
        return [[c.labels["n"] for c in pack] for pack in packs_of(work, together, jobs)]

    apart = [["2"], ["4"], ["5"], ["7"], ["8"]]
    assert packed("auto") == [["0", "1", "3", "6"], *apart]
    assert packed("auto", jobs=2) == [["0", "1"], ["3", "6"], *apart]
    assert packed(3) == [["0", "1"], ["3", "6"], *apart]
    assert len(packed(1)) == 9
    assert [len(pack) for pack in packs_of(work, None, 1)] == [1] * 9

    # The base counts once; a cell more needs its parameters, gradients and means.
    one = estimate(arguments("0"))
    more = one.least_bytes - 4 * (one.total - one.trainable)
    runs = [arguments("0"), arguments("1", seed=1), arguments("2", seed=2)]
    monkeypatch.setattr("models.sweeping.together.memory_here", lambda: one.least_bytes + more)
    assert most_that_fit(runs, 1, expected=False) == 2
    assert most_that_fit(runs, 2, expected=False) == 1
    assert most_that_fit(runs, 1, expected=True) == 1
    with pytest.raises(ValueError, match=r"--together 3: toy/0/seed-0 .* GiB there are; 2 fit"):
        packs_of({cell: work[cell] for cell in list(work)[:4] if cell.labels["n"] != "2"}, 3, 1)


def test_batches_are_padded_with_what_is_not_read():
    short = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    long = {"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 4)}
    joint = stack([short, long], 7)
    assert joint["input_ids"][:, 3].tolist() == [7, 7, 1]
    assert joint["attention_mask"][:, 3].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="have bbox of several lengths"):
        stack([{"bbox": torch.ones(1, 2)}, {"bbox": torch.ones(1, 3)}], 0)
    with pytest.raises(ValueError, match="lacks pixels"):
        stack([{"pixels": torch.ones(1, 2)}, {}], 0)


def test_a_strand_has_its_own_streams_and_errors(capsys):
    def run(name: str) -> list[Any]:
        random.seed(name), np.random.seed(len(name)), torch.manual_seed(len(name))
        found: list[Any] = []
        for _ in range(3):
            found += [random.random(), np.random.rand(), float(torch.rand(1))]
            yield found

    def function(name: str, strands: dict[str, Strand], out: io.StringIO) -> None:
        with contextlib.redirect_stdout(out):
            for found in run(name):
                print(name)
                strands[name].ask(found)
            raise KeyError(name)

    names, strands = ["a", "bb"], {}
    outs = {name: io.StringIO() for name in names}
    for name in names:
        strands[name] = Strand(partial(function, name, strands, outs[name]))
    for _ in range(3):
        found = {name: strands[name].resume() for name in names}
    assert found == {name: list(run(name))[-1] for name in names}
    print("ours")
    assert capsys.readouterr().out == "ours\n" and outs["bb"].getvalue() == "bb\n" * 3
    with pytest.raises(KeyError, match="bb"):
        strands["bb"].resume()
    assert strands["bb"].ended
    strands["a"].close()
    assert strands["a"].ended


def test_seats_compare_the_metric_or_the_loss():
    seat = Seat("a", Pack(), True)
    seat.metric = "accuracy"
    log = [{"loss": 1.0}, {"eval_loss": 0.5, "eval_accuracy": 0.75}, {"eval_loss": 0.25}]
    state = types.SimpleNamespace(log_history=[*log, {"eval_loss": float("nan")}])
    seat.trainer = types.SimpleNamespace(state=state)
    assert [seat.score(epoch) for epoch in (1, 2, 3)] == [0.75, -0.25, float("-inf")]
