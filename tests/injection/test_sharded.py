"""Two processes that train one model, by torch's engines: the losses of one process, layers fused.

Every row of `ROWS` is run once by two processes with gloo, on a CPU (`support.processes`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    add_lora,
    explain,
    fuse_peft,
    save_adapter,
    unfuse_peft,
)
from tests.support import zoo
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


def one_base_weight_trains() -> nn.Module:
    model = ours()
    model.roberta.encoder.layer[0].attention.self.query.weight.requires_grad_()
    return model


def gpt2() -> nn.Module:
    model = zoo.build("gpt2")
    add_lora(model, LoRAConfig(rank=2, targets=("c_attn.q", "c_attn.v", "c_proj"), train="score"))
    zoo.randomise(model, "lora_B")
    return model


def is_block(module: nn.Module) -> bool:
    return type(module).__name__ in ("RobertaLayer", "GPT2Block")


def is_layer(module: nn.Module) -> bool:
    inside = "_fsdp_wrapped_module" in module._modules  # FSDP1's wrapper shows what it holds
    return hasattr(module, "lora_A") and not inside


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: nn.Module, is_unit: Callable[[nn.Module], bool] = is_block) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or is_unit(module)

    return FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy
    )


def fsdp2(model: nn.Module, is_unit: Callable[[nn.Module], bool] = is_block) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [each for each in model.modules() if is_unit(each)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


fsdp1_each, fsdp2_each = partial(fsdp1, is_unit=is_layer), partial(fsdp2, is_unit=is_layer)


def late(engine: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Fused after the engine took the model, as a Trainer's callback does."""

    def wrap(model: nn.Module) -> nn.Module:
        model = engine(model)
        fuse_peft(model)
        return model

    return wrap


# Checkpoints of torch.distributed are tried with these.
RESUMED = ("ddp", "fsdp1", "fsdp1-peft", "fsdp2", "fsdp2-peft", "fsdp2-each")
GPT2 = [1] * 6


class Row(NamedTuple):
    """A model under an engine: how many layers each call computes, and the warning, if any."""

    build: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    calls: list[int]
    warning: str | None = None


ROWS = {
    "ddp": Row(ours, ddp, TOGETHER),
    "ddp-peft": Row(fused, ddp, TOGETHER),
    "fsdp1": Row(ours, fsdp1, TOGETHER),
    "fsdp1-peft": Row(fused, fsdp1, TOGETHER),
    "fsdp1-peft-late": Row(pefts, late(fsdp1), TOGETHER),
    "fsdp1-base-weight-trains": Row(one_base_weight_trains, fsdp1, TOGETHER),
    "fsdp1-biases-train": Row(lambda: fused(bias="all"), fsdp1, TOGETHER),
    "fsdp1-dora": Row(lambda: fused(use_dora=True), fsdp1, TOGETHER),
    "fsdp1-columns": Row(gpt2, fsdp1, GPT2),
    "fsdp1-embedding": Row(partial(ours, "word_embeddings"), fsdp1, [1, *TOGETHER]),
    "fsdp1-each": Row(ours, fsdp1_each, ALONE, APART),
    "fsdp1-each-peft": Row(fused, fsdp1_each, ALONE, APART),
    "fsdp2": Row(ours, fsdp2, TOGETHER),
    "fsdp2-peft": Row(fused, fsdp2, TOGETHER),
    "fsdp2-peft-late": Row(pefts, late(fsdp2), TOGETHER),
    "fsdp2-dora": Row(lambda: ours(dora=True), fsdp2, TOGETHER),
    "fsdp2-columns": Row(gpt2, fsdp2, GPT2),
    "fsdp2-embedding": Row(partial(ours, "word_embeddings"), fsdp2, [1, *TOGETHER]),
    "fsdp2-each": Row(ours, fsdp2_each, ALONE, APART),
    "fsdp2-each-peft": Row(fused, fsdp2_each, ALONE, APART),
    "fsdp2-each-peft-late": Row(pefts, late(fsdp2_each), ALONE, APART),
}


