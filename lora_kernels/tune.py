"""Measure strategies and tiles for the layers of a model, and write the table that `choose` reads.

Tuning is an explicit act (`lora-kernels tune`): a training step never measures anything. For each
problem every strategy that supports it is timed with the shipped tiles, forward + backward; then,
for the two fastest, each kernel's tile is varied in turn and the best kept. Only tiles that compile
for the card without error take part, and each is checked to leave the numbers as they were.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra.columns import segments, widths
from .algebra.operands import Layers, Wanted
from .hardware.tiles import Tile
from .hardware.tuned import Tuned, store_rows, table_path
from .strategies.choose import Choice, choose
from .strategies.problem import Problem
from .strategies.table import STRATEGIES


class Shape(NamedTuple):
    """One linear layer of a model, or so many that read the same x: y [M, N] from x [M, K].

    With `sliced`, one layer with LoRA on so many thirds of its columns.
    """

    N: int
    K: int
    layers: int = 1
    sliced: bool = False


def _encoder(hidden: int, intermediate: int) -> tuple[Shape, ...]:
    alone = Shape(hidden, hidden), Shape(intermediate, hidden), Shape(hidden, intermediate)
    return *alone, Shape(hidden, hidden, 3), Shape(hidden, hidden, 2)


def _gpt2(hidden: int) -> tuple[Shape, ...]:
    up, down = Shape(4 * hidden, hidden), Shape(hidden, 4 * hidden)
    c_attn = (Shape(3 * hidden, hidden), Shape(3 * hidden, hidden, 2, sliced=True))
    return *c_attn, Shape(hidden, hidden), up, down


MODELS: Mapping[str, tuple[Shape, ...]] = {
    "roberta-base": _encoder(768, 3072),
    "roberta-large": _encoder(1024, 4096),
    "deberta-v3-base": _encoder(768, 3072),
    "deberta-v2-xlarge": _encoder(1536, 6144),
    "gpt2": _gpt2(768),
    "gpt2-medium": _gpt2(1024),
    "gpt2-large": _gpt2(1280),
    "gpt2-xl": _gpt2(1600),
    "llama-8b": (
        Shape(4096, 4096), Shape(1024, 4096), Shape(4096, 4096, 3),
        Shape(14336, 4096), Shape(14336, 4096, 2), Shape(4096, 14336),
    ),
}  # fmt: skip

# What is tried for each kernel besides the shipped tile. Tiles that a card cannot hold fail to
# compile there and drop out.
_GEMM = (
    Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4),
    Tile(64, 128, 32, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 256, 32, 8, 3),
    Tile(64, 64, 32, 4, 5), Tile(256, 64, 32, 8, 3),
)  # fmt: skip
_COLUMNS = (
    Tile(32, 128, 0, 4, 2), Tile(64, 64, 0, 4, 3), Tile(128, 64, 0, 4, 2), Tile(64, 128, 0, 8, 3),
    Tile(32, 64, 0, 2, 3),
)  # fmt: skip
CANDIDATES: Mapping[str, tuple[Tile, ...]] = {
    "project": (
        Tile(16, 0, 128, 4, 3), Tile(16, 0, 64, 2, 4), Tile(32, 0, 128, 4, 3),
        Tile(64, 0, 64, 4, 3), Tile(64, 0, 128, 8, 3),
    ),
    "low_rank_gemm": _GEMM,
    "fused_gemm": _GEMM,
    "low_rank": (Tile(32, 128, 32, 4, 1), Tile(64, 64, 32, 4, 1), Tile(128, 128, 32, 8, 1)),
    "output_gradients": _COLUMNS,
    "parameter_gradients": _COLUMNS,
}  # fmt: skip


def problems_of(
    model: str, M: int, R: int, dtypes: Iterable[torch.dtype], device: torch.device
) -> list[Problem]:
    """The problems of a model's layers: by a name in MODELS, or by a directory with a config.json.

    Raises ValueError for a name that is neither.
    """
    shapes = MODELS[model] if model in MODELS else _shapes_of_config(model)
    return [
        Problem.on(device, M, N, K, R, dtype, dropout=dropout, layers=layers, sliced=sliced)
        for dropout in (True, False)  # as most train first: a run may be cut
        for dtype in dtypes
        for N, K, layers, sliced in shapes
    ]


def _shapes_of_config(model: str) -> tuple[Shape, ...]:
    path = Path(model, "config.json")
    if not path.is_file():
        raise ValueError(f"unknown model {model!r}: a directory, or one of {', '.join(MODELS)}")
    config = json.loads(path.read_text(encoding="utf-8"))
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not hidden:
        raise ValueError(f"{path} has neither hidden_size nor n_embd")
    if config.get("model_type") == "gpt2":
        return _gpt2(hidden)
    return _encoder(hidden, config.get("intermediate_size") or 4 * hidden)


Step = Callable[[], tuple[Tensor, ...]]


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


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    *,
    measure: Callable[[Step], float] = graph_time,
    report: Callable[[str], None] = print,
) -> dict[str, Tuned]:
    """The fastest strategy and tiles of each problem, measured on `device` and stored in its table.

    `measure` gives the microseconds of a step. Rows are stored as they are found, so an interrupted
    run keeps what it has. Raises RuntimeError without a GPU.
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
    problem = replace(problem, gpu="")  # from the shipped tiles, not from an older table
    shipped: dict[str, float] = {}
    for name in STRATEGIES:
        choice = choose(problem, name)
        if choice.strategy == name:
            shipped[name] = _measured(problem, choice, device, measure)
    if min(shipped.values()) == math.inf:  # after an illegal access nothing runs in this process
        raise RuntimeError(f"no strategy runs {problem}: see the warnings; nothing is stored")
    best: Tuned | None = None
    for name in sorted(shipped, key=shipped.__getitem__)[:2]:
        tuned = _search(problem, choose(problem, name), shipped[name], device, measure)
        if best is None or tuned.median_us < best.median_us:
            best = tuned
    assert best is not None  # the library takes every problem
    return best


def _search(
    problem: Problem, choice: Choice, time: float, device: torch.device,
    measure: Callable[[Step], float],
) -> Tuned:  # fmt: skip
    """Vary one kernel's tile at a time, keeping the best."""
    tiles: Any = choice.tiles
    kernels = STRATEGIES[choice.strategy].kernels(problem)
    if tiles is not None:
        for kernel in kernels:
            for tile in CANDIDATES[kernel]:
                trial = Choice(choice.strategy, tiles._replace(**{kernel: tile}), "")
                faster = _measured(problem, trial, device, measure)
                if faster < time:
                    time, tiles = faster, trial.tiles
    return Tuned(choice.strategy, {name: getattr(tiles, name) for name in kernels}, time)


def _measured(
    problem: Problem, choice: Choice, device: torch.device, measure: Callable[[Step], float]
) -> float:
    """The time of a choice; infinite if it does not compile or changes the numbers."""
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


def _same(actual: Tensor, expected: Tensor, problem: Problem) -> bool:
    """Whether two results differ by rounding alone: an ulp of the largest value, in the mean.

    An ulp of what products take, since gradients held in float32 are made from a rounded h or dh.
    """
    ulp = 2**-10 if problem.tf32 else torch.finfo(problem.dtype).eps
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return bool(difference <= ulp * expected.abs().max())


def as_json(rows: Mapping[str, Tuned]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [
        {"problem": key, "strategy": r.strategy, "tiles": dict(r.tiles), "median_us": r.median_us}
        for key, r in rows.items()
    ]
