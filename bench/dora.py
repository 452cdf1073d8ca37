"""Single layers with DoRA: forward and backward beside PEFT's, and with our kernels left out.

PEFT's adapters and ours are float32. "plain" is ours with PyTorch's operators in place of the
kernels that make DoRA's gain (`lora_kernels/kernels/gain.py`); on a CPU "ours" is the same.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lora_kernels.layers import dora

from .cases import LAYERS, Case
from .providers import ALPHA_PER_RANK, attach_lora, attach_peft, plain
from .records import Row
from .variants import Ready, Suite, add_arguments, error_of, measure_all, verdict

__all__ = ["add_arguments", "run"]

PROVIDERS = ("floor", "peft", "peft-compile", "ours", "plain")
CASES = tuple(
    Case(LAYERS[name], 4096, dropout=dropout)
    for name in ("roberta-base.query", "roberta-large.up", "llama-8b.q_proj")
    for dropout in (0.0, 0.1)
)


class Plain(nn.Module):
    """Calls a block in which PyTorch's operators scale y."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        with mock.patch.object(dora, "launches_gain", return_value=False):
            return self.block(x)


def build(name: str, case: Case, device: torch.device, dropout: float) -> Ready:
    """A provider's layer; its adapters hold the same numbers as every other's."""
    torch.manual_seed(0)
    block, targets = plain(case, device), case.layer.children
    if name.startswith("peft"):
        attach_peft(block, targets, case.R, dropout, conv1d=case.layer.conv1d, dora=True)
    elif name != "floor":
        attach_lora(block, targets, case.R, dropout, dora=True)
    named = {
        part: p
        for part in ("lora_A", "lora_B", "magnitude")
        for key, p in block.named_parameters()
        if part in key
    }
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in named.values():
            numbers = torch.randn(p.shape, generator=draw)
            p.copy_(numbers * 0.1 + 1 if p.dim() == 1 else numbers * p.shape[1] ** -0.5 / 2)
    call: Any = Plain(block) if name == "plain" else block
    if name == "peft-compile":
        torch._dynamo.reset()
        call = torch.compile(block, dynamic=False)
    return Ready(call, list(named.values()))


def check(built: Ready, case: Case, device: torch.device) -> float:
    """The error of a layer, against float64; the length of a row is a constant, as in the paper."""
    frozen: Any = next(build("floor", case, device, 0.0).call.children())
    weight = (frozen.weight.T if case.layer.conv1d else frozen.weight).detach().double()
    bias = 0 if frozen.bias is None else frozen.bias.detach().double()

    def exact(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        whole = weight + ALPHA_PER_RANK * lora_B @ lora_A
        return x @ whole.T * (magnitude / whole.detach().norm(dim=1)) + bias

    return error_of(built, case, device, exact)


def judge(name: str, case: Case, device: torch.device) -> Row:
    """Whether a provider may be timed: its status, the reason if not, and its error."""
    if name == "floor":
        return {}
    return verdict(check(build(name, case, device, 0.0), case, device))


SUITE = Suite("dora", CASES, PROVIDERS, build, judge, "the frozen layer")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a provider is wrong or failed."""
    return measure_all(SUITE, arguments)
