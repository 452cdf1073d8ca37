"""Models that something else wraps: compiled, checkpointed, sharded. Files know no wrapper."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from tests.adapters.test_load_save import CONFIG, WEIGHTS, from_peft, injected
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def wrap(model: nn.Module, *wrappers) -> nn.Module:
    """Every block of a RoBERTa, and then the encoder around them, inside the wrappers."""
    encoder = model.roberta.encoder
    for wrapper in wrappers:
        for i, block in enumerate(encoder.layer):
            encoder.layer[i] = wrapper(block)
        model.classifier = wrapper(model.classifier)
    return model


def data_parallel(module):
    wrapped = nn.DataParallel(module)
    wrapped.device_ids = []  # the models here are on the CPU, also where there is a GPU
    return wrapped


WRAPPERS = {
    "compiled": (compiled,),
    "checkpointed": (checkpoint_wrapper,),
    "both": (checkpoint_wrapper, compiled),
    "data-parallel": (data_parallel,),
}
wrapped = pytest.mark.parametrize("wrappers", WRAPPERS.values(), ids=WRAPPERS)


@wrapped
def test_a_wrapper_inside_leaves_no_name_in_the_file(wrappers, tmp_path):
    model = injected()
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(copy.deepcopy(model), *wrappers), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        plain, other = (tmp_path / each / name for each in ("plain", "wrapped"))
        assert plain.read_bytes() == other.read_bytes()


@wrapped
def test_a_wrapped_model_gets_lora_and_a_clean_file(wrappers, tmp_path):
    source = injected()
    save_adapter(source, tmp_path / "source")
    ours = wrap(zoo.build("roberta"), *wrappers)
    modules = list(ours.modules())
    load_adapter(ours, tmp_path / "source")
    kept = [type(m) for m in modules if type(m).__name__ in ("OptimizedModule", "DataParallel")]
    assert kept == [t for t in map(type, ours.modules()) if t in kept]
    torch.testing.assert_close(zoo.logits(ours.cpu()), zoo.logits(source))
    save_adapter(ours, tmp_path / "again")
    again, first = (load_file(tmp_path / name / WEIGHTS) for name in ("again", "source"))
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)
    torch.testing.assert_close(
        zoo.logits(from_peft(tmp_path / "again", "roberta")), zoo.logits(source)
    )


def test_a_file_with_the_names_of_wrappers_loads(tmp_path):
    model = injected()
    save_adapter(model, tmp_path)
    values = {k.replace("layer.0", "layer.0._orig_mod"): v for k, v in _values(tmp_path).items()}
    save_file(values, tmp_path / WEIGHTS)
    fresh = zoo.build("roberta")
    load_adapter(fresh, tmp_path)
    assert torch.equal(zoo.logits(fresh), zoo.logits(model))


def _values(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in load_file(directory / WEIGHTS).items()}


@pytest.mark.parametrize("wrapper", [compiled, checkpoint_wrapper])
def test_a_layer_that_is_wrapped_alone_is_refused_by_name(wrapper):
    model = zoo.build("roberta")
    attention = model.roberta.encoder.layer[0].attention.self
    attention.query = wrapper(attention.query)
    for targets in ("query", "all-linear"):
        report = add_lora(copy.deepcopy(model), LoRAConfig(targets=targets))
        reasons = [r.reason for r in report.skipped if "layer.0.attention.self.query" in r.name]
        assert len(reasons) == 1 and "wrapped alone" in reasons[0]


def test_a_gathered_state_takes_the_place_of_the_models_own(tmp_path):
    model = injected()
    save_adapter(model, tmp_path / "own")
    state = {f"module._orig_mod.{k}": v.clone() for k, v in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"query\.lora_A is sharded: pass a gathered state_dict="):
        save_adapter(model, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    save_adapter(model, tmp_path / "given", state_dict=state)
    assert (tmp_path / "own" / WEIGHTS).read_bytes() == (tmp_path / "given" / WEIGHTS).read_bytes()
    key = next(k for k in state if "lora_A" in k)
    state[key] = state[key][:1]
    with pytest.raises(ValueError, match=r"lora_A is \[1, 32\], a part of \[3, 32\]"):
        save_adapter(model, tmp_path / "part", state_dict=state)
    del state[key]
    with pytest.raises(ValueError, match=r"state_dict has no .*query\.lora_A"):
        save_adapter(model, tmp_path / "part", state_dict=state)


def _small() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.Sequential(block, nn.BatchNorm1d(8), nn.Linear(8, 4))
    add_lora(model, LoRAConfig(rank=2, targets=("0.0", "0.1"), train="2"))
    zoo.randomise(model, "lora_", "2.")
    return model


def _is_unit(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return recurse or isinstance(module, nn.Sequential)


def _save_sharded(rank: int, directory: str, processes: int) -> None:
    """What each process does: the same model, sharded in three ways, is saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/s", rank=rank, world_size=processes
    )
    model = FullyShardedDataParallel(
        _small(), use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=_is_unit
    )
    save_adapter(model, f"{directory}/fsdp")
    with FullyShardedDataParallel.summon_full_params(model):
        save_adapter(model, f"{directory}/summoned")
    sharded, mesh = _small(), init_device_mesh("cpu", (processes,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    save_adapter(sharded, f"{directory}/fsdp2")
    save_adapter(nn.parallel.DistributedDataParallel(_small()), f"{directory}/ddp")
    for each in (model, sharded):
        with pytest.raises(ValueError, match="are sharded: load the adapter before"):
            load_adapter(each, f"{directory}/fsdp2")
    with pytest.raises(ValueError, match="are sharded: call add_lora before"):
        add_lora(model, LoRAConfig(targets="0.0"))
    Path(directory, "file").touch()
    with pytest.raises((RuntimeError, NotADirectoryError), match="an adapter is a directory"):
        save_adapter(sharded, f"{directory}/file")
    dist.barrier()
    if processes > 1:
        os._exit(0)  # gloo's threads may abort a process that ends in the common way
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_sharded_model_is_gathered_and_written_once(processes, tmp_path):
    if processes == 1:
        _save_sharded(0, str(tmp_path), 1)
    else:
        multiprocessing.spawn(_save_sharded, (str(tmp_path), processes), nprocs=processes)
    save_adapter(_small(), tmp_path / "plain")
    for way in ("fsdp", "summoned", "fsdp2", "ddp"):
        assert (tmp_path / way / CONFIG).read_text() == (tmp_path / "plain" / CONFIG).read_text()
        saved, whole = load_file(tmp_path / way / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
        assert saved.keys() == whole.keys()
        assert all(torch.equal(saved[key], whole[key]) for key in whole)
