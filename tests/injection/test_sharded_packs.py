"""Two processes that train several adapters at once, by torch's engines: the losses of one process.

The adapters are of `add_loras`, or PEFT's with a name for each example. The processes have other
adapters than each other in some batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import LoRAConfig, adapter_rows, add_loras, explain, fuse_peft, save_adapters
from tests.injection.test_sharded import fsdp1, fsdp1_each, fsdp2, fsdp2_each, late
from tests.support import zoo
from tests.support.processes import ENCODER, PROCESSES, STEPS, optimizer_of, results_of, run_all

# Whose examples the processes have in each step: two each.
NAMES = ("abab", "abba", "bbab")
WAYS = ("saved", "alone")
FRESH = "roberta.embeddings.LayerNorm.bias"


def ours() -> nn.Module:
    model = zoo.build("roberta")
    configs = {
        name: LoRAConfig(rank=rank, alpha=alpha, targets=ENCODER, train="classifier")
        for name, rank, alpha in (("a", 2, 4), ("b", 3, 2))
    }
    add_loras(model, configs, seeds={"a": 0, "b": 1})
    # As if a checkpoint had lacked them: of the head they are a copy of each adapter.
    model.lora_kept = (FRESH, "classifier.dense.bias")
    zoo.randomise(model, "lora_B")
    return model


def pefts() -> nn.Module:
    model: Any = zoo.peft_model(target_modules=["query", "key", "value", "dense"])
    config = peft.LoraConfig(r=3, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model.add_adapter("b", config)
    zoo.randomise(model, "lora_B", "modules_to_save")
    model.set_requires_grad(["default", "b"])
    return model


def fused() -> nn.Module:
    model = pefts()
    fuse_peft(model)
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def logits_of_blocks(model: nn.Module, names: str, batch: dict[str, Tensor]) -> Tensor:
    """With `adapter_rows`: the examples of "a", then those of "b", and back in order."""
    order = sorted(range(len(names)), key=names.__getitem__)
    rows = {name: names.count(name) for name in "ab"}
    with adapter_rows(model, rows):
        found: Tensor = model(**{key: value[order] for key, value in batch.items()}).logits
    return found[torch.tensor(order).argsort()]


def logits_of_names(model: nn.Module, names: str, batch: dict[str, Tensor]) -> Tensor:
    """With a name for each example; the first in a batch of all has no adapter."""
    given = ["default" if name == "a" else name for name in names]
    found: Tensor = model(**batch, adapter_names=given).logits
    return found


class Row(NamedTuple):
    """A model, and the engine that it is under."""

    build: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]


ROWS = {
    "ddp": Row(ours, ddp),
    "ddp-peft": Row(fused, ddp),
    "fsdp1": Row(ours, fsdp1),
    "fsdp1-peft": Row(fused, fsdp1),
    "fsdp1-peft-late": Row(pefts, late(fsdp1)),
    "fsdp1-each": Row(ours, fsdp1_each),
    "fsdp2": Row(ours, fsdp2),
    "fsdp2-peft": Row(fused, fsdp2),
    "fsdp2-peft-late": Row(pefts, late(fsdp2)),
    "fsdp2-each": Row(ours, fsdp2_each),
}


def train(model: nn.Module, part: slice, logits_of: Callable[..., Tensor]) -> list[float]:
    """The loss of each step, on a part of the examples."""
    optimizer = optimizer_of(model)
    losses = []
    for step, names in enumerate(NAMES):
        batch = {k: v[part] for k, v in zoo.batch(seed=step, rows=2 * PROCESSES).items()}
        labels = torch.tensor([0, 1, 2, 1])[part]
        loss = F.cross_entropy(logits_of(model, names[part], batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _run(row: Row, directory: Path) -> dict[str, Any]:
    logits_of = logits_of_blocks if row.build is ours else logits_of_names
    alone = fused() if row.build is pefts else row.build()
    expected = train(alone, slice(None), logits_of)
    model = row.wrap(row.build())
    start = 2 * dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = torch.tensor(train(model, slice(start, start + 2), logits_of))
    dist.all_reduce(losses)
    found = {
        "expected": expected,
        "losses": (losses / PROCESSES).tolist(),
        "unfused": len(explain(model).unfused),
        "warnings": [str(each.message) for each in caught if each.category is UserWarning],
    }
    if row.build is ours:
        save_adapters(model, directory / f"saved-{dist.get_rank()}")
        save_adapters(alone, directory / f"alone-{dist.get_rank()}")
    return found


def _work(rank: int, directory: str) -> None:
    run_all(rank, directory, {name: partial(_run, row) for name, row in ROWS.items()})


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("packs")
    return directory, results_of(_work, directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_two_processes_train_several_adapters_as_one(name, results):
    directory, found = results[0] / name, results[1][name]
    assert "error" not in found, found["error"]
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    assert len(set(found["losses"])) == STEPS == len(NAMES)
    assert found["unfused"] == 0
    told = [text for text in found["warnings"] if "PEFT's own" in text]
    assert not told
    if ROWS[name].build is not ours:
        return
    # With DDP each process that calls `save_adapters` writes, for each has the whole model.
    assert (directory / "saved-1").exists() == (ROWS[name].wrap is ddp)
    for adapter in "ab":
        folders = (directory / f"{way}-0" / adapter for way in WAYS)
        saved, alone = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert saved.keys() == alone.keys()
        assert any("classifier" in key for key in saved)
        assert any(FRESH in key for key in saved)
        for key in saved:  # as in test_sharded, of which AdamW's first steps are the reason
            torch.testing.assert_close(saved[key], alone[key], rtol=1e-3, atol=1e-4)
    texts = [(directory / f"{way}-0/b/adapter_config.json").read_text() for way in WAYS]
    assert texts[0] == texts[1]
