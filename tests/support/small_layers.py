"""Small layers of both kinds, with an update that is not zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear
from tests.support.oracle import DEVICE

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ["linear", "conv1d"]


def base(kind: str, K: int = 20, N: int = 24, bias: bool = True, dtype=torch.float32) -> nn.Module:
    """An nn.Linear, or transformers' Conv1D with weight [K, N]."""
    if kind == "linear":
        return nn.Linear(K, N, bias=bias, dtype=dtype, device=DEVICE)
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(N, K).to(DEVICE, dtype)
    nn.init.normal_(layer.bias)
    return layer


def adapted(kind: str = "linear", *, dtype=torch.float32, bias: bool = True, **options):
    """A layer whose update is not zero."""
    options = {"rank": 3, "alpha": 6} | options
    layer = FusedLoRALinear.from_linear(base(kind, bias=bias, dtype=dtype), **options)
    nn.init.normal_(layer.lora_B)
    return layer


def batch(dtype=torch.float32, rows: int = 7) -> torch.Tensor:
    return torch.randn(rows, 20, device=DEVICE).to(dtype).requires_grad_()


def autocast(dtype=torch.bfloat16):
    return torch.autocast(DEVICE.type, dtype=dtype)


def nodes_of(y: torch.Tensor) -> list[int]:
    """How many layers each of our autograd nodes behind y computes."""
    pending, seen, found = [y.grad_fn], set(), []
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [child for child, _ in node.next_functions]
            if "LoRALinears" in type(node).__name__:
                found.append(node.call.layers)
    return sorted(found)


class Int8Tensor(torch.Tensor):
    """A weight as torchao quantises it: it says that it is float32, and holds int8 and scales."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: torch.Tensor) -> nn.Parameter:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        values = (weight.detach() / scale).round().to(torch.int8)
        return nn.Parameter(cls(values, scale), requires_grad=False)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = [a.values * a.scale if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))
