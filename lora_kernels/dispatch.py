"""Which strategy computes a problem, and why.

A strategy is a row: its two functions and `supports`, which says in words why it cannot take a
problem. `choose` is a pure function of the problem; tuning is an explicit act, never a side effect
of a step.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType

import torch

from . import library, strategies
from .algebra.operands import Backward, Forward
from .hardware.tiles import MAX_RANK, Tile, Tiles, bucket, rank_block, tiles_for
from .hardware.tuned import Tuned, load_table, table_path


@dataclass(frozen=True)
class Problem:
    """One call: y [M, N] from x [M, K] at rank R, for so many `layers` (N is the widest of them).

    With `sliced` they are so many ranges of the columns of a single weight. `arch` is "cpu",
    "sm_86", "gfx942", ...
    """

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    arch: str = "cpu"
    dropout: bool = False
    tf32: bool = False
    layers: int = 1
    gpu: str = ""  # the card's name, for its tuned table
    sliced: bool = False

    @classmethod
    def on(
        cls, device: torch.device, M: int, N: int, K: int, R: int, dtype: torch.dtype, *,
        dropout: bool, layers: int = 1, sliced: bool = False,
    ) -> Problem:  # fmt: skip
        """The problem on a device of this machine, with torch's own setting for TF32."""
        tf32 = dtype is torch.float32 and device.type == "cuda" and _tf32_allowed()
        arch, gpu = architecture(device), _gpu(device)
        return cls(M, N, K, R, dtype, arch, dropout, tf32, layers, gpu, sliced)

    @property
    def key(self) -> str:
        """The row of a tuned table: M by its bucket, R by its padding."""
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        dropout = "-dropout" if self.dropout else ""
        rank = rank_block(self.R)
        count = f"{self.layers}{'-of' if self.sliced else 'x'}"
        return f"{count}-M{bucket(self.M)}-N{self.N}-K{self.K}-R{rank}-{dtype}{dropout}"

    def __str__(self) -> str:
        dropout = ", dropout" if self.dropout else ""
        dtype = str(self.dtype).removeprefix("torch.")
        kind = "column ranges" if self.sliced else "layers"
        layers = f"{self.layers} {kind}, " if self.layers > 1 or self.sliced else ""
        return f"{layers}M={self.M} N={self.N} K={self.K} R={self.R} {dtype} {self.arch}{dropout}"


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


