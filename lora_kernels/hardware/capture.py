"""A CUDA graph: the launches of a function, recorded once and replayed by one call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def captured(
    run: Callable[[], object], *, warm_up: int = 3, pool: Any = None
) -> Callable[[], None]:
    """The replay of `run` as a CUDA graph; `run` runs `warm_up` times before, to compile.

    Graphs that share a `pool` share their memory: the results of one last until the next replays.
    """
    current = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph, spare = torch.cuda.CUDAGraph(), generator.clone_state()
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception as error:
        # The capture has ended with an error of its own, whose context is the one that says why.
        # Torch's stream, generator and allocator are still in it: they would fail all that follows.
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(spare)
        # The allocator may have left the capture already; these two are private, and may be gone.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
            torch._C._cuda_releasePool(current.device_index, pool)
        raise error.__context__ or error from None
    return graph.replay
