"""Layers that bitsandbytes has quantised to NF4, with LoRA on them: forward and backward.

All providers have the same packed weight (double quantisation, bf16 products), PEFT's and ours
float32 adapters. They are judged against float64 with the weight that bitsandbytes dequantises
(`bench/variants.py`).
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.layers.chosen import chosen

from .cases import LAYERS, Case
from .providers import ALPHA_PER_RANK, Block, attach_lora, attach_peft
from .records import Row
from .variants import Ready, Suite, add_arguments, error_of, measure_all, verdict

__all__ = ["add_arguments", "run"]

# What is put on the quantised layer: a floor has no LoRA, and the dense one is not quantised.
PROVIDERS = ("floor", "dense floor", "peft", "library", "split")
CASES = tuple(
    Case(LAYERS[name], M)
    for name, M in (
        ("llama-8b.q_proj", 2048), ("llama-8b.up_proj", 2048), ("roberta-large.up", 2048),
        ("llama-8b.q_proj", 8192), ("llama-8b.q_proj", 512), ("llama-8b.down_proj", 2048),
    )
)  # fmt: skip


def build(name: str, case: Case, device: torch.device, dropout: float) -> Ready:
    """A provider's layer; its adapters hold the same numbers as every other's."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    block: Any = Block()
    (child,), (N,), K = case.layer.children, case.layer.N, case.layer.K
    dense = nn.Linear(K, N, bias=False)
    layer: Any = dense
    if name == "dense floor":
        layer.to(case.torch_dtype)
    else:
        dtype = case.torch_dtype
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            dense.weight.data, requires_grad=False, quant_type="nf4", module=layer
        )
        block.is_loaded_in_4bit = True  # PEFT then takes its own layer for it
    block.add_module(child, layer)
    block.to(device).requires_grad_(False).train()
    if name == "peft":
        attach_peft(block, (child,), case.R, dropout)
    elif "floor" not in name:
        attach_lora(block, (child,), case.R, dropout, strategy=name)
    trained = [p for p in block.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn(p.shape, generator=draw) * K**-0.5)
    return Ready(block, trained)


def check(built: Ready, case: Case, device: torch.device) -> float:
    """The error of a layer, against float64 with the weight that bitsandbytes dequantises."""
    from bitsandbytes.functional import dequantize_4bit

    frozen: Any = next(build("floor", case, device, 0.0).call.children())
    weight = dequantize_4bit(frozen.weight.data, frozen.weight.quant_state).double()
    weight = weight.view(case.layer.N[0], case.layer.K)

    def exact(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x @ weight.T + ALPHA_PER_RANK * (x @ lora_A.T) @ lora_B.T

    return error_of(built, case, device, exact)


def judge(name: str, case: Case, device: torch.device) -> Row:
    """Whether a provider may be timed: its status, the reason if not, and its error."""
    if "floor" in name:
        return {}
    built = build(name, case, device, 0.0)
    if name == "split":
        choice = chosen(next(built.call.children()), case.M, case.torch_dtype)[1]
        reason = None if choice.strategy == "split" else choice.reason
        if device.type == "cpu" and reason is None:
            reason = "Triton's interpreter is never timed"
        if reason is not None:
            return {"status": "unavailable", "reason": reason}
    return verdict(check(built, case, device))


SUITE = Suite("quantised", CASES, PROVIDERS, build, judge, "the frozen NF4 layer")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a provider is wrong or failed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("bitsandbytes is not installed: no layer can be quantised to NF4")
    return measure_all(SUITE, arguments)
