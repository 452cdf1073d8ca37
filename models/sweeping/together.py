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
    from ..training.seat import Seat

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
        packs = arguments.method == "lora"
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

    if threads is not None:
        torch.set_num_threads(threads)
    turns = Turns(runs, tell, threads, halving=stop_losers is not None)
    try:
        turns.begin()
        while turns.asked:
            batches = turns.batches()
            if batches and measure:
                measure, gain = False, turns.pack.speed()
                how = "packed" if gain >= PAYS else "one by one"
                print(f"{len(batches)} cells run {how}: a pack is {gain:.2f} times as fast")
                if gain < PAYS:
                    turns.give(dict.fromkeys(batches, "a pack is no faster here"))
            elif batches:
                turns.step(batches)
            else:
                turns.halve(stop_losers or 0)
    finally:
        turns.close()


class Turns:
    """The strands of a pack's cells; `asked` is what each that has not ended waits for."""

    def __init__(
        self,
        runs: Sequence[Arguments],
        tell: Callable[[int, State], Any],
        threads: int | None,
        halving: bool,
    ) -> None:
        from ..training.pack import Pack
        from ..training.seat import Seat

        self.runs, self.tell, self.threads = runs, tell, threads
        self.pack = Pack()
        self.seats = [Seat(f"cell{number}", self.pack, halving) for number in range(len(runs))]
        self.states: dict[Seat, State] = {}
        self.asked: dict[Seat, Any] = {}

    def begin(self) -> None:
        """Let every cell load its model, make the pack, and let each go on to its first batch."""
        from ..training.strand import Strand

        def cell(seat: Seat, arguments: Arguments) -> None:
            self.states[seat] = run_cell(arguments, self.threads, seat)

        for seat, arguments in zip(self.seats, self.runs, strict=True):
            seat.strand = Strand(partial(cell, seat, arguments))
            self.go_on(seat, None)
        ready = list(self.asked)
        if ready:
            self.give(dict(zip(ready, self.pack.open(ready), strict=True)))

    def give(self, answers: Mapping[Seat, Any]) -> None:
        """Let each of these cells go on with its answer."""
        for seat, answer in answers.items():
            self.go_on(seat, answer)

    def go_on(self, seat: Seat, answer: Any) -> Any:
        """Let a cell run until it asks; one that has ended is told of and leaves."""
        self.asked[seat] = seat.strand.resume(answer)
        if seat.strand.ended:
            del self.asked[seat]
            self.pack.leave(seat.name)
            self.tell(self.seats.index(seat), self.states[seat])
        return self.asked.get(seat)

    def close(self) -> None:
        """End the cells that have not ended, as a kill would."""
        for seat in self.asked:
            seat.strand.close()

    def batches(self) -> dict[Seat, Any]:
        """The batches that cells wait with."""
        from ..training.seat import Batch

        return {seat: each for seat, each in self.asked.items() if isinstance(each, Batch)}

    def step(self, batches: Mapping[Seat, Any]) -> None:
        """One forward and backward for all. An error, such as a full memory, goes to every cell."""
        import torch

        from ..training.seat import Slope

        began = time.perf_counter()
        try:
            logits = self.pack.forward({s.name: batch.inputs for s, batch in batches.items()})
        except (RuntimeError, ValueError) as error:
            return self.give(dict.fromkeys(batches, error))
        seconds = time.perf_counter() - began
        slopes = {seat: self.go_on(seat, logits[seat.name]) for seat in batches}
        slopes = {seat: slope for seat, slope in slopes.items() if isinstance(slope, Slope)}
        if not slopes:
            return None
        began = time.perf_counter()
        try:
            self.pack.backward({seat.name: slope.gradient for seat, slope in slopes.items()})
        except RuntimeError as error:
            return self.give(dict.fromkeys(slopes, error))
        losses = torch.stack([slope.loss for slope in slopes.values()])
        diverged = (~losses.isfinite()).tolist()
        seconds += time.perf_counter() - began
        for seat in slopes:
            seat.trainer.meter.seconds["training"] += seconds / len(slopes)
        return self.give(dict(zip(slopes, diverged, strict=True)))

    def halve(self, began_with: int) -> None:
        """Successive halving: the better cells go on, the others get an exception.

        After 1, 2, 4, ... epochs a half, a quarter, ... of the cells that there were at first go
        on. The rule counts those that are left, so that a sweep that goes on stops none twice.
        """
        from ..training.seat import StoppedError

        epochs = min(each.epochs for each in self.asked.values())
        here = [seat for seat, each in self.asked.items() if each.epochs == epochs]
        if epochs & (epochs - 1):  # no power of two
            return self.give(dict.fromkeys(here))
        kept = max(1, math.ceil(began_with / 2 ** epochs.bit_length()))
        kept -= len(self.asked) - len(here)  # those that are ahead
        order = sorted(here, key=lambda seat: -seat.score(epochs))
        why = f"stopped after {epochs} epoch{'s' * (epochs > 1)}: better cells of its pack go on"
        lost = StoppedError(why)
        return self.give({seat: lost if n >= kept else None for n, seat in enumerate(order)})
