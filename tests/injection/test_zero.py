"""DeepSpeed's ZeRO on two processes: the losses of one, the layers that fuse, what is saved.

DeepSpeed is no dependency of this project. Where it is not installed, these tests are skipped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from lora_kernels import explain, fuse_peft, save_adapter
from tests.support.processes import (
    ALONE,
    APART,
    PROCESSES,
    STEPS,
    TOGETHER,
    Calls,
    batches,
    fused,
    optimizer_of,
    ours,
    own_batches,
    pefts,
    results_of,
    run_all,
    train,
)


class Row(NamedTuple):
    """A model at a stage of ZeRO: how many layers each call computes, and the warning, if any."""

    stage: int
    build: Callable[[], nn.Module]
    calls: list[int]
    warning: str | None = None


PEFTS = "fuse_peft reported as fused run PEFT's own forward"
EMBEDDING = partial(ours, "word_embeddings")
ROWS = {
    "zero1": Row(1, ours, TOGETHER),
    "zero2": Row(2, ours, TOGETHER),
    "zero2-embedding": Row(2, EMBEDDING, [1, *TOGETHER]),
    "zero2-peft": Row(2, fused, TOGETHER),
    "zero2-peft-late": Row(2, pefts, TOGETHER),
    "zero3": Row(3, ours, ALONE, APART),
    "zero3-embedding": Row(3, EMBEDDING, [1, *ALONE], APART),
    "zero3-peft": Row(3, fused, [], PEFTS),
    "zero3-peft-late": Row(3, pefts, []),
}


def losses_of(engine: Any) -> torch.Tensor:
    """The loss of each step, on the rows of this process."""
    losses = []
    for batch in own_batches():
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _run(row: Row, calls: Calls, directory: Path) -> dict[str, Any]:
    import deepspeed

    alone = row.build()
    expected = train(alone, batches(slice(None)))
    model = row.build()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        # By default parameters of less than 1e5 elements stay whole, and here all are so small.
        "zero_optimization": {"stage": row.stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    if row.build is pefts:  # after the engine took the model, as a Trainer's callback does
        fuse_peft(engine.module)
    engine.eval()  # without dropout, as `alone`
    calls.layers, calls.asking = [], 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = losses_of(engine)
    layers, calls.layers = calls.layers, []
    dist.all_reduce(losses)
    found = {
        "expected": expected,
        "losses": (losses / PROCESSES).tolist(),
        "calls": layers,
        "unfused": len(explain(engine.module).unfused),
        "warnings": [str(each.message) for each in caught if each.category is UserWarning],
    }
    if hasattr(alone, "peft_config"):
        return found
    if row.stage == 3:
        try:
            save_adapter(engine.module, directory / "parts")
        except ValueError as error:
            found["refused"] = str(error)
    parts = list(engine.module.parameters()) if row.stage == 3 else []
    with deepspeed.zero.GatheredParameters(parts):
        if dist.get_rank() == 0:
            save_adapter(engine.module, directory / "saved")
            save_adapter(alone, directory / "alone")
    return found


def _work(rank: int, directory: str) -> None:
    """What each process does."""
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES)
    )
    calls = Calls()
    run_all(rank, directory, {name: partial(_run, row, calls) for name, row in ROWS.items()})


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    directory = tmp_path_factory.mktemp("zero")
    return directory, results_of(_work, directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_two_processes_train_as_one(name, results):
    directory, found = results[0] / name, results[1][name]
    assert "error" not in found, found["error"]
    row = ROWS[name]
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    assert len(set(found["losses"])) == STEPS
    assert found["calls"] == row.calls * STEPS
    assert found["unfused"] == (0 if row.calls else 12)
    told = {text for text in found["warnings"] if "one by one" in text or "PEFT's own" in text}
    assert len(told) == (row.warning is not None) and all(row.warning in text for text in told)
    if "peft" in name:
        return
    assert ("is sharded" in found.get("refused", "")) == (row.stage == 3)
    saved, alone = (
        load_file(directory / way / "adapter_model.safetensors") for way in ("saved", "alone")
    )
    assert saved.keys() == alone.keys()
    for key in saved:  # as in `test_sharded`: AdamW makes steps of rounding where gradients vanish
        torch.testing.assert_close(saved[key], alone[key], rtol=1e-3, atol=1e-4)
