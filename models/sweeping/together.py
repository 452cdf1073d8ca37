"""Cells that train together: which of a sweep's cells can, how many fit, and how they take turns.

Cells that share base, task, data, batch, length and adapted layers are a pack. Each is the run that
it is alone, in a strand of one process; only its forward and backward are made with the others'
(`training.pack`). A round of a pack:

    every cell in its turn   optimizer step, perhaps scoring and saving, up to its next batch
    the pack                 one forward for all batches
    every cell in its turn   its loss
    the pack                 one backward for all
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import Arguments
from ..recipes.recipe import Cell
from .cells import State, run_cell
from .estimate import estimate, memory_here

if TYPE_CHECKING:
    from ..training.pack import Pack, Seat

# What cells of one pack may differ in.
OWN = (
    *("seed", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("label_smoothing", "warmup_ratio", "scheduler", "rank", "alpha", "dropout", "rslora"),
    *("epochs", "max_steps", "gradient_accumulation", "best_epoch", "save_steps"),
    *("max_train_samples", "max_eval_samples", "eval_batch_size"),
)
MOST = 16  # cells of a pack that `auto` makes
PAYS = 1.05  # how many times as fast a pack must be for `auto` to keep it
Together = int | Literal["auto"] | None


def packs_of(work: Mapping[Cell, Arguments], together: Together, jobs: int) -> list[list[Cell]]:
    """The cells in packs of at most `together`; those that cannot be packed are alone in theirs.

    "auto" takes as many as memory allows for `jobs` packs at a time. Raises ValueError for a number
    of cells whose parameters alone need more memory than there is.
    """
    if together is None:
        return [[cell] for cell in work]
    groups: dict[str, list[Cell]] = {}
    for cell, arguments in work.items():
        packs = arguments.method == "lora" and not arguments.graphs
        alike = {k: v for k, v in arguments.identity().items() if k not in OWN}
        key = json.dumps(alike, sort_keys=True) if packs else cell.name
        groups.setdefault(key, []).append(cell)
    found: list[list[Cell]] = []
    for cells in groups.values():
        most = MOST if together == "auto" else together
        fits = most_that_fit([work[cell] for cell in cells[:most]], jobs, together == "auto")
        if together != "auto" and fits < min(most, len(cells)):
            raise ValueError(
                f"--together {together}: {cells[0].name} and the cells packed with it need more "
                f"than the {memory_here() / 2**30:.1f} GiB there are"
                + (f" for each of {jobs} jobs" if jobs > 1 else "")
                + f"; {fits} fit"
            )
        count = math.ceil(len(cells) / min(most, fits))
        if together == "auto":
            count = min(len(cells), max(count, jobs))  # or some jobs would have nothing to do
        size = math.ceil(len(cells) / count)
        found += [cells[start : start + size] for start in range(0, len(cells), size)]
    return found


def most_that_fit(runs: Sequence[Arguments], jobs: int, expected: bool) -> int:
    """How many of `runs`, at least one, fit in memory as one pack: the base counts once.

    By what is certain (parameters, gradients, Adam's means), or with the activations `expected`. A
    base whose size cannot be told passes: loading it says what is wrong.
    """
    room, needed = memory_here() / jobs, 0.0
    for number, arguments in enumerate(runs):
        try:
            one = estimate(arguments)
        except (ValueError, OSError, KeyError):
            return len(runs)
        base = 4 * (one.total - one.trainable)
        needed += (one.bytes if expected else one.least_bytes) - base * (number > 0)
        if needed > room:
            return max(1, number)
    return len(runs)


def run_together(
    runs: Sequence[Arguments],
    tell: Callable[[int, State], Any],
    *,
    threads: int | None = None,
    measure: bool = False,
    stop_losers: int | None = None,
) -> None:
    """Run cells as one pack; `tell` gets the number of each that ends, and its state.

    With `measure` they train one by one, in this process, unless a measurement finds that the pack
    is faster. With `stop_losers`, the cells that a pack of this many began with, half of those left
    stop after 1, 2, 4, ... epochs: those whose validation scores are lower. A cell that fails or
    diverges leaves the others to themselves.
    """
    import torch

    from ..data.tasks import task_of
    from ..training.pack import Batch, EpochEnds, Pack, Seat
    from ..training.strand import Strand

    if threads is not None:
        torch.set_num_threads(threads)
    pack = Pack()
    seats = [
        Seat(f"cell{i}", pack, stop_losers is not None, task_of(each.task).metrics[0])
        for i, each in enumerate(runs)
    ]
    numbers = {seat: number for number, seat in enumerate(seats)}
    states: dict[Seat, State] = {}

    def cell(seat: Seat, strand: Strand) -> None:
        seat.strand = strand
        states[seat] = run_cell(runs[numbers[seat]], threads, seat)

    asked: dict[Seat, Any] = {}

    def go_on(seat: Seat, answer: Any = None) -> Any:
        """Let a cell run until it asks; one that has ended is told of and leaves."""
        asked[seat] = seat.strand.resume(answer)
        if seat.strand.ended:
            del asked[seat]
            pack.leave(seat.name)
            tell(numbers[seat], states[seat])
        return asked.get(seat)

    for seat in seats:
        seat.strand = Strand(partial(cell, seat))
        go_on(seat)
    answers: dict[Seat, Any] = {}
    if asked:
        why = pack.open(list(asked))
        answers = {seat: why[seat.name] for seat in asked}
    while asked:
        for seat, answer in answers.items():
            go_on(seat, answer)
        batches = {seat: each for seat, each in asked.items() if isinstance(each, Batch)}
        if batches and measure:
            measure, gain = False, pack.speed()
            print(f"{len(batches)} cells: packed {gain:.2f} times as fast as one by one", end="")
            print(
                ", so they are packed" if gain >= PAYS else ", so they run one by one", flush=True
            )
            if gain < PAYS:
                answers = dict.fromkeys(batches, "a pack is no faster here")
                continue
        if batches:
            answers = _step(pack, batches, go_on)
        elif asked:
            epochs = {seat: each for seat, each in asked.items() if isinstance(each, EpochEnds)}
            answers = _halve(epochs, stop_losers or 0)


def _step(
    pack: Pack, batches: Mapping[Seat, Any], go_on: Callable[[Seat, Any], Any]
) -> dict[Seat, Any]:
    """One forward and backward for all batches; returns for each cell whether its loss is lost."""
    import torch

    from ..training.pack import Slope

    began = time.perf_counter()
    try:
        logits = pack.forward({seat.name: batch.inputs for seat, batch in batches.items()})
    except (RuntimeError, ValueError) as error:  # such as a full memory: it fails all of them
        return dict.fromkeys(batches, error)
    forward = time.perf_counter() - began
    slopes = {
        seat: slope
        for seat in batches
        if isinstance(slope := go_on(seat, logits[seat.name]), Slope)
    }
    if not slopes:
        return {}
    began = time.perf_counter()
    try:
        pack.backward({seat.name: slope.gradient for seat, slope in slopes.items()})
    except RuntimeError as error:
        return dict.fromkeys(slopes, error)
    lost = (~torch.stack([slope.loss for slope in slopes.values()]).isfinite()).tolist()
    share = (forward + time.perf_counter() - began) / len(slopes)
    for seat in slopes:
        seat.trainer.meter.seconds["training"] += share
    return dict(zip(slopes, lost, strict=True))


def _halve(waiting: Mapping[Seat, Any], began_with: int) -> dict[Seat, Any]:
    """Successive halving: which cells go on (None), and which get an exception.

    After 1, 2, 4, ... epochs a half, a quarter, ... of the cells that there were at first go on.
    The rule counts those that are left, so that a sweep that goes on stops none twice.
    """
    from ..training.pack import StoppedError

    first = min(each.epochs for each in waiting.values())
    here = [seat for seat, each in waiting.items() if each.epochs == first]
    if first & (first - 1):  # no power of two
        return dict.fromkeys(here)
    rung = first.bit_length()
    kept = max(1, math.ceil(began_with / 2**rung)) - (len(waiting) - len(here))
    order = sorted(here, key=lambda seat: -seat.score(first))
    lost = f"stopped after {first} epoch{'s' * (first > 1)}: better cells of its pack go on"
    return {seat: None if place < kept else StoppedError(lost) for place, seat in enumerate(order)}
