"""One training step of a problem, on random inputs: what `tune` times."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from ..algebra.columns import segments, widths
from ..algebra.operands import Layers, Wanted
from ..strategies.choose import Choice
from ..strategies.problem import Problem
from ..strategies.table import STRATEGIES
from .timing import STEPS, Step


def training_step(problem: Problem, choice: Choice, device: torch.device) -> Step:
    """A function that runs one forward and backward of a problem, on inputs in turn.

    Adapters are float32 at least, as `from_linear` makes them. The inputs are more than a GPU's
    cache holds, as far as `STEPS` of them are: what a layer reads in training is not there.
    """
    M, N, K, R, G = problem.M, problem.N, problem.K, problem.R, problem.layers
    draw = torch.Generator(device).manual_seed(0)
    held = torch.promote_types(problem.dtype, torch.float32)

    def normal(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        tensor = torch.randn(*shape, generator=draw, device=device) * shape[-1] ** -0.5
        return tensor.to(dtype)

    if problem.sliced:
        columns = segments(N, max(3, G))[-G:]
        layers = Layers(
            (normal(N, K),), (normal(N),), (normal(G * R, K, dtype=held),),
            (normal(sum(widths(columns)), R, dtype=held),), columns,
        )  # fmt: skip
    else:
        layers = Layers(
            tuple(normal(N, K) for _ in range(G)), tuple(normal(N) for _ in range(G)),
            tuple(normal(R, K, dtype=held) for _ in range(G)),
            tuple(normal(N, R, dtype=held) for _ in range(G)),
        )  # fmt: skip
    count, each = 1, M * (K + N * len(layers.weight)) * problem.dtype.itemsize
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = max(1, min(STEPS, -(-2 * cache // max(1, each))))
    inputs = [(normal(M, K), tuple(normal(M, N) for _ in layers.weight)) for _ in range(count)]
    turn = cycle(inputs)
    dropout = 0.1 if problem.dropout else 0.0
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout else None
    row, tiles = STRATEGIES[choice.strategy], choice.tiles

    def step() -> tuple[Tensor, ...]:
        x, dy = next(turn)
        y, h, mask = row.forward(x, layers, 1.0, dropout, seed, tiles)
        wanted = Wanted(True, True, True)
        dx, dA, dB = row.backward(dy, x, layers, h, mask, 1.0, dropout, wanted, tiles)
        assert dx is not None and dA is not None and dB is not None
        return *y, dx, *dA, *dB

    return step
