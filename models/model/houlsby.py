"""Houlsby's adapters: a small bottleneck behind the attention and the MLP of every block.

    y -> y + gelu(y down^T + down_bias) up^T + up_bias,    m = max(1, d // reduction)

with y [..., d], down [m, d] and up [d, m]. An adapter sits on the last layer of attention and of
the MLP, before the residual sum. It is a child of that layer and runs as its forward hook, so no
parameter of the model changes its name. Norms stay frozen, as in AdapterHub; the paper trains them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels.injection.targets import find_train
from lora_kernels.layers.base import features_of, is_conv1d

NAME = "houlsby"
FILE = "adapter_model.safetensors"
# How families name the layers that end attention and MLP.
ENDS = (
    *("output.dense", "attn.o", "out_lin", "lin2"),  # BERT and its kin; MPNet; DistilBERT
    *("attn.c_proj", "mlp.c_proj", "attn.Wo", "mlp.Wo"),  # GPT-2, ModernBERT
    "mlp.fc2",  # ViT
    *("o_proj", "down_proj", "SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
)


class Adapter(nn.Module):
    """The bottleneck: y [..., d] -> y + update [..., d], near the identity at first."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)  # the paper's
            nn.init.zeros_(layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        """y + gelu(y down^T + down_bias) up^T + up_bias."""
        return y + self.up(nn.functional.gelu(self.down(y)))


def add_adapters(model: nn.Module, reduction: int, train: Iterable[str]) -> list[str]:
    """Freeze `model` but for the modules `train`, and add adapters; returns the layers with one.

    Raises ValueError for a model none of whose layers ends attention or MLP by a known name.
    """
    paths = find_train(model, tuple(train))
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if any(piece.isdigit() for piece in path.split("."))
        if any(path.endswith(f".{end}") for end in ENDS)
        if isinstance(layer, nn.Linear) or is_conv1d(layer)
    }
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} ends attention or MLP by a known name: "
            f"{', '.join(ENDS)}"
        )
    model.requires_grad_(False)
    for path in paths:
        model.get_submodule(path).requires_grad_(True)
    for layer in layers.values():
        _, features = features_of(layer)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        adapter = Adapter(features, max(1, features // reduction)).to(weight.device)
        layer.add_module(NAME, adapter.train(layer.training))
        layer.register_forward_hook(_behind)
    return list(layers)


def _behind(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapted: Tensor = layer.get_submodule(NAME)(output)
    return adapted


def save_adapters(model: nn.Module, directory: Path) -> None:
    """Write what trains, the adapters and the modules in full, as one safetensors file."""
    directory.mkdir(parents=True, exist_ok=True)
    trained = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    widths = {
        name.split(f".{NAME}.")[0]: len(value)
        for name, value in trained.items()
        if name.endswith(f".{NAME}.down.bias")
    }
    save_file(trained, directory / FILE, {"format": "pt", NAME: json.dumps(widths)})


def load_adapters(model: nn.Module, directory: Path) -> nn.Module:
    """Add the adapters that `save_adapters` wrote to a plain model, in place; returns `model`.

    Raises ValueError where the file's layers or shapes are not the model's.
    """
    path = directory / FILE
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        widths = json.loads((file.metadata() or {}).get(NAME, "{}"))
    if not widths:
        raise ValueError(f"{path} holds no adapters of Houlsby's kind")
    values = load_file(path)
    modules = dict(model.named_modules())
    if missing := [name for name in widths if name not in modules]:
        raise ValueError(f"{path} has an adapter on {missing[0]}, which the model lacks")
    for name, width in widths.items():
        layer = modules[name]
        adapter = Adapter(features_of(layer)[1], width)
        layer.add_module(NAME, adapter.train(layer.training))
        layer.register_forward_hook(_behind)
    own = dict(model.named_parameters())
    wrong = [n for n, v in values.items() if n not in own or own[n].shape != v.shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {wrong[0]}")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return model
