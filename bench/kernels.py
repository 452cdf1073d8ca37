"""The kernel suite: every case by every provider, checked, then timed in interleaved rounds.

A sample is one pass over a ring of buffers larger than the last-level cache: forward over all of
them, then backward in reverse, as a model runs its layers. So backward finds x in cache, or not, as
in training.

The noise of a provider is the difference between the first half of its rounds and the second. Two
providers that differ by less than their noise are printed as a tie.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.hardware.capture import captured
from lora_kernels.strategies.choose import choose

from . import cases, timing
from .cases import Case, measurements
from .check import check
from .costs import minimum
from .providers import Built, Provider, providers
from .records import RESULTS, Results, Row
from .table import goals_table, print_case

# More rounds, of fewer samples, on a CPU: shared with others, its speed drifts within seconds.
ROUNDS = {"cuda": 2, "cpu": 6}
# Left out of a quick run: no table shows them, and compiling takes most of its time.
NOT_QUICK = ("peft-bf16-adapter-compile", "loralib")
QUICK_SECONDS = 225.0  # after these a quick run begins no new case; the next call goes on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench kernels`."""
    parser.add_argument("--quick", action="store_true", help="the tables' cases, within 4 minutes")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"begin no new case after (default: {QUICK_SECONDS}, if quick)",
    )
    parser.add_argument("--only", default="", help="regular expression over case names")
    parser.add_argument("--providers", nargs="+", help="names of providers (default: all)")
    parser.add_argument("--part", help="2/5: every fifth case, from the second on")
    parser.add_argument("--again", action="store_true", help="measure what the file holds already")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--samples", type=int, default=timing.SAMPLES, help="samples of each of the two timings"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 if any provider is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = cases.part_of(select(device, arguments.quick, arguments.only), arguments.part)
    if arguments.list:
        print(*rows, sep="\n")
        return 0
    known = providers()
    unknown = set(arguments.providers or ()) - set(known)
    if unknown:
        raise ValueError(f"unknown providers {sorted(unknown)}: one of {', '.join(known)}")
    usual = [name for name in known if not (arguments.quick and name in NOT_QUICK)]
    chosen = [known[name] for name in arguments.providers or usual]
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else math.inf)
    deadline = time.monotonic() + seconds
    passes = [chosen]
    if arguments.quick:  # compiled providers come last: compiling takes longer than measuring
        slow = [provider for provider in chosen if provider.name.endswith("-compile")]
        passes = [[provider for provider in chosen if provider not in slow], slow]
    return suite(
        [(case, some) for some in passes for case in rows], device,
        Results("kernels", device, arguments.results),
        samples=arguments.samples, again=arguments.again, deadline=deadline,
    )  # fmt: skip


def select(device: torch.device, quick: bool, only: str) -> tuple[Case, ...]:
    """The cases for a device; on a CPU the small ones."""
    rows = cases.small() if device.type == "cpu" else cases.quick() if quick else cases.full()
    if device.type == "cpu" and quick:
        rows = tuple(case for case in rows if case.layer.name.endswith((".query", ".qkv")))
    return tuple(case for case in rows if re.search(only, str(case)))


def suite(
    jobs: Sequence[tuple[Case, Sequence[Provider]]], device: torch.device, results: Results, *,
    samples: int = timing.SAMPLES, again: bool = False, deadline: float = math.inf,
) -> int:  # fmt: skip
    """Run what the file does not hold yet; 1 if a measurement is wrong or failed."""
    bad = 0
    for done, (case, chosen) in enumerate(jobs):
        if time.monotonic() > deadline:
            print(f"{len(jobs) - done} cases left: the same command goes on with them")
            break
        todo = [p for p in chosen if again or not _all_there(results, case, p, device)]
        if not todo:
            continue
        if all(p.name != "floor" for p in todo):  # every ratio needs the floor of its own run
            todo.insert(0, providers()["floor"])
        try:
            found = measure(case, todo, device, samples)
        except RuntimeError as error:  # the device has too little memory, or fails
            found = [
                _key(case, provider, *way) | {"status": "failed", "reason": explain_error(error)}
                for provider in todo
                for way in measurements(case)
            ]
            if not isinstance(error, torch.OutOfMemoryError):
                deadline = -math.inf
        results.add(found)
        print_case(case, found)
        bad += sum(row["status"] in ("wrong", "failed") for row in found)
    print(goals_table(results.rows()))
    print(f"rows in {results.path}")
    return 1 if bad else 0


def _all_there(results: Results, case: Case, provider: Provider, device: torch.device) -> bool:
    return all(
        results.has(_key(case, provider, direction, mode))
        for direction, mode in measurements(case)
        if mode == "eager" or device.type == "cuda"
    )


def _key(case: Case, provider: Provider, direction: str, mode: str) -> Row:
    return {
        "case": case.layer.name,
        "provider": provider.name,
        "mode": mode,
        "direction": direction,
        "M": case.M,
        "N": sum(case.layer.N),
        "K": case.layer.K,
        "R": case.R,
        "dtype": case.dtype,
        "dropout": case.dropout,
    }


@dataclass
class _Entry:
    """A provider in one case: its layer, or why it has none; its samples by (direction, mode)."""

    provider: Provider
    built: Built | None = None
    status: str = "timed"
    reason: str | None = None
    error_ratio: float | None = None
    rounds: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)


