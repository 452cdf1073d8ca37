"""Stopwatches for a GPU, for `tune` and the benchmarks: CUDA graphs, and runs queued in a row."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..hardware.capture import captured

Step = Callable[[], tuple[Tensor, ...]]


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
