"""What tests on several processes share: tiny models, a training loop, a count of fused calls.

Each process has half of the rows of each batch, and a model of its own copy on all rows is the
yardstick.
"""

from __future__ import annotations

import datetime
import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

import lora_kernels.injection.peft
import lora_kernels.layers.embedding
import lora_kernels.layers.group
import lora_kernels.layers.linear
from lora_kernels import LoRAConfig, add_lora, fuse_peft
from lora_kernels.strategies import problem
from tests.support import zoo

PROCESSES, STEPS = 2, 3
ATTENTION = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
ENCODER = [*ATTENTION, "output.dense"]
# How many layers each fused call of `ours` and `fused` computes: with siblings, and one by one.
TOGETHER, ALONE = [3, 1, 1, 1] * 2, [1] * 12
APART = "run one by one: each is sharded by itself"


def ours(*more: str, **changes: Any) -> nn.Module:
    model = zoo.build("roberta")
    targets = (*ENCODER, *more)
    add_lora(model, LoRAConfig(rank=2, targets=targets, train="classifier", **changes))
    zoo.randomise(model, "lora_B")
    return model


def pefts(**changes: Any) -> nn.Module:
    return zoo.peft_model(target_modules=["query", "key", "value", "dense"], **changes)


def fused(**changes: Any) -> nn.Module:
    model = pefts(**changes)
    fuse_peft(model)
    return model


class Calls:
    """How many layers each fused call computes, and how many frozen weights ask for a gradient."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.asking = 0
        for module, name in (
            (lora_kernels.injection.peft, "lora_layer"),
            (lora_kernels.layers.linear, "lora_layer"),
            (lora_kernels.layers.group, "lora_linears"),
        ):
            setattr(module, name, self._counted(getattr(module, name)))
        problem.FEW_ELEMENTS = -1  # few tokens would leave their groups
        embedding = lora_kernels.layers.embedding
        embedding.as_asked = self._counted_weight(embedding.as_asked)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(x: Any, given: Any, *rest: Any) -> Any:
            layers = given if rest else (given.weights,)
            self.layers.append(len(layers))
            self.asking += sum(weights.weight.requires_grad for weights in layers)
            return call(x, given, *rest)

        return counted

    def _counted_weight(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted(weight: Any) -> Any:
            self.layers.append(1)
            found = call(weight)
            self.asking += found.requires_grad
            return found

        return counted


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2)


def train(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """The loss of each step."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def batches(part: slice) -> list[dict[str, torch.Tensor]]:
    found = []
    for step in range(STEPS):
        whole = zoo.batch(seed=step, rows=2 * PROCESSES) | {"labels": torch.tensor([0, 1, 2, 1])}
        found.append({name: value[part] for name, value in whole.items()})
    return found


def own_batches() -> list[dict[str, torch.Tensor]]:
    """The rows of this process."""
    start = 2 * dist.get_rank()
    return batches(slice(start, start + 2))


def run_all(
    rank: int, directory: str, runs: Mapping[str, Callable[[Path], dict[str, Any]]]
) -> None:
    """Join the processes, of one thread each, and do all of `runs`; then the process ends.

    Each gets a folder by its name, and what it returns, or its error, goes into a file.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for name, run in runs.items():
        place = Path(directory, name)
        place.mkdir(exist_ok=True)
        try:
            results[name] = run(place)
        except Exception:  # noqa: BLE001 (the test of that run shows it)
            results[name] = {"error": traceback.format_exc()}
    Path(directory, f"results-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the common way


def results_of(work: Callable[[int, str], None], directory: Path) -> dict[str, Any]:
    """Let all processes do `work`, which ends in `run_all`: name -> what the first one found.

    An error of the second process takes its place. Skips where there is no gloo.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    multiprocessing.spawn(work, (str(directory),), nprocs=PROCESSES)
    first, second = (
        json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(PROCESSES)
    )
    return first | {name: each for name, each in second.items() if "error" in each}
