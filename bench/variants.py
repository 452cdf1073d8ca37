"""Suites of single layers of a variant of LoRA: NF4 below (`quantised`), or DoRA (`dora`).

Each provider is checked before it is timed: y and every gradient, without dropout, against float64.
A sample is that of `kernels`: one pass over a ring of buffers, on a GPU a replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.hardware.capture import captured
from lora_kernels.tools.shapes import Layer

from . import timing
from .cases import Case
from .kernels import buffers, explain_error, one_pass
from .records import RESULTS, Results, Row, folder_of

TOY = Case(Layer("toy.query", 128, (64,), ("query",)), 64)
CHECKED = 256  # rows
ALLOWED = 0.02  # of the norm; rounding to bf16 makes 0.003


class Ready(NamedTuple):
    """A layer ready to call, and what is trained of it."""

    call: nn.Module
    trained: list[Tensor]


class Suite(NamedTuple):
    """What is measured, by whom, and how a provider's layer is made and judged.

    `build(provider, case, device, dropout)` gives the layer; `judge(provider, case, device)` the
    columns that say whether it may be timed. The first provider is the floor, named in words.
    """

    name: str
    cases: Sequence[Case]
    providers: Sequence[str]
    build: Callable[[str, Case, torch.device, float], Ready]
    judge: Callable[[str, Case, torch.device], Row]
    floor: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of such a suite."""
    parser.add_argument("--tiny", action="store_true", help="a toy layer: tests the suite")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new case after")
    parser.add_argument("--samples", type=int, default=timing.SAMPLES)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")


def measure_all(suite: Suite, arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a provider is wrong or failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(suite.name, device, folder_of(arguments))
    deadline, bad = time.monotonic() + arguments.seconds, 0
    for case in (TOY,) if arguments.tiny else suite.cases:
        if time.monotonic() > deadline:
            break
        rows = measure(suite, case, device, arguments.samples)
        results.add(rows)
        print("\n".join([_line(row, suite.floor) for row in rows]), flush=True)
        bad += sum(row["status"] in ("wrong", "failed") for row in rows)
    print(f"rows in {results.path}")
    return 1 if bad else 0


def measure(suite: Suite, case: Case, device: torch.device, samples: int) -> list[Row]:
    """A row for each provider: what `judge` says of it, and its times where that is nothing bad."""
    ring = buffers(case, device)
    rows: list[Row] = []
    for name in suite.providers:
        row: Row = {"case": case.layer.name, "provider": name, "M": case.M, "R": case.R}
        row |= {"N": case.layer.N[0], "K": case.layer.K, "dropout": case.dropout}
        row |= {"dtype": case.dtype, "status": "timed", "reason": None}
        try:
            row |= suite.judge(name, case, device)
            if row["status"] == "timed":
                row |= _time(suite.build(name, case, device, case.dropout), ring, device, samples)
                floor = (rows or [row])[0].get("median_us")
                row["floor_ratio"] = round(row["median_us"] / floor, 4) if floor else None
        except Exception as error:
            row |= {"status": "failed", "reason": explain_error(error)}
        rows.append(row)
    return rows


def verdict(error: float) -> Row:
    """The columns of a row that tell an error, over the norm of what is exact."""
    found: Row = {"error": round(error, 5)}
    if not error < ALLOWED:
        found |= {"status": "wrong", "reason": f"off by {error:.1e} of the norm"}
    return found


def error_of(built: Ready, case: Case, device: torch.device, exact: Callable[..., Tensor]) -> float:
    """The largest error of y, dx and the gradients of what is trained, over the norm of the exact.

    `exact(x, *trained)` is the layer in float64.
    """
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(CHECKED, case.layer.K, generator=draw).to(device, case.torch_dtype)
    dy = torch.randn(CHECKED, case.layer.N[0], generator=draw).to(device, case.torch_dtype)
    found = _gradients(lambda x, *_: built.call(x)[0], x, built.trained, dy)
    trained = [p.detach().double().requires_grad_() for p in built.trained]
    wanted = _gradients(exact, x.double(), trained, dy.double())
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _gradients(function: Any, x: Tensor, trained: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, dx and the gradients of what is trained."""
    x = x.detach().requires_grad_()
    y = function(x, *trained)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]


def _time(built: Any, ring: Any, device: torch.device, samples: int) -> Row:
    """The columns of a row: times of forward + backward, from a graph on a GPU, and memory."""
    run, graph = one_pass(built, ring, "forward_backward"), device.type == "cuda"
    taken = timing.sample(captured(run) if graph else run, device, samples, queued=graph)
    median, p20, p80 = (round(t / len(ring), 3) for t in timing.spread(taken))
    peak = timing.peak_bytes(one_pass(built, ring[:1], "forward_backward"), device)
    mode = "graph" if graph else "eager"
    return {"mode": mode, "median_us": median, "p20_us": p20, "p80_us": p80, "peak_bytes": peak}


def _line(row: Row, floor: str) -> str:
    """A row as it is printed."""
    name = f"{row['case']:<20}{row['M']:>6}  {row['provider']:<12}"
    if row["status"] != "timed":
        return f"{name}{row['status']}: {row['reason']}"
    ratio = row["floor_ratio"] or float("nan")
    return f"{name}{row['median_us']:>10.1f} us{ratio:>7.2f} x {floor}"
