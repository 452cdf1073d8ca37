"""Stopwatches for a GPU, for `tune` and the benchmarks: CUDA graphs, and runs queued in a row."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of `run` as a CUDA graph. It runs three times before, to compile and warm up."""
    current = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph, spare = torch.cuda.CUDAGraph(), generator.clone_state()
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception as error:
        # The capture has ended with an error of its own, whose context is the one that says why.
        # Torch's stream, generator and allocator are still in it: they would fail all that follows.
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(spare)
        with suppress(RuntimeError):  # the allocator may have left the capture already
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
            torch._C._cuda_releasePool(current.device_index, pool)
        raise error.__context__ or error from None
    return graph.replay


def queued_times(run: Callable[[], object], count: int) -> list[float]:
    """Microseconds of each of `count` runs, queued one behind the other.

    The host stays ahead, as in training, so that no run waits for its launch.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 for start, end in pairwise(marks)]
    return times[1:]  # the first waited for its launch


STEPS = 10  # in one graph, so that steps follow one another as in training


def graph_time(step: Step) -> float:
    """Microseconds of one step: the median over replays of a CUDA graph of STEPS steps."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return statistics.median(queued_times(captured(steps), 20)) / STEPS
