"""The table of strategies: a row for each way to compute a layer.

A row is a forward, a backward, and `supports`, which says in words why the strategy cannot take a
problem. A new strategy is a new row here, and one in `hardware.cost` that counts its bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..algebra.nf4 import BLOCK
from ..algebra.operands import Backward, Forward
from ..hardware.tiles import MAX_RANK
from . import library, tiled
from .problem import Problem, has_triton, interpreting


@dataclass(frozen=True)
class Strategy:
    """A row of STRATEGIES: `summary` is what `explain` prints.

    `supports` says why it cannot take a problem (None: it can), `kernels` the tiles it uses there.
    """

    name: str
    forward: Callable[..., Forward]
    backward: Callable[..., Backward]
    supports: Callable[[Problem], str | None]
    summary: str
    kernels: Callable[[Problem], tuple[str, ...]]


def triton_supports(problem: Problem) -> str | None:
    """Why no Triton strategy can take a problem, in words; None if one can."""
    if not has_triton():
        return "Triton is not installed"
    if problem.arch == "cpu" and not interpreting():
        return "Triton kernels need a GPU (or TRITON_INTERPRET=1)"
    if not (problem.arch == "cpu" or problem.arch.startswith(("sm_", "gfx"))):
        return f"no kernels for the device {problem.arch}"
    if problem.arch.startswith("sm_") and int(problem.arch.removeprefix("sm_")) < 80:
        return f"Triton has no matrix instructions for {problem.arch}"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {problem.dtype}"
    if problem.R > MAX_RANK:
        return f"rank {problem.R} is over {MAX_RANK}: its tiles do not fit beside the accumulator"
    if 0 in (problem.M, problem.N, problem.K):
        return "nothing to compute"
    return None


def _split_supports(problem: Problem) -> str | None:
    if problem.nf4 and problem.arch.startswith("gfx"):
        return "NF4 is read on NVIDIA cards alone"
    if problem.nf4 and problem.dtype not in (torch.float16, torch.bfloat16):
        return f"NF4 is multiplied in float16 or bfloat16, not in {problem.dtype}"
    if problem.nf4 and problem.K % BLOCK:
        return f"a block of {BLOCK} weights of NF4 goes past the end of a row: K is {problem.K}"
    if problem.nf4 and problem.N % BLOCK and problem.arch != "cpu":
        return (
            f"an H200 gave a wrong gradient of x at rank 1 where {BLOCK} does not divide N, for a "
            f"reason that was not found: N is {problem.N}"
        )
    return triton_supports(problem)


def _hybrid_supports(problem: Problem) -> str | None:
    return "it reads no NF4 weight" if problem.nf4 else triton_supports(problem)


def _fused_supports(problem: Problem) -> str | None:
    if problem.columns:
        return "columns: every one of them, adapted or not, would pay for x lora_A^T"
    return _hybrid_supports(problem)


_GRADIENTS = ("output_gradients", "parameter_gradients")
_ROWS = (
    Strategy(
        name="library",
        forward=library.library_forward,
        backward=library.library_backward,
        supports=lambda problem: None,
        summary="the vendor's GEMMs, the frozen one added in place to the rank-R product",
        kernels=lambda problem: (),
    ),
    Strategy(
        name="split",
        forward=tiled.split_forward,
        backward=tiled.split_backward,
        supports=_split_supports,
        summary="rank-R products once, then one GEMM seeded with them",
        kernels=lambda problem: ("project", "low_rank_gemm", "low_rank_gemm_dx", *_GRADIENTS),
    ),
    Strategy(
        name="fused",
        forward=tiled.fused_forward,
        backward=tiled.fused_backward,
        supports=_fused_supports,
        summary="fewest launches: a GEMM computes the rank-R product from the tiles that it reads",
        kernels=lambda problem: (
            *(("project", "low_rank_gemm") if problem.dropout else ("fused_gemm",)),
            *("fused_gemm_dx", "parameter_gradients"),
        ),
    ),
    Strategy(
        name="hybrid",
        forward=tiled.hybrid_forward,
        backward=tiled.hybrid_backward,
        supports=_hybrid_supports,
        summary="the rank-R product first, then the vendor's GEMM accumulates onto it",
        kernels=lambda problem: ("project", "low_rank", *_GRADIENTS),
    ),
)
STRATEGIES: Mapping[str, Strategy] = MappingProxyType({row.name: row for row in _ROWS})


def check_strategy(name: str) -> str:
    """`name` itself; ValueError with a near miss if it is not "auto" or in STRATEGIES."""
    if not isinstance(name, str) or (name != "auto" and name not in STRATEGIES):
        names = ["auto", *STRATEGIES]
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown strategy {name!r}: one of {', '.join(names)}{hint}")
    return name
