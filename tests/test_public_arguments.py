"""Every public function refuses what it cannot use by one error that names argument and value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, add_lora, lora_linear

NOT_NUMBERS = (None, "0.1", True, 1j, math.nan, math.inf, [0.5], torch.tensor(0.5))
NOT_FLAGS = (None, "no", 0, 1.0)
NOT_INTEGERS = (None, "8", 8.0, True, math.nan, [8], torch.tensor(8))
NOT_STRATEGIES = (None, 3, ["auto"], "spilt", torch.tensor(1))
NOT_TENSORS = ("x", [1.0], 3.0, np.ones((2, 4)), nn.Linear(4, 3))
NOT_MODULES = (None, "model", LoRAConfig(), {}, nn.Linear, torch.ones(2))
NOT_NAMES = (3, (None,), ("q", ""), b"q", "")
NOT_PATHS = (None, "", 3, b"adapter", ["a"])
NOT_RANGES = (3, "ab", [(0,)], [0, 1], [(0, "a")], [(0.5, 2)], [(0, 4, 5)], [None])
NOT_DROPOUTS = (*NOT_NUMBERS, 1.0, -0.1)
NOT_RANKS = (*NOT_INTEGERS, 0, -1)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "x": torch.ones(2, 4), "weight": torch.ones(3, 4),
        "lora_A": torch.ones(2, 4), "lora_B": torch.ones(3, 2),
    }  # fmt: skip


def function(**changes: Any) -> Any:
    return lora_linear(**{**tensors(), **changes})


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


def injected() -> nn.Module:
    plain = model()
    add_lora(plain, LoRAConfig(rank=2, targets="0"))
    return plain


def from_linear(**changes: Any) -> FusedLoRALinear:
    return FusedLoRALinear.from_linear(**{"layer": nn.Linear(4, 3), **changes})


def new_layer(**changes: Any) -> FusedLoRALinear:
    return FusedLoRALinear(**{"in_features": 4, "out_features": 3, **changes})


def load(**changes: Any) -> Any:
    return lora_kernels.load_adapter(**{"model": model(), "path": "nowhere", **changes})


def save(**changes: Any) -> Any:
    return lora_kernels.save_adapter(**{"model": injected(), "path": "nowhere", **changes})


SETTINGS = {"rank": NOT_RANKS, "alpha": NOT_NUMBERS, "dropout": NOT_DROPOUTS, "rslora": NOT_FLAGS}
# (function, argument, the values that it refuses).
ROWS: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
    *((call, name, bad) for call in (LoRAConfig, from_linear, new_layer)
      for name, bad in {**SETTINGS, "strategy": NOT_STRATEGIES}.items()),
    (LoRAConfig, "group", NOT_FLAGS),
    (LoRAConfig, "targets", (*NOT_NAMES, ())),
    (LoRAConfig, "train", (*NOT_NAMES, None)),
    (new_layer, "in_features", (*NOT_INTEGERS, -1)),
    (new_layer, "out_features", (*NOT_INTEGERS, -1)),
    (new_layer, "bias", NOT_FLAGS),
    (from_linear, "layer", NOT_MODULES),
    (from_linear, "columns", NOT_RANGES),
    *((function, name, (*NOT_TENSORS, None)) for name in tensors()),
    (function, "bias", NOT_TENSORS),
    (function, "scale", NOT_NUMBERS),
    (function, "dropout", NOT_DROPOUTS),
    (function, "training", NOT_FLAGS),
    (function, "strategy", NOT_STRATEGIES),
    (lambda model: add_lora(model, LoRAConfig()), "model", NOT_MODULES),
    (lambda config: add_lora(model(), config), "config", (None, {}, "auto", LoRAConfig)),
    (lora_kernels.merge, "model", NOT_MODULES),
    (lora_kernels.fuse_peft, "peft_model", NOT_MODULES),
    (lambda group: lora_kernels.fuse_peft(model(), group=group), "group", NOT_FLAGS),
    (lambda strategy: lora_kernels.fuse_peft(model(), strategy), "strategy", NOT_STRATEGIES),
    (lora_kernels.unfuse_peft, "model", NOT_MODULES),
    (lora_kernels.explain, "model_or_problem", NOT_MODULES),
    (lambda tokens: lora_kernels.explain(injected(), tokens=tokens), "tokens",
     (*NOT_INTEGERS, -1)),
    (lambda dtype: lora_kernels.explain(injected(), dtype=dtype), "dtype",
     ("bfloat16", 16, np.float32, torch.int8)),
    (load, "model", NOT_MODULES),
    (load, "path", NOT_PATHS),
    (load, "alpha", tuple(value for value in NOT_NUMBERS if value is not None)),
    (load, "enable_lora", (True, "yes", (1, 0), (None,))),
    (load, "strategy", NOT_STRATEGIES),
    (save, "model", NOT_MODULES),
    (save, "path", NOT_PATHS),
    (save, "state_dict", (3, "state", [1])),
]  # fmt: skip
CALLS = [(call, name, value) for call, name, values in ROWS for value in values]


def called(call: Callable[..., Any]) -> str:
    return getattr(call, "__name__", "").replace("<lambda>", "with")


@pytest.mark.parametrize(
    ("call", "name", "value"),
    CALLS,
    ids=[f"{called(call)}-{name}-{i}" for i, (call, name, _) in enumerate(CALLS)],
)
def test_a_wrong_value_is_named(call, name, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(**{name: value})
    text = str(caught.value)
    assert re.search(rf"\b{name.removesuffix('_or_problem')}", text), text
    assert "\n" not in text and len(text) < 300
    shown = repr(value) in text or str(value) in text or type(value).__qualname__ in text
    assert shown, f"the value is not told: {text}"


def test_what_is_right_passes():
    assert LoRAConfig(rank=np.int64(8), alpha=np.float32(16), dropout=0).rank == 8
    assert LoRAConfig(targets=["q"], train="head").train == ("head",)
    assert from_linear(columns=np.array([[0, 1], [2, 3]])).columns == ((0, 1), (2, 3))
    assert function(scale=np.float64(0.5), dropout=0, bias=None).shape == (2, 3)
    assert function(scale=-3).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_dtypes_that_do_not_fit_are_named(name, dtype):
    value = {**tensors(), "bias": torch.ones(3)}[name].to(dtype)
    with pytest.raises(TypeError, match=str(dtype)):
        function(**{name: value})


@pytest.mark.parametrize("value", NOT_TENSORS)
def test_a_layer_names_what_it_was_called_with(value):
    with pytest.raises(TypeError, match="x must be a tensor"):
        new_layer()(value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(2, 5, 0), (0,), (0, 3, 0), (3, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_features_give_the_bias(shape, dropout):
    """K = 0: as nn.Linear does, in any number of dimensions."""
    layer = new_layer(in_features=0, rank=2, dropout=dropout, bias=True)
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.lora_B.grad.abs().max() == 0
