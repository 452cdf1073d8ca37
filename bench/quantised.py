"""Layers that bitsandbytes has quantised to NF4, with LoRA on them: forward and backward.

All providers have the same packed weight (double quantisation, bf16 products), PEFT's and ours
float32 adapters. Each is checked before it is timed: y and every gradient, without dropout, against
float64 with the weight that bitsandbytes dequantises. A sample is that of `kernels`: one pass over
a ring of buffers, on a GPU a replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.hardware.capture import captured
from lora_kernels.layers.chosen import chosen
from lora_kernels.tools.shapes import Layer

from . import timing
from .cases import LAYERS, Case
from .kernels import buffers, explain_error, one_pass
from .providers import ALPHA_PER_RANK, Block, attach_lora, attach_peft
from .records import RESULTS, Results, Row, folder_of

# What is put on the quantised layer: a floor has no LoRA, and the dense one is not quantised.
PROVIDERS = ("floor", "dense floor", "peft", "library", "split")
CASES = tuple(
    Case(LAYERS[name], M)
    for name, M in (
        ("llama-8b.q_proj", 2048), ("llama-8b.up_proj", 2048), ("roberta-large.up", 2048),
        ("llama-8b.q_proj", 8192), ("llama-8b.q_proj", 512), ("llama-8b.down_proj", 2048),
    )
)  # fmt: skip
TOY = Case(Layer("toy.query", 128, (64,), ("query",)), 64)
CHECKED = 256  # rows
ALLOWED = 0.02  # of the norm; rounding to bf16 makes 0.003


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench quantised`."""
    parser.add_argument("--tiny", action="store_true", help="a toy layer: tests the suite")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new case after")
    parser.add_argument("--samples", type=int, default=timing.SAMPLES)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a provider is wrong or failed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("bitsandbytes is not installed: no layer can be quantised to NF4")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results("quantised", device, folder_of(arguments))
    deadline, bad = time.monotonic() + arguments.seconds, 0
    for case in (TOY,) if arguments.tiny else CASES:
        if time.monotonic() > deadline:
            break
        rows = measure(case, device, arguments.samples, PROVIDERS, judge, build)
        results.add(rows)
        print("\n".join(map(line, rows)), flush=True)
        bad += sum(row["status"] in ("wrong", "failed") for row in rows)
    print(f"rows in {results.path}")
    return 1 if bad else 0


class Ready(NamedTuple):
    """A layer ready to call, and its lora_A and lora_B."""

    call: nn.Module
    trained: list[Tensor]


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
    """The largest error of y, dx, dlora_A and dlora_B, over the norm of the exact one."""
    from bitsandbytes.functional import dequantize_4bit

    draw = torch.Generator().manual_seed(2)
    x = torch.randn(CHECKED, case.layer.K, generator=draw).to(device, case.torch_dtype)
    dy = torch.randn(CHECKED, case.layer.N[0], generator=draw).to(device, case.torch_dtype)
    found = gradients(lambda x, *_: built.call(x)[0], x, built.trained, dy)
    plain: Any = next(build("floor", case, device, 0.0).call.children())
    weight = (
        dequantize_4bit(plain.weight.data, plain.weight.quant_state).double().view(-1, x.shape[1])
    )

    def exact(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x @ weight.T + ALPHA_PER_RANK * (x @ lora_A.T) @ lora_B.T

    adapters = [p.detach().double().requires_grad_() for p in built.trained]
    wanted = gradients(exact, x.double(), adapters, dy.double())
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def gradients(function: Any, x: Tensor, trained: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, dx and the gradients of what is trained."""
    x = x.detach().requires_grad_()
    y = function(x, *trained)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]


def measure(
    case: Case, device: torch.device, samples: int, names: Sequence[str],
    judge: Callable[[str, Case, torch.device], Row], build: Callable[..., Ready],
) -> list[Row]:  # fmt: skip
    """A row for each provider: what `judge` says of it, and its times where that is nothing bad."""
    ring = buffers(case, device)
    rows: list[Row] = []
    for name in names:
        row: Row = {"case": case.layer.name, "provider": name, "M": case.M, "R": case.R}
        row |= {"N": case.layer.N[0], "K": case.layer.K, "dropout": case.dropout}
        row |= {"dtype": case.dtype, "status": "timed", "reason": None}
        try:
            row |= judge(name, case, device)
            if row["status"] == "timed":
                row |= _time(build(name, case, device, case.dropout), ring, device, samples)
                floor = (rows or [row])[0].get("median_us")
                row["floor_ratio"] = round(row["median_us"] / floor, 4) if floor else None
        except Exception as error:
            row |= {"status": "failed", "reason": explain_error(error)}
        rows.append(row)
    return rows


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


def verdict(error: float) -> Row:
    """The columns of a row that tell an error, over the norm of what is exact."""
    found: Row = {"error": round(error, 5)}
    if not error < ALLOWED:
        found |= {"status": "wrong", "reason": f"off by {error:.1e} of the norm"}
    return found


def _time(built: Any, ring: Any, device: torch.device, samples: int) -> Row:
    """The columns of a row: times of forward + backward, from a graph on a GPU, and memory."""
    run, graph = one_pass(built, ring, "forward_backward"), device.type == "cuda"
    taken = timing.sample(captured(run) if graph else run, device, samples, queued=graph)
    median, p20, p80 = (round(t / len(ring), 3) for t in timing.spread(taken))
    peak = timing.peak_bytes(one_pass(built, ring[:1], "forward_backward"), device)
    mode = "graph" if graph else "eager"
    return {"mode": mode, "median_us": median, "p20_us": p20, "p80_us": p80, "peak_bytes": peak}


def line(row: Row, floor: str = "the frozen NF4 layer") -> str:
    """A row as it is printed."""
    name = f"{row['case']:<20}{row['M']:>6}  {row['provider']:<12}"
    if row["status"] != "timed":
        return f"{name}{row['status']}: {row['reason']}"
    ratio = row["floor_ratio"] or float("nan")
    return f"{name}{row['median_us']:>10.1f} us{ratio:>7.2f} x {floor}"
