"""Runs of `models.train` by two processes: the losses of one, one writer, and a resume."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing

pytest.importorskip("datasets", reason="the models read their data by it")
from models.train import Arguments, train
from tests.models.test_resume import KillAt, KilledError, leftovers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}
# Without dropout, whose masks differ. 44 rows are batches of 8 and one of 4, or one of 43 and one
# of 1, which each process then takes.
EXACT = {"dropout": 0.0, "model_dropout": 0.0, "epochs": 2}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def launch(launcher: str, made: Arguments) -> str:
    words = LAUNCHERS[launcher]
    if launcher == "accelerate":
        words = [*words, f"--main_process_port={free_port()}"]
    flags = [word for words in made.changed().values() for word in words]
    command = [sys.executable, "-m", *words, "-m", "models.train", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def numbers(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v or "nan") for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize(
    "launcher, batch",
    [("torchrun", 43), pytest.param("accelerate", 8, marks=pytest.mark.nightly)],
)
def test_two_processes_give_the_numbers_of_one(arguments, launcher, batch):
    one = arguments("one", batch_size=batch, **EXACT)
    two = arguments("two", batch_size=batch, **EXACT)
    train(one)
    printed = launch(launcher, two)
    for name in ("steps.csv", "history.csv"):
        found, expected = (numbers(made.directory() / name) for made in (two, one))
        assert len(found) == len(expected)
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, nan_ok=True)
    results = [json.loads((made.directory() / "result.json").read_text()) for made in (two, one)]
    for split, scores in results[1]["metrics"].items():
        for name, score in scores.items():
            found = results[0]["metrics"][split][name]
            assert found is score or found == pytest.approx(score, rel=1e-4)
    saved, alone = (
        load_file(made.directory() / "adapter/adapter_model.safetensors") for made in (two, one)
    )
    assert saved.keys() == alone.keys()
    for key in saved:
        torch.testing.assert_close(saved[key], alone[key], rtol=1e-3, atol=1e-4)
    assert json.loads((two.directory() / "arguments.json").read_text())["processes"] == 2
    assert printed.count("┃ group") == 1, "one process prints"


def _work(rank: int, port: str, made: Arguments, step: int | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
    }  # fmt: skip
    try:
        train(made, callbacks=(KillAt(step),))
    except KilledError:
        assert step is not None
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the common way


def test_a_run_of_two_processes_that_was_killed_goes_on_as_if_it_had_not(arguments):
    def run(name: str, *steps: int | None) -> dict[str, Any]:
        made = arguments(name, dropout=0.1, save_steps=2, epochs=2)
        for step in steps:
            multiprocessing.spawn(_work, (free_port(), made, step), nprocs=2)
        return leftovers(made)

    whole = run("whole", None)
    assert len(whole["steps"]) == 1 + 12
    assert run("killed", 3, None) == whole
    made = arguments("killed", dropout=0.1, save_steps=2, epochs=2)
    with pytest.raises(ValueError, match="processes 2 -> None"):
        train(made)
