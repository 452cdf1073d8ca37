"""`lora-kernels tune`: measure strategies and tiles, and write the table that `choose` reads.

Every strategy that supports a problem is timed with the shipped tiles, forward + backward. For the
two fastest, each kernel's tile is then varied in turn and the best kept. A tile takes part if it
compiles for the card and leaves the numbers as they were. Tuning is an explicit act: a training
step never measures anything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..hardware.tiles import DEFAULT_TILES, Tile
from ..hardware.tuned import Tuned, store_rows, table_path
from ..strategies.choose import Choice, choose
from ..strategies.problem import Problem
from ..strategies.table import STRATEGIES
from .probe import training_step
from .timing import Step, graph_time

# The tiles tried for each kernel besides the chosen one: those that are shipped for some card, and
# more. Where a card cannot hold a tile, it fails to compile and drops out.
_SHIPPED = [DEFAULT_TILES[arch, 2, False] for arch in ("any", "sm_80", "sm_90", "sm_120")]
_GEMM = (
    *{tile: None for row in _SHIPPED for tile in (*row.low_rank_gemm, *row.dx, *row.group_dx)},
    Tile(64, 128, 64, 8, 3), Tile(64, 128, 32, 4, 4), Tile(64, 64, 32, 4, 5),
    Tile(256, 64, 32, 8, 3),
)  # fmt: skip
_COLUMNS = (
    *{tile: None for row in _SHIPPED for tile in (row.output_gradients, row.parameter_gradients)},
    Tile(64, 64, 0, 4, 3), Tile(128, 64, 0, 4, 2), Tile(64, 128, 0, 8, 3), Tile(32, 64, 0, 2, 3),
)  # fmt: skip
CANDIDATES: Mapping[str, tuple[Tile, ...]] = {
    "project": (
        Tile(16, 0, 128, 4, 3), Tile(16, 0, 64, 2, 4), Tile(32, 0, 128, 4, 3),
        Tile(64, 0, 64, 4, 3), Tile(64, 0, 128, 8, 3),
    ),
    "low_rank_gemm": _GEMM,
    "low_rank_gemm_dx": _GEMM,
    "fused_gemm": _GEMM,
    "fused_gemm_dx": _GEMM,
    "low_rank": (Tile(32, 128, 32, 4, 1), Tile(64, 64, 32, 4, 1), Tile(128, 128, 32, 8, 1)),
    "output_gradients": _COLUMNS,
    "parameter_gradients": _COLUMNS,
}  # fmt: skip


def tune(
    problems: Iterable[Problem], device: torch.device, *,
    measure: Callable[[Step], float] = graph_time, report: Callable[[str], None] = print,
) -> dict[str, Tuned]:  # fmt: skip
    """The fastest strategy and tiles of each problem, measured on `device` and stored in its table.

    `measure` gives the microseconds of a step. Each row is stored at once, so that an interrupted
    run loses none. Raises RuntimeError without a GPU, and where no strategy runs a problem.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if not gpu and measure is graph_time:
        raise RuntimeError("tuning measures on a GPU, and there is none here")
    rows: dict[str, Tuned] = {}
    for problem in problems:
        rows[problem.key] = row = _fastest(problem, device, measure)
        store_rows(table_path(gpu or device.type), gpu, {problem.key: row})
        report(f"{problem.key}: {row.strategy} {row.median_us:.1f} us")
    return rows


def _fastest(problem: Problem, device: torch.device, measure: Callable[[Step], float]) -> Tuned:
    problem = replace(problem, gpu="")  # or `choose` would begin with the tiles of an older table

    def time(choice: Choice) -> float:
        """Microseconds of a choice; infinite if it does not compile or changes the numbers."""
        try:
            step = training_step(problem, choice, device)
            outputs = step()
            expected = training_step(problem, choose(problem, choice.strategy), device)()
            if all(_same(a, b, problem) for a, b in zip(outputs, expected, strict=True)):
                return measure(step)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # each compiler stage raises classes of its own
            warnings.warn(f"{problem.key} {choice}: {error}", stacklevel=2)
        return math.inf

    shipped = [choice for name in STRATEGIES if (choice := choose(problem, name)).strategy == name]
    ranked = sorted([(time(choice), choice) for choice in shipped], key=lambda pair: pair[0])
    if ranked[0][0] == math.inf:  # after an illegal access nothing runs in this process
        raise RuntimeError(f"no strategy runs {problem}: see the warnings; nothing is stored")
    found = []
    for least, choice in ranked[:2]:
        kernels = STRATEGIES[choice.strategy].kernels(problem)
        tiles: Any = choice.tiles
        for kernel in kernels:
            for tile in CANDIDATES[kernel]:
                trial = Choice(choice.strategy, tiles._replace(**{kernel: tile}), "")
                if (taken := time(trial)) < least:
                    least, tiles = taken, trial.tiles
        best = {kernel: getattr(tiles, kernel) for kernel in kernels}
        found.append(Tuned(choice.strategy, best, least))
    return min(found, key=lambda row: row.median_us)


def _same(actual: Tensor, expected: Tensor, problem: Problem) -> bool:
    """Whether the RMS difference of two results is at most one ulp of the largest value.

    The ulp is that of the operands of products: gradients in float32 come from a rounded h or dh.
    """
    ulp = 2**-10 if problem.tf32 else torch.finfo(problem.dtype).eps
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return bool(difference <= ulp * expected.abs().max())
