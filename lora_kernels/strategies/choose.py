"""Which strategy computes a problem, and why.

`choose` is a pure function of the problem: it takes what `lora-kernels tune` measured on this card,
else what the cost model predicts. Tuning is an explicit act, never a side effect of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..algebra.operands import Operands, Settings, rank_dtype
from ..hardware.tiles import Outputs, Tile, Tiles, bucket, tiles_for
from ..hardware.tuned import Tuned, load_table, table_path
from . import problem as problems
from .problem import Problem, tf32_allowed
from .table import STRATEGIES, Strategy, check_strategy, triton_supports

if TYPE_CHECKING:
    from ..hardware.cards import Card

# The shares of a datasheet that the cost model takes for attained are assumptions. A lead below
# this one lies within their error, and is no reason to leave `split`.
TIE = 0.05


@dataclass(frozen=True)
class Choice:
    """What `choose` picked: the row's name, the tiles of its kernels (None: a library), why."""

    strategy: str
    tiles: Tiles | None
    reason: str


def choose(problem: Problem, strategy: str = "auto") -> Choice:
    """The strategy for a problem: the named one if it can, else the best that can, with the reason.

    Raises ValueError for a name that is not in STRATEGIES.
    """
    check_strategy(strategy)
    row, prefix = _measured(problem), ""
    if strategy != "auto":
        refusal = STRATEGIES[strategy].supports(problem)
        if refusal is None:
            tiles = row.tiles if row is not None and row.strategy == strategy else {}
            where = ", with the tiles measured on this card" if tiles else _estimate(problem)
            return _choice(problem, strategy, "named by the caller" + where, tiles)
        prefix = f"{strategy} was asked for, but: {refusal}; "
    if problem.nf4:  # an H200 found `split` slower
        return Choice("library", None, prefix + "bitsandbytes' product of NF4, LoRA is added to it")
    if problem.arch == "cpu":
        few = (
            problem.M * problem.K <= problems.FEW_ELEMENTS
            and strategy == "auto"
            and not problem.columns
        )
        few = few and problem.dtype is not torch.float16
        reason = "on a CPU the vendor's GEMM is fastest"
        return _choice(
            problem, "library", prefix + reason + (", with torch's own gradients" if few else "")
        )
    if refusal := triton_supports(problem):
        return _choice(problem, "library", prefix + refusal)
    if row is not None:
        reason = f"measured on this card: {row.median_us:.0f} us"
        return _choice(problem, row.strategy, prefix + reason, row.tiles)
    return _choice(problem, *_predicted(problem, prefix))


def _predicted(problem: Problem, prefix: str) -> tuple[str, str]:
    """The name and the reason of the strategy that the cost model puts first.

    That is `split`, unless another is predicted to be faster by TIE or more.
    """
    times = {name: predict(problem, name) for name in STRATEGIES}
    first, second = sorted(times, key=times.__getitem__)[:2]
    name = "split" if times["split"] <= (1 + TIE) * times[first] else first
    other = second if name == first else first
    tie = ", a tie by the model" if times[other] < (1 + TIE) * times[name] else ""
    reason = f"cost model: {times[name]:.0f} us forward + backward, {other} {times[other]:.0f} us"
    return name, f"{prefix}{STRATEGIES[name].summary} ({reason}{tie})"


def _estimate(problem: Problem) -> str:
    """Where NF4 in our own GEMM should pay, in words; nothing for another problem."""
    if not problem.nf4 or problem.arch == "cpu":
        return ""
    from ..hardware.cost import nf4_tokens

    least, most = nf4_tokens(_card(problem))
    return (
        f"; an estimate, not a measurement: faster than bitsandbytes below {least} to {most} "
        "tokens (one H200 found it slower from 512 on)"
    )


def _choice(
    problem: Problem, name: str, reason: str, measured: Mapping[str, Tile] = MappingProxyType({})
) -> Choice:
    if name == "library":
        return Choice(name, None, reason)
    return Choice(name, _shipped(problem)._replace(**measured), reason)  # type: ignore[arg-type]