def _check_resumed(row: Row, directory: Path, losses: torch.Tensor) -> None:
    """A fresh model and optimizer that load a checkpoint of step one go on with the same losses."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        model = row.wrap(row.build())
        optimizer = optimizer_of(model)
        train(model, own_batches()[:1], optimizer)
        parameters, moments = get_state_dict(model, optimizer)
        return model, optimizer, {"model": parameters, "optimizer": moments}

    _, _, state = begun()
    checkpoint.save(state, checkpoint_id=directory)
    model, optimizer, other = begun()
    train(model, own_batches()[1:2], optimizer)  # elsewhere than the checkpoint
    checkpoint.load(other, checkpoint_id=directory)
    set_state_dict(
        model, optimizer, model_state_dict=other["model"], optim_state_dict=other["optimizer"]
    )
    found = torch.tensor(train(model, own_batches()[1:], optimizer))
    torch.testing.assert_close(found, losses[1:])


def _run(name: str, row: Row, calls: Calls, directory: Path) -> dict[str, Any]:
    alone = row.build()
    expected = train(alone, batches(slice(None)))
    model = row.wrap(row.build())
    calls.layers, calls.asking = [], 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = torch.tensor(train(model, own_batches()))
    layers, asking = calls.layers, calls.asking
    calls.layers, own = [], losses.clone()
    dist.all_reduce(losses)
    if name in RESUMED:
        _check_resumed(row, directory / "checkpoint", own)
    segments = [problem.segments for _, problem, _ in explain(model).rows]
    found = {
        "expected": expected,
        "losses": (losses / PROCESSES).tolist(),
        "calls": layers,
        "asking": asking,
        "segments": segments,
        "unfused": len(explain(model).unfused),
        "warnings": [str(each.message) for each in caught if each.category is UserWarning],
    }
    rank = dist.get_rank()
    if not hasattr(alone, "peft_config"):
        save_adapter(model, directory / f"saved-{rank}")
        save_adapter(alone, directory / f"alone-{rank}")
    else:
        before = [type(module) for module in pefts_layers(model)]
        after = [type(module) for module in pefts_layers(unfuse_peft(model))]
        found["unfused_types"] = [each.__name__ for each in after]
        assert before != after
    return found


def _under_tensor_parallelism(directory: Path) -> dict[str, Any]:
    """What is refused, and what of a PEFT model runs unfused, where `tp_plan` split the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    if dist.get_rank() == 0:
        zoo.build("llama").save_pretrained(directory / "llama")
    dist.barrier()
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(PROCESSES))
    model = tf.LlamaForSequenceClassification.from_pretrained(
        directory / "llama", tp_plan="auto", num_labels=3
    ).eval()
    found: dict[str, Any] = {}
    try:
        add_lora(model, LoRAConfig(targets=("q_proj",)))
    except ValueError as error:
        found["add_lora"] = str(error)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    before = zoo.logits(wrapped)
    report = fuse_peft(wrapped)
    found["fused"] = len(report.fused)
    found["reasons"] = sorted({row.reason for row in report.skipped})
    found["same"] = torch.equal(zoo.logits(wrapped), before)
    layer = distribute_module(FusedLoRALinear(8, 4), init_device_mesh("cpu", (PROCESSES,)))
    try:
        layer(torch.randn(2, 8))
    except TypeError as error:
        found["layer"] = str(error)
    return found


def pefts_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_layer(module)]


def _work(rank: int, directory: str) -> None:
    """What each process does."""
    calls = Calls()
    runs = {name: partial(_run, name, row, calls) for name, row in ROWS.items()}
    run_all(rank, directory, {**runs, "tensor parallelism": _under_tensor_parallelism})


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("sharded")
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
    assert found["asking"] == (STEPS if "base-weight" in name else 0)
    assert found["unfused"] == 0 and len(found["segments"]) == sum(row.calls)
    grouped = 2 if row.calls is GPT2 else 1  # c_attn has two ranges of columns
    assert sum(n == 3 for n in found["segments"]) == 3 * row.calls.count(3)
    assert max(found["segments"]) == max(*row.calls, grouped)
    told = [text for text in found["warnings"] if "one by one" in text or "PEFT's own" in text]
    assert len(set(told)) == len(told) / (2 if row.warning else 1) == (row.warning is not None)
    assert all(row.warning in text for text in told)
    if "unfused_types" in found:
        prefix = "FSDP" if "fsdp2-each" in name else ""
        assert set(found["unfused_types"]) == {f"{prefix}Linear"}
        return
    # With DDP each process that calls `save_adapter` writes, for each has the whole model.
    assert (directory / "saved-1").exists() == (row.wrap is ddp)
    folders = (directory / f"{way}-0" for way in ("saved", "alone"))
    saved, alone = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert saved.keys() == alone.keys()
    # AdamW divides a gradient by its own size: where it is nearly zero, rounding makes a step. With
    # three steps of 1e-2 an element moves by up to 0.03; one of them differed by 4e-5.
    for key in saved:
        torch.testing.assert_close(saved[key], alone[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_tensor_parallelism_is_refused_by_name_or_runs_as_it_did(results):
    found = results[1]["tensor parallelism"]
    assert "error" not in found, found["error"]
    assert "is split by tensor parallelism (tp_plan, DTensor weights)" in found["add_lora"]
    assert found["fused"] == 0 and found["same"]
    assert len(found["reasons"]) == 1 and "patched forward, which split it" in found["reasons"][0]
    assert "takes no DTensor" in found["layer"]
