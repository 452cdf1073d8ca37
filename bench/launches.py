"""What the launches of a layer cost the host, on a card that is not there and launches nothing.

Our strategies run on tensors without memory under a Triton driver that says it is the card, so what
is timed is Python's part: finding the kernel, allocating outputs (of no memory), handing over the
arguments. Triton's own launcher, the CUDA driver, torch's allocator and autograd are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem, has_triton, interpreting
from lora_kernels.tools.absent_card import AbsentCard, absent_card
from lora_kernels.tools.probe import Probe, without_memory

from .records import Row

ARCH, M, N, K, R = "sm_86", 2048, 768, 768, 8
CALLS = 20
# (strategy, layers of the group, dropout)
CASES = (
    ("split", 1, 0.1), ("split", 3, 0.1), ("fused", 1, 0.0), ("fused", 1, 0.1), ("fused", 3, 0.1),
)  # fmt: skip


class _IdleCard(AbsentCard):
    """Its kernels have handles, as a real card's, so that their launches can be remembered."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        return self, 1, 0, 0, 1024


def launch_cost(samples: int) -> list[Row]:
    """A row for each case, direction and way of launching; none where nothing can be compiled."""
    if interpreting() or not has_triton():
        return []
    rows = []
    with absent_card(ARCH, _IdleCard):
        for strategy, G, dropout in CASES:
            for direction, call in _calls(strategy, G, dropout).items():
                for way, context in (("dispatched", _forgetful), ("remembered", _remembering)):
                    with context():
                        call()
                        taken = sorted(_time(call) for _ in range(5 * samples))
                    rows.append(
                        {"case": f"{way} launches of {G}, {direction}", "provider": strategy,
                         "precision": "bf16", "dropout": dropout, "status": "timed", "reason": None,
                         "R": R, "median_us": round(taken[len(taken) // 2], 1),
                         "p20_us": round(taken[len(taken) // 5], 1),
                         "p80_us": round(taken[4 * len(taken) // 5], 1), "samples": len(taken)}
                    )  # fmt: skip
    return rows


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def _calls(strategy: str, G: int, dropout: float) -> dict[str, Callable[[], Any]]:
    problem = Problem(M, N, K, R, torch.bfloat16, ARCH, dropout > 0, segments=G)
    probe = Probe(problem, choose(problem, strategy), without_memory)
    x, dy = probe.inputs()
    done = probe.forward(x)
    return {
        "forward": lambda: probe.forward(x),
        "backward": lambda: probe.backward(x, dy, done),
    }


@contextmanager
def _remembering() -> Iterator[None]:
    """Launches as they are; what they remember of a card that is not there goes with it."""
    from lora_kernels.kernels import launch

    launch._STEPS.clear()
    try:
        yield
    finally:
        launch._STEPS.clear()


@contextmanager
def _forgetful() -> Iterator[None]:
    """Every launch is Triton's own dispatch, as under LORA_KERNELS_LAUNCH=triton."""
    from lora_kernels.kernels import launch

    cached, launch.CACHED = launch.CACHED, False
    try:
        yield
    finally:
        launch.CACHED = cached