def _shipped(problem: Problem) -> Tiles:
    outputs = Outputs(problem.M, _widths(problem), problem.K, _card(problem).processors)
    return tiles_for(
        problem.arch, problem.dtype.itemsize, problem.R,
        tf32=problem.tf32, aligned=problem.aligned, outputs=outputs, nf4=problem.nf4,
    )  # fmt: skip


def _widths(problem: Problem) -> tuple[int, ...]:
    """The N of each segment; ranges of columns count as a group that is as wide in all."""
    N = problem.N // problem.segments if problem.columns else problem.N
    return (N,) * problem.segments


def _card(problem: Problem) -> Card:
    """The datasheet's row for a problem, with the multiprocessors that its card has."""
    from ..hardware.cards import nearest  # a CPU seldom asks, and importing it takes time

    card = nearest(problem.gpu, problem.arch)
    return replace(card, processors=problem.processors or card.processors)


def _measured(problem: Problem) -> Tuned | None:
    """The row of the card's tuned table, if it has one that can still be run."""
    if not problem.gpu:
        return None
    row = load_table(table_path(problem.gpu)).get(problem.key)
    if row is None or row.strategy not in STRATEGIES or STRATEGIES[row.strategy].supports(problem):
        return None
    return row


def predict(problem: Problem, strategy: str) -> float:
    """Microseconds of forward + backward by the cost model; infinite where it is not supported."""
    if STRATEGIES[strategy].supports(problem) is not None:
        return math.inf
    from ..hardware import cost  # a CPU never asks, and it takes a tenth of the package's import

    p, card = problem, _card(problem)
    rank = rank_dtype(p.dtype, torch.float32).itemsize
    element = p.dtype.itemsize
    size = cost.Size(p.M, p.K, _widths(p), p.R, p.dropout, element, rank=rank)
    launches = cost.launches(strategy, size, _shipped(p), card.processors)
    return cost.microseconds(launches, card, p.dtype, tf32=p.tf32)


def decide(x: Tensor, operands: Operands, settings: Settings) -> tuple[Strategy, Tiles | None]:
    """`choose` for a call on x [..., K]: the row, and the tiles of its kernels.

    Remembered by power-of-two buckets of M, so a batch of a new length decides nothing anew.
    """
    weight = operands.weight
    N, K = weight[0].shape
    if len(weight) > 1:
        N = max([each.shape[0] for each in weight])
    M = x.shape[0] if x.dim() == 2 else x.numel() // K if K else 0
    device, dtype, (_, dropout, strategy, columns, pack) = x.device, x.dtype, settings
    segments = len(weight if columns is None else columns)
    R = operands.lora_B[0].shape[1] if pack is None else pack.rank
    tf32 = dtype is torch.float32 and device.type == "cuda" and tf32_allowed()
    return _decide(
        device, bucket(M), N, K, R, dtype, dropout > 0, segments,
        columns is not None, strategy, tf32,
    )  # fmt: skip


@lru_cache(maxsize=8192)
def _decide(
    device: torch.device, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool,
    segments: int, columns: bool, strategy: str, tf32: bool,
) -> tuple[Strategy, Tiles | None]:  # fmt: skip
    problem = Problem.on(
        device, M, N, K, R, dtype, dropout=dropout, segments=segments, columns=columns
    )
    choice = choose(problem, strategy)
    return STRATEGIES[choice.strategy], choice.tiles


def decide_nf4(
    x: Tensor, N: int, R: int, dtype: torch.dtype, settings: Settings
) -> tuple[Strategy, Tiles | None]:
    """The same for one layer of NF4, which casts x [..., K] to `dtype`.

    `library` stands for bitsandbytes' product.
    """
    K, dropout, strategy = x.shape[-1], settings.dropout > 0, settings.strategy
    M = x.numel() // K if K else 0
    return _decide_nf4(x.device, bucket(M), N, K, R, dtype, dropout, strategy)


@lru_cache(maxsize=8192)
def _decide_nf4(
    device: torch.device, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool,
    strategy: str,
) -> tuple[Strategy, Tiles | None]:  # fmt: skip
    choice = choose(Problem.on(device, M, N, K, R, dtype, dropout=dropout, nf4=True), strategy)
    return STRATEGIES[choice.strategy], choice.tiles
