"""Samples of a call's time, what they say, and how fast this machine copies and multiplies.

On a GPU device events time a call. Eager calls start from an idle device, so that host time counts.
Replays of a CUDA graph are queued in a row, so that none waits for its launch. On a CPU the clock
times a call.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

from lora_kernels.tools.timing import queued_times

Run = Callable[[], object]
SAMPLES = 30
MAX_BUFFERS = 64


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile, in microseconds."""

    median: float
    p20: float
    p80: float


def spread(samples: list[float]) -> Spread:
    """The spread of samples; since they are few, each percentile is one of them."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    )


def noise(first: list[float], second: list[float]) -> float:
    """The relative difference between two timings of the same thing."""
    a, b = statistics.median(first), statistics.median(second)
    return abs(a - b) / min(a, b)


def is_tie(a: float, b: float, noise_a: float, noise_b: float) -> bool:
    """Whether two medians differ by no more than the noise of either."""
    return abs(a - b) / min(a, b) <= max(noise_a, noise_b)


def buffer_count(device: torch.device, bytes_each: int) -> int:
    """How many buffers of `bytes_each` exceed the cache, at least two."""
    if device.type != "cuda":
        return 2
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_BUFFERS, -(-wanted // max(1, bytes_each))))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(
    run: Run, device: torch.device, count: int, *, warm_up: int = 3, queued: bool = False
) -> list[float]:
    """Microseconds of `count` runs, after `warm_up` runs that are not timed.

    With `queued`, the host does not wait for the GPU between runs.
    """
    for _ in range(warm_up):
        run()
    synchronize(device)
    gc.disable()  # else a collection counts in the sample in which it happens
    try:
        if queued and device.type == "cuda":
            return queued_times(run, count)
        timer = _device_time if device.type == "cuda" else _clock_time
        return [timer(run) for _ in range(count)]
    finally:
        gc.enable()


def take_turns(
    runs: Mapping[str, Run], device: torch.device, samples: int
) -> dict[str, list[float]]:
    """Microseconds of each run, sampled in turns: sample i of all runs is round i."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        sample(run, device, 1, warm_up=2)
    for _ in range(samples):
        for name, run in runs.items():
            taken[name] += sample(run, device, 1, warm_up=0)
    return taken


def paired_ratio(taken: list[float], base: list[float] | None) -> float | None:
    """The median over rounds of one run's time over another's; None without the other."""
    if base is None:
        return None
    return round(statistics.median(a / b for a, b in zip(taken, base, strict=True)), 4)


def _device_time(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _clock_time(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory that a run allocates at once, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Attainable GB/s of memory: the bytes that a large copy reads and writes."""
    size = 32 << 20
    if device.type == "cuda":
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(sample(lambda: target.copy_(source), device, SAMPLES)) * 1e-6
    return 2 * size / seconds / 1e9


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> float:
    """Attainable TFLOP/s: those of a large square product of the vendor's library."""
    n = 1024 if device.type != "cuda" else 4096 if dtype is torch.float32 else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    count = SAMPLES if device.type == "cuda" else 10
    with matmul_precision(tf32):
        seconds = statistics.median(sample(lambda: torch.mm(a, b, out=out), device, count)) * 1e-6
    return 2 * n**3 / seconds / 1e12


class matmul_precision:  # noqa: N801 - used as a function
    """Context in which float32 products may round to TF32, or may not."""

    def __init__(self, tf32: bool) -> None:
        self.wanted = "high" if tf32 else "highest"

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)
