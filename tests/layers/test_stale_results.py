"""A group computes siblings ahead: what waits is dropped where x or a tensor has changed since."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import FusedLoRALinear
from lora_kernels.injection.siblings import group_siblings
from tests.layers.test_group import Attention
from tests.support.oracle import DEVICE


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 5, 24, device=DEVICE, requires_grad=True)


def key_alone(model, x):
    """What the model's key gives where it has no siblings."""
    layer, group = model.key, model.key.group
    layer.group = None
    try:
        return layer(x)
    finally:
        layer.group = group


def test_a_changed_x_is_not_mistaken_for_the_old_one(x):
    model = Attention()
    group_siblings(model)
    leaf = x.detach().clone()
    model.query(leaf)
    leaf.mul_(2)
    torch.testing.assert_close(model.key(leaf), key_alone(model, leaf))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.bias.zero_(),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1, False)),
        lambda layer: layer.lora_B.zero_(),
    ],
    ids=["weight", "bias", "another-weight", "lora_B"],
)
def test_a_result_that_waits_is_not_of_an_old_weight(x, change, conv1d):
    model = Attention()
    if conv1d:
        for name in ("query", "key", "value"):
            base = Conv1D(24, 24).to(DEVICE)
            layer = FusedLoRALinear.from_linear(base, rank=4, strategy="library")
            nn.init.normal_(layer.lora_B)
            setattr(model, name, layer)
    group_siblings(model)
    with torch.no_grad():
        model.query(x)
        waiting = model.key.group._waiting
        assert waiting is not None and id(model.key) in waiting.results
        change(model.key)
        found = model.key(x)
        torch.testing.assert_close(found, key_alone(model, x))
        model.query(x)
        unchanged, _ = model.value.group._waiting.results[id(model.value)]
        assert model.value(x) is unchanged  # what has not changed is still taken


class ChangesX(Attention):
    """Query and key read x after a change of it in place, as where positions are added."""

    def forward(self, x):
        x = x.clone()
        value = self.value(x)
        x.add_(1)
        return self.query(x) * self.key(x) + value


@pytest.mark.parametrize("lora_A", ["trains", "is frozen"])
def test_a_compiled_graph_takes_no_result_of_an_x_that_has_changed(x, lora_A):
    model, x = ChangesX().to(DEVICE), x.detach()
    layers = model.query, model.key, model.value
    for layer in layers:
        layer.lora_A.requires_grad_(lora_A == "trains")

    def step(run):
        y = run(x)
        return y, *torch.autograd.grad(y.square().mean(), [layer.lora_B for layer in layers])

    with torch.no_grad():
        expected = model(x)
    if lora_A == "is frozen":
        gradients = step(model)
    group_siblings(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    if lora_A == "is frozen":
        torch.testing.assert_close(step(compiled), gradients)
    else:  # backward needs the x of value: torch itself refuses, with a graph or without
        for run in (model, compiled):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                step(run)
