"""What `python -m models.sweep --dry-run` prints: how many cells, how large, how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from ..arguments import Arguments
from ..recipes.recipe import Cell
from .cells import State
from .estimate import estimate, memory_here, rate_here, seconds


def print_estimates(
    work: Mapping[Cell, Arguments], states: Mapping[Cell, State], jobs: int
) -> None:
    """A row for each combination of labels, and the sum over the cells that are still to do."""
    from ..sweep import duration

    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    table = Table(title="estimates for this machine", title_justify="left")
    for name in ("cells", "seeds", "done", "steps", "trained", "GiB", "time of one"):
        table.add_column(name, justify="left" if name == "cells" else "right")
    groups: dict[str, list[Cell]] = {}
    for cell in states:
        groups.setdefault(cell.name.rpartition("/")[0], []).append(cell)
    here, total, notes = memory_here(), 0.0, []
    for name, cells in groups.items():
        done = sum(states[cell].name == "done" for cell in cells)
        known = [cell for cell in cells if cell in work]
        row = [name, str(len(cells)), str(done)]
        try:
            found = estimate(work[known[0]])
        except (ValueError, OSError, IndexError) as error:
            why = states[cells[0]].why or " ".join(str(error).split())
            notes.append(f"{name}: {why}")
            table.add_row(*row, "-", "-", "-", "-")
            continue
        one = seconds(found.work)
        total += one * sum(states[cell].name == "to do" for cell in cells)
        table.add_row(*row, f"{found.steps:,}", f"{found.trainable:,}",
                      f"{found.bytes / 2**30:.1f}", duration(one))  # fmt: skip
        if found.bytes > here:
            kind = "cannot fit" if found.least_bytes > here else "may not fit"
            notes.append(f"{name} {kind} in {here / 2**30:.1f} GiB")
    console.print(table)
    for note in notes:
        console.print(f"note: {note}")
    counts = Counter(state.name for state in states.values())
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(
        f"{len(states)} cells ({told}); about {duration(total / jobs)} with {jobs} at a time, at "
        f"{rate_here() / 1e9:,.0f} GFLOP/s of a matrix product"
    )
