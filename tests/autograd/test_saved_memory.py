"""What backward saves, byte by byte: x by reference, h, one bit an element of mask.

Of float16 x with float32 adapters, h is float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import STRATEGIES, FusedLoRALinear
from tests.support.oracle import DEVICE
from tests.support.small_layers import autocast


class Saved:
    """The tensors that autograd saves, split into those of `known` memory and new ones."""

    def __init__(self, **known: torch.Tensor) -> None:
        self.owners = {self._memory(t): name for name, t in known.items()}
        self.names: set[str] = set()
        self.new: list[torch.Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @staticmethod
    def _memory(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self.owners.get(self._memory(tensor))
        if name is None:
            self.new.append(tensor)
        else:
            self.names.add(name)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.new)


def saved_by(layer: FusedLoRALinear, x: torch.Tensor) -> tuple[Saved, torch.Tensor]:
    saved = Saved(x=x, **dict(layer.named_parameters()))
    with saved.hooks:
        y = layer(x)
    y.backward(torch.randn_like(y))
    return saved, y


M, K, N, R = 30, 160, 104, 3  # masks of whole words of eight bytes, as a CPU draws them


def layer_to_save(dropout=0.25, dtype=torch.float16, **options) -> FusedLoRALinear:
    original = nn.Linear(K, N, dtype=dtype, device=DEVICE)
    layer = FusedLoRALinear.from_linear(original, rank=R, dropout=dropout, **options)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["plain", "dropout"])
def test_backward_saves_x_by_reference_and_h_and_one_bit_an_element(strategy, dropout):
    layer = layer_to_save(dropout, strategy=strategy)
    x = torch.randn(2, M // 2, K, device=DEVICE, dtype=torch.float16, requires_grad=True)
    saved, y = saved_by(layer, x)
    assert y.grad_fn is not None and layer.lora_A.grad.abs().sum() > 0
    assert saved.names == {"x", "weight", "lora_A", "lora_B"}
    kinds = {(tensor.dtype, tensor.numel()) for tensor in saved.new}
    mask = {(torch.uint8, M * K // 8)} if dropout else set()
    assert kinds == {(torch.float32, M * R)} | mask
    assert saved.bytes == M * R * 4 + (M * K // 8 if dropout else 0), "views of larger memory"
    if dropout:
        assert saved.bytes - M * R * 4 == x.nbytes / 16


def test_a_frozen_lora_a_needs_no_x():
    layer = layer_to_save()
    layer.lora_A.requires_grad_(False)
    x = torch.randn(M, K, device=DEVICE, dtype=torch.float16, requires_grad=True)
    saved, _ = saved_by(layer, x)
    assert saved.names == {"weight", "lora_A", "lora_B"}
    assert layer.lora_A.grad is None and layer.lora_B.grad.abs().sum() > 0


def test_the_first_layer_needs_no_weight():
    layer = layer_to_save()
    x = torch.randn(M, K, device=DEVICE, dtype=torch.float16)
    saved, _ = saved_by(layer, x)
    assert saved.names == {"x", "lora_A", "lora_B"}
    assert layer.lora_A.grad.abs().sum() > 0


def test_under_autocast_the_half_weight_is_what_is_saved():
    layer = layer_to_save(dtype=torch.float32, strategy="library")
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    saved = Saved(x=x, **dict(layer.named_parameters()))
    with autocast(), saved.hooks:
        y = layer(x)
    assert saved.names == {"x", "lora_A", "lora_B"}
    assert {(torch.bfloat16, N * K)} <= {(tensor.dtype, tensor.numel()) for tensor in saved.new}
    assert saved.bytes == N * K * 2 + M * R * 2 + M * K // 8
    y.float().sum().backward()


def test_evaluation_saves_nothing():
    layer = layer_to_save()
    saved = Saved()
    with saved.hooks, torch.no_grad():
        y = layer(torch.randn(M, K, device=DEVICE, dtype=torch.float16))
    assert not saved.new and y.grad_fn is None
