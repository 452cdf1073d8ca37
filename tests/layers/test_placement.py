"""Others who move a model's tensors: nn.DataParallel's replicas, accelerate's offloading.

torch's own replication and accelerate's own hooks run here, with all "cards" on one device.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import accelerate
import peft
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora
from lora_kernels.injection.inject import fused_layers
from lora_kernels.injection.peft import fuse_peft
from tests.support import zoo

QKV = ("query", "key", "value")


def fused() -> nn.Module:
    model = zoo.build("roberta")
    add_lora(model, LoRAConfig(rank=3, targets=QKV))
    return model


def fused_peft() -> nn.Module:
    config = peft.LoraConfig(r=3, target_modules=list(QKV))
    model = peft.get_peft_model(zoo.build("roberta"), config).eval()
    fuse_peft(model)
    return model


@pytest.fixture
def replicate(monkeypatch):
    module = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors, devices, detach=False):
        return [[t * 1 if t.requires_grad else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return lambda model: module.replicate(model, [0, 1])


# The Trainer wraps a model in nn.DataParallel wherever it sees two cards.
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("build", [fused, fused_peft])
def test_replicas_compute_with_their_own_tensors(build, autocast, replicate):
    model = build()
    zoo.randomise(model, "lora_B")
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(replica: nn.Module, seed: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return replica(**zoo.batch(seed)).logits

    expected = [run(model, seed) for seed in range(2)]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in expected), trained)
    replicas = replicate(model)
    with torch.no_grad():  # whoever reads the model's own tensors now is seen
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, torch.nan))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, replicas, range(2)))
    actual = torch.autograd.grad(sum(y.square().sum() for y in found), trained)
    for a, b in zip((*found, *actual), (*expected, *gradients), strict=True):
        torch.testing.assert_close(a, b)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.usefixtures("many_tokens")
def test_offloaded_siblings_are_computed_one_by_one():
    """Each layer's tensors are there while it is called, its siblings' are not."""
    model = fused()
    zoo.randomise(model, "lora_B")
    expected = zoo.logits(model)
    assert zoo.nodes(model) == [3, 3]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(zoo.logits(model), expected)
    assert zoo.nodes(model) == [1] * 6


def test_siblings_that_are_partitioned_away_are_computed_one_by_one():
    """As ZeRO-3 does: a layer's weight is there while it is called, and empty at other times."""
    model = fused()
    zoo.randomise(model, "lora_B")
    expected = zoo.logits(model)
    for layer in fused_layers(model).values():
        weight, whole = layer.weight, layer.weight.data

        def gather(*_, weight=weight, whole=whole):
            weight.data = whole

        def release(*_, weight=weight):
            weight.data = torch.empty(0)

        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(release)
        release()
    for _ in range(2):
        assert torch.equal(zoo.logits(model), expected)
