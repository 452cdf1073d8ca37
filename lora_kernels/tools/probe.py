"""One training step of a problem, on tensors that the caller makes.

`tune` makes random tensors on a GPU. `compile-report` and the benchmark of launches make tensors
without memory, and get every launch of a step all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..algebra.columns import equal_columns, widths
from ..algebra.nf4 import BLOCK, NF4
from ..algebra.operands import Backward, Forward, Operands, Settings, Tensors, Wanted, Weights
from ..algebra.packs import Pack
from ..strategies.choose import Choice
from ..strategies.problem import Problem
from ..strategies.table import STRATEGIES
from .timing import STEPS, Step

# Makes the tensor `name` ("x", "dy", "seed", a field of `Weights` or of `NF4`) from (name, *shape,
# dtype=).
Make = Callable[..., Tensor]


class Probe:
    """A layer or a group of a problem, and the strategy that a choice names for it.

    `adapter` is the dtype of lora_A and lora_B (default: float32 at least, as `from_linear` makes
    them). A problem on columns adapts the last of three equal ranges. With several `adapters` x is
    a pack: equal blocks of rows, every other adapter at half the rank.
    """

    def __init__(
        self, problem: Problem, choice: Choice, make: Make,
        bias: bool = True, conv1d: bool = False, adapter: torch.dtype | None = None,
        adapters: int = 1,
    ) -> None:  # fmt: skip
        self.problem, self.make = problem, make
        self.strategy, self.tiles = STRATEGIES[choice.strategy], choice.tiles
        N, K, R, G, dtype = problem.N, problem.K, problem.R, problem.segments, problem.dtype
        adapter = adapter or torch.promote_types(dtype, torch.float32)
        columns, layers, rows, width = None, G, R, N
        if problem.columns:
            columns = equal_columns(N, max(3, G))[-G:]
            layers, rows, width = 1, G * R, sum(widths(columns))
        made = []
        for _ in range(layers):
            weights = Weights(
                self._weight(conv1d),
                make("bias", N, dtype=dtype) if bias else None,
                make("lora_A", rows, K, dtype=adapter),
                make("lora_B", width, R, dtype=adapter),
            )
            made.append(weights)
        self.operands = Operands.of(made)
        self.settings = Settings(2.0, 0.1 if problem.dropout else 0.0, choice.strategy, columns)
        self.seed = make("seed", adapters, dtype=torch.int64) if problem.dropout else None
        if adapters > 1:
            self._pack(adapters)

    def _weight(self, conv1d: bool) -> Any:
        """A weight [N, K] as the problem has it."""
        make, N, K, dtype = self.make, self.problem.N, self.problem.K, self.problem.dtype
        if self.problem.nf4:
            return NF4(
                make("packed", N, K // 2, dtype=torch.uint8),
                make("absmax", N, K // BLOCK, dtype=torch.float32),
                make("code", 16, dtype=torch.float32),
            )
        return make("weight", K, N, dtype=dtype).T if conv1d else make("weight", N, K, dtype=dtype)

    def _pack(self, adapters: int) -> None:
        """Give every layer as many adapters: slices of what the only one was."""
        p, dropout = self.problem, self.settings.dropout
        ranks = tuple(p.R if c % 2 == 0 else max(1, p.R // 2) for c in range(adapters))
        edges = tuple(p.M * c // adapters for c in range(adapters + 1))
        pack = Pack(edges, ranks, (self.settings.scale,) * adapters, (dropout,) * adapters)
        ranges = p.segments if p.columns else 1
        self.operands = self.operands._replace(
            lora_A=tuple(A[: ranges * R] for A in self.operands.lora_A for R in ranks),
            lora_B=tuple(
                B.view(-1)[: len(B) * R].view(-1, R) for B in self.operands.lora_B for R in ranks
            ),
        )
        self.settings = self.settings._replace(pack=pack)

    def inputs(self) -> tuple[Tensor, Tensors]:
        """x [M, K], and dy [M, N] of each layer."""
        p = self.problem
        dy = tuple(self.make("dy", p.M, p.N, dtype=p.dtype) for _ in self.operands.weight)
        return self.make("x", p.M, p.K, dtype=p.dtype), dy

    def forward(self, x: Tensor) -> Forward:
        return self.strategy.forward(x, self.operands, self.settings, self.seed, self.tiles)

    def backward(self, x: Tensor, dy: Tensors, done: Forward) -> Backward:
        """Every gradient is wanted."""
        given = (dy, x, self.operands, done.h, done.mask, self.settings)
        return self.strategy.backward(*given, Wanted(True, True, True), self.tiles)


def training_step(problem: Problem, choice: Choice, device: torch.device) -> Step:
    """A function that runs one forward and backward of a problem, and returns all results.

    Each call takes the next of several random inputs: as many as exceed a GPU's cache, `STEPS` at
    most. So x and dy are not in the cache when a step begins, as in training.
    """
    draw = torch.Generator(device).manual_seed(0)

    def normal(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        if name == "seed":
            return torch.zeros(*shape, dtype=dtype, device=device)
        tensor = torch.randn(*shape, generator=draw, device=device) * shape[-1] ** -0.5
        return tensor.to(dtype)

    probe, count = Probe(problem, choice, normal), 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        width = problem.K + problem.N * len(probe.operands.weight)
        each = problem.M * width * problem.dtype.itemsize
        count = max(1, min(STEPS, -(-2 * cache // max(1, each))))
    turn = cycle([probe.inputs() for _ in range(count)])

    def step() -> tuple[Tensor, ...]:
        x, dy = next(turn)
        done = probe.forward(x)
        dx, dlora_A, dlora_B = probe.backward(x, dy, done)
        assert dx is not None and dlora_A is not None and dlora_B is not None
        return *done.y, dx, *dlora_A, *dlora_B

    return step


def without_memory(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """A `Make` for steps that compile and launch nothing: tensors of shapes and strides alone."""
    return torch.empty(*shape, dtype=dtype, device="meta")