def measure(
    case: Case, chosen: Sequence[Provider], device: torch.device, samples: int = timing.SAMPLES
) -> list[Row]:
    """The rows of one case: each provider checked, then all timed."""
    with timing.matmul_precision(case.dtype == "tf32"):
        entries = [_prepare(case, provider, device) for provider in chosen]
        ring = buffers(case, device)
        gc.collect()  # the checks leave garbage
        rounds = ROUNDS[device.type]
        for _ in range(rounds):
            for entry in entries:
                if entry.built is not None:
                    _time(entry, case, ring, device, -(-2 * samples // rounds))
        bandwidth = timing.copy_bandwidth(device)
        rate = timing.matrix_rate(device, case.torch_dtype, case.dtype == "tf32")
    return _rows(case, entries, device, bandwidth, rate)


def _prepare(case: Case, provider: Provider, device: torch.device) -> _Entry:
    entry = _Entry(provider)
    reason = provider.refuses(case, device)
    if reason is not None:
        entry.status, entry.reason = "unavailable", reason
        return entry
    try:
        built = provider.build(case, device)
        verdict = check(built, case, device, provider.slack)
    except Exception as error:
        entry.status, entry.reason = "failed", explain_error(error)
        return entry
    entry.error_ratio = round(verdict.ratio, 3)
    if verdict.wrong:
        entry.status, entry.reason = "wrong", verdict.wrong
    else:
        entry.built = built
    return entry


def explain_error(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:200]


Ring = list[tuple[Tensor, tuple[Tensor, ...]]]


def buffers(case: Case, device: torch.device) -> Ring:
    """Pairs of x and the dy of each projection; together they exceed the cache."""
    widths = case.layer.K + sum(case.layer.N)
    count = timing.buffer_count(device, case.M * widths * case.torch_dtype.itemsize)

    def normal(width: int) -> Tensor:
        return torch.randn(case.M, width, device=device, dtype=case.torch_dtype)

    return [
        (normal(case.layer.K).requires_grad_(), tuple(normal(N) for N in case.layer.N))
        for _ in range(count)
    ]


def one_pass(built: Built, ring: Ring, direction: str) -> Callable[[], object]:
    """One call for each buffer: all forwards, then all backwards in reverse."""
    wanted = built.trained

    def forward() -> None:
        for x, _ in ring:
            built.call(x)

    def forward_backward() -> None:
        calls = [(x, built.call(x), dy) for x, dy in ring]
        while calls:
            x, ys, dy = calls.pop()
            torch.autograd.grad(ys, [x, *wanted], dy)

    return forward if direction == "forward" else forward_backward


def _time(entry: _Entry, case: Case, ring: Ring, device: torch.device, samples: int) -> None:
    assert entry.built is not None
    for direction, mode in measurements(case):
        if (direction, mode) in entry.failures or (mode == "graph" and device.type != "cuda"):
            continue
        try:
            run = one_pass(entry.built, ring, direction)
            if direction not in entry.peak:
                alone = one_pass(entry.built, ring[:1], direction)
                entry.peak[direction] = timing.peak_bytes(alone, device)
            timed = captured(run) if mode == "graph" else run
            taken = timing.sample(timed, device, samples, queued=mode == "graph")
            each = [total / len(ring) for total in taken]
            entry.rounds.setdefault((direction, mode), []).append(each)
        except Exception as error:
            entry.failures[direction, mode] = explain_error(error)
        finally:
            run = timed = None  # type: ignore[assignment]  # frees the memory of a graph
            if device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a lost device: the row says why
                    torch.cuda.empty_cache()


def _rows(
    case: Case, entries: Sequence[_Entry], device: torch.device, bandwidth: float, rate: float
) -> list[Row]:
    """The rows of what was timed; `bandwidth` in GB/s, `rate` in TFLOP/s."""
    floors = {
        key: timing.spread(list(chain(*rounds))).median
        for entry in entries
        if entry.provider.name == "floor"
        for key, rounds in entry.rounds.items()
    }
    found = []
    for entry in entries:
        for direction, mode in measurements(case):
            if mode == "graph" and device.type != "cuda":
                continue
            row = _key(case, entry.provider, direction, mode)
            row |= {"status": entry.status, "reason": entry.reason, "also": case.layer.also}
            if entry.provider.name == "auto":
                row["strategy"] = choose(case.problem(device)).strategy
            row |= {"error_ratio": entry.error_ratio, "peak_bytes": entry.peak.get(direction)}
            row |= {"copy_gb_per_s": round(bandwidth, 1), "matrix_tflops": round(rate, 3)}
            rounds = entry.rounds.get((direction, mode), [])
            if (direction, mode) in entry.failures:
                row |= {"status": "failed", "reason": entry.failures[direction, mode]}
            elif rounds:
                middle = len(rounds) // 2
                first, second = list(chain(*rounds[:middle])), list(chain(*rounds[middle:]))
                median, p20, p80 = timing.spread(first + second)
                cost = minimum(case, direction)
                attainable = max(cost.bytes / bandwidth / 1e3, cost.flops / rate / 1e6)
                row |= {
                    "median_us": round(median, 3),
                    "p20_us": round(p20, 3),
                    "p80_us": round(p80, 3),
                    "samples": len(first) + len(second),
                    "noise": round(timing.noise(first, second), 4),
                    "attainable_share": round(attainable / median, 4),
                }
                if (direction, mode) in floors:
                    row["floor_ratio"] = round(median / floors[direction, mode], 4)
            found.append(row)
    return found
