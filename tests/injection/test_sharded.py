"""Two processes that train one model, by torch's engines: the losses of one process, layers fused.

Every row of `ROWS` is run once by two processes with gloo, on a CPU. Each process has half of each
batch, and a model of its own copy on the whole batch is the yardstick.
"""

from __future__ import annotations

import datetime
import json
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from safetensors.torch import load_file
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import lora_kernels.injection.peft
import lora_kernels.layers.group
import lora_kernels.layers.linear
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

PROCESSES, STEPS = 2, 3
ATTENTION = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
ENCODER = [*ATTENTION, "output.dense"]


def ours(**changes: Any) -> nn.Module:
    model = zoo.build("roberta")
    add_lora(model, LoRAConfig(rank=2, targets=tuple(ENCODER), train="classifier", **changes))
    zoo.randomise(model, "lora_B")
    return model


def one_base_weight_trains() -> nn.Module:
    model = ours()
    model.roberta.encoder.layer[0].attention.self.query.weight.requires_grad_()
    return model


def gpt2() -> nn.Module:
    model = zoo.build("gpt2")
    add_lora(model, LoRAConfig(rank=2, targets=("c_attn.q", "c_attn.v", "c_proj"), train="score"))
    zoo.randomise(model, "lora_B")
    return model


def pefts(**changes: Any) -> nn.Module:
    return zoo.peft_model(target_modules=["query", "key", "value", "dense"], **changes)


def fused(**changes: Any) -> nn.Module:
    model = pefts(**changes)
    fuse_peft(model)
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


def fsdp1_each(model: nn.Module) -> nn.Module:
    return fsdp1(model, is_layer)


def fsdp2(model: nn.Module, is_unit: Callable[[nn.Module], bool] = is_block) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [each for each in model.modules() if is_unit(each)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_each(model: nn.Module) -> nn.Module:
    return fsdp2(model, is_layer)


def late(engine: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Fused after the engine took the model, as a Trainer's callback does."""

    def wrap(model: nn.Module) -> nn.Module:
        model = engine(model)
        fuse_peft(model)
        return model

    return wrap


# Checkpoints of torch.distributed are tried with these.
RESUMED = ("ddp", "fsdp1", "fsdp1-peft", "fsdp2", "fsdp2-peft", "fsdp2-each")
TOGETHER, ALONE, GPT2 = [3, 1, 1, 1] * 2, [1] * 12, [1] * 6
APART = "run one by one: each is sharded by itself"


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
    "fsdp1-each": Row(ours, fsdp1_each, ALONE, APART),
    "fsdp1-each-peft": Row(fused, fsdp1_each, ALONE, APART),
    "fsdp2": Row(ours, fsdp2, TOGETHER),
    "fsdp2-peft": Row(fused, fsdp2, TOGETHER),
    "fsdp2-peft-late": Row(pefts, late(fsdp2), TOGETHER),
    "fsdp2-dora": Row(lambda: ours(dora=True), fsdp2, TOGETHER),
    "fsdp2-columns": Row(gpt2, fsdp2, GPT2),
    "fsdp2-each": Row(ours, fsdp2_each, ALONE, APART),
    "fsdp2-each-peft": Row(fused, fsdp2_each, ALONE, APART),
    "fsdp2-each-peft-late": Row(pefts, late(fsdp2_each), ALONE, APART),
}


class _Calls:
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

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(x: Any, given: Any, *rest: Any) -> Any:
            layers = given if rest else (given.weights,)
            self.layers.append(len(layers))
            self.asking += sum(weights.weight.requires_grad for weights in layers)
            return call(x, given, *rest)

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


def _run(name: str, row: Row, calls: _Calls, directory: Path) -> dict[str, Any]:
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


def _under_tensor_parallelism(directory: str) -> dict[str, Any]:
    """What is refused, and what of a PEFT model runs unfused, where `tp_plan` split the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    if dist.get_rank() == 0:
        zoo.build("llama").save_pretrained(f"{directory}/llama")
    dist.barrier()
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(PROCESSES))
    model = tf.LlamaForSequenceClassification.from_pretrained(
        f"{directory}/llama", tp_plan="auto", num_labels=3
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
    """What each process does: all rows, and their results into a file of the first process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    calls, results = _Calls(), {}
    for name, row in ROWS.items():
        place = Path(directory, name)
        place.mkdir(exist_ok=True)
        try:
            results[name] = _run(name, row, calls, place)
        except Exception:  # noqa: BLE001 (the test of that row shows it)
            results[name] = {"error": traceback.format_exc()}
    results["tensor parallelism"] = _under_tensor_parallelism(directory)
    Path(directory, f"results-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the common way


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    directory = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(_work, (str(directory),), nprocs=PROCESSES)
    first, second = (
        json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(PROCESSES)
    )
    return directory, first | {name: each for name, each in second.items() if "error" in each}


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
    assert "is split by tensor parallelism (tp_plan, DTensor weights)" in found["add_lora"]
    assert found["fused"] == 0 and found["same"]
    assert len(found["reasons"]) == 1 and "patched forward, which split it" in found["reasons"][0]
    assert "takes no DTensor" in found["layer"]