@dataclass(frozen=True)
class Choice:
    """What `choose` picked: the row's name, the tiles of its kernels (None: a library), why."""

    strategy: str
    tile: Tiles | None
    reason: str


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors (the environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


@cache
def architecture(device: torch.device) -> str:
    """ "cpu", "sm_86" or "gfx942" of a device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _tf32_allowed() -> bool:
    # torch.get_float32_matmul_precision raises once anyone (the Trainer's tf32) sets this one.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _triton_supports(problem: Problem) -> str | None:
    if not library.has_triton():
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


def _fused_supports(problem: Problem) -> str | None:
    if problem.sliced:
        return "columns: every one of them, adapted or not, would pay for x lora_A^T"
    return _triton_supports(problem)


def _library_supports(problem: Problem) -> str | None:
    return None


def _library_kernels(problem: Problem) -> tuple[str, ...]:
    return ()


def _split_kernels(problem: Problem) -> tuple[str, ...]:
    return "project", "low_rank_gemm", "output_gradients", "parameter_gradients"


def _fused_kernels(problem: Problem) -> tuple[str, ...]:
    forward = ("project", "low_rank_gemm") if problem.dropout else ()
    return *forward, "fused_gemm", "parameter_gradients"


def _hybrid_kernels(problem: Problem) -> tuple[str, ...]:
    return "project", "low_rank", "output_gradients", "parameter_gradients"


_ROWS = (
    Strategy(
        "library", library.library_forward, library.library_backward, _library_supports,
        "the vendor's GEMMs, the frozen one added in place to the rank-R product", _library_kernels,
    ),
    Strategy(
        "split", strategies.split_forward, strategies.split_backward, _triton_supports,
        "rank-R products once, then one GEMM seeded with them", _split_kernels,
    ),
    Strategy(
        "fused", strategies.fused_forward, strategies.fused_backward, _fused_supports,
        "fewest launches: a GEMM computes the rank-R product from the tiles that it reads",
        _fused_kernels,
    ),
    Strategy(
        "hybrid", strategies.hybrid_forward, strategies.hybrid_backward, _triton_supports,
        "the rank-R product first, then the vendor's GEMM accumulates onto it", _hybrid_kernels,
    ),
)  # fmt: skip
STRATEGIES: Mapping[str, Strategy] = MappingProxyType({row.name: row for row in _ROWS})


def check_strategy(name: str) -> str:
    """`name` itself; ValueError with a near miss if it is not "auto" or in STRATEGIES."""
    if name != "auto" and name not in STRATEGIES:
        names = ["auto", *STRATEGIES]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown strategy {name!r}: one of {', '.join(names)}{hint}")
    return name


def choose(problem: Problem, strategy: str = "auto") -> Choice:
    """The strategy for a problem: the named one if it can, else the best that can, with the reason.

    Raises ValueError for a name that is not in STRATEGIES.
    """
    check_strategy(strategy)
    if strategy != "auto":
        refusal = STRATEGIES[strategy].supports(problem)
        if refusal is None:
            row = _measured(problem)
            tiles = row.tiles if row is not None and row.strategy == strategy else {}
            where = ", with the tiles measured on this card" if tiles else ""
            return _choice(strategy, "named by the caller" + where, problem, tiles)
    best, reason, tiles = _best(problem)
    if strategy != "auto":
        reason = f"{strategy} was asked for, but: {refusal}; {reason}"
    return _choice(best, reason, problem, tiles)


def _best(problem: Problem) -> tuple[str, str, Mapping[str, Tile]]:
    """The name of the best strategy, the reason, and the tiles that were measured for it."""
    if problem.arch == "cpu":
        return "library", "on a CPU the vendor's GEMM is fastest", {}
    refusal = _triton_supports(problem)
    if refusal is not None:
        return "library", refusal, {}
    row = _measured(problem)
    if row is not None:
        return row.strategy, f"measured on this card: {row.median_us:.0f} us", row.tiles
    times = sorted((predict(problem, name), name) for name in STRATEGIES)
    (best, name), (second, other) = times[:2]
    reason = f"cost model: {best:.0f} us forward + backward, {other} {second:.0f} us"
    return name, f"{STRATEGIES[name].summary} ({reason})", {}


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
    from .hardware import cost
    from .hardware.cards import nearest

    p, card = problem, nearest(problem.gpu, problem.arch)
    N = p.N // p.layers if p.sliced else p.N  # as a group that is as wide in all
    size = cost.Size(p.M, p.K, (N,) * p.layers, p.R, p.dropout, p.dtype.itemsize)
    launches = cost.launches(strategy, size, _shipped(p), card.processors)
    return cost.microseconds(launches, card, p.dtype, tf32=p.tf32)


def _shipped(problem: Problem) -> Tiles:
    aligned = problem.N % 16 == 0 and problem.K % 16 == 0
    size = problem.dtype.itemsize
    return tiles_for(problem.arch, size, problem.R, tf32=problem.tf32, aligned=aligned)


def _choice(name: str, reason: str, problem: Problem, measured: Mapping[str, Tile]) -> Choice:
    tiles = None
    if name != "library":
        tiles = _shipped(problem)._replace(**measured)  # type: ignore[arg-type]
    return Choice(name, tiles, reason)


@lru_cache(maxsize=8192)
def _plan(
    device: torch.device, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool,
    layers: int, sliced: bool, strategy: str, tf32: bool,
) -> tuple[Strategy, Tiles | None]:  # fmt: skip
    problem = Problem.on(device, M, N, K, R, dtype, dropout=dropout, layers=layers, sliced=sliced)
    choice = choose(problem, strategy)
    return STRATEGIES[choice.strategy], choice.tile


def plan(
    device: torch.device, M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool,
    layers: int, sliced: bool, strategy: str,
) -> tuple[Strategy, Tiles | None]:  # fmt: skip
    """`choose` for a call, remembered by power-of-two buckets of M (and torch's TF32 setting)."""
    tf32 = dtype is torch.float32 and device.type == "cuda" and _tf32_allowed()
    return _plan(device, bucket(M), N, K, R, dtype, dropout, layers, sliced, strategy, tf32)
