"""Stopwatches for a GPU: a captured step, and the time of runs that follow one another."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph; kernels compile and libraries warm up before capture."""
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
        # Left in capture, torch's stream and generator would fail all that follows, and its
        # allocator would free nothing. What ends the capture raises an error of its own over the
        # one that tells why.
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(spare)
        with suppress(RuntimeError):  # it has ended properly
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
            torch._C._cuda_releasePool(current.device_index, pool)
        raise error.__context__ or error from None
    return graph.replay


def queued_times(run: Callable[[], object], count: int) -> list[float]:
    """Microseconds of each of `count` runs, one after another.

    The host stays ahead, so that no run waits for its launch, as in training.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 for start, end in pairwise(marks)]
    return times[1:]  # the first did wait


STEPS = 10  # in one graph, so that gaps between kernels are those of training


def graph_time(step: Step) -> float:
    """Microseconds of a step: the median of CUDA-graph replays."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return statistics.median(queued_times(captured(steps), 20)) / STEPS
