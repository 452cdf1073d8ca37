"""Whole models that were pickled before the modules moved still load, and compute what they did."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig
from lora_kernels.former_names import FORMER

# Made by version 0.1.0 as it was before the wings: a model whose query, key and value are a group,
# a layer with LoRA on columns, an input x, and the outputs y of query, value and that layer.
OLD = Path(__file__).parent / "support" / "models_of_0_1.pt"


def test_an_old_file_of_torch_save_loads():
    old = torch.load(OLD, weights_only=False)
    model, layer = old["model"]["m"], old["model"]["layer"]
    assert model.lora_config == LoRAConfig(
        rank=2, alpha=4, dropout=0.1, targets=("query", "key", "value"), train=("out",)
    )
    found = [each(old["x"]) for each in (model["query"], model["value"], layer)]
    for y, wanted in zip(found, old["y"], strict=True):
        torch.testing.assert_close(y, wanted)
    old["model"].train()
    model["query"](old["x"]).sum().backward()
    assert model["query"].lora_A.grad.abs().sum() > 0 and model["query"].group is not None


def test_pickles_made_now_name_no_file():
    layer = FusedLoRALinear(6, 4, rank=2)
    content = pickle.dumps((layer, LoRAConfig()))
    assert b"lora_kernels.layers.linear" not in content and b"layers.config" not in content
    assert isinstance(pickle.loads(content)[0], FusedLoRALinear)


@pytest.mark.parametrize("former", FORMER)
def test_each_former_module_resolves(former):
    module = import_module(f"lora_kernels.{former}")
    known = {
        "dispatch": "choose", "functional": "lora_linear", "groups": "Group", "held": "HeldCast",
        "modules": "FusedLoRALinear", "peft": "FusedForward", "tuning": "Tile",
    }  # fmt: skip
    assert getattr(module, known[former]).__name__ == known[former]
    with pytest.raises(AttributeError, match="has moved, and has no 'nothing'"):
        module.nothing  # noqa: B018


def test_the_alias_ends_with_the_next_release():
    assert lora_kernels.__version__.startswith("0.1."), "remove former_names, and this test"
