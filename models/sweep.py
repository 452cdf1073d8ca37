"""Run the cells of recipes: `python -m models.sweep stsb --small --data-dir path/to/data`.

Each cell is one run of `models.train`. The same command again keeps what is done and goes on with
the rest, wherever it was cut off. `python -m models.report` makes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import Arguments
from .recipes import RECIPES, recipe_of
from .recipes.recipe import SMALL, Cell, Recipe
from .sweeping.cells import LOG, STOPPED, State, arguments_of, run_cell, state_of
from .sweeping.together import Together, packs_of, run_together

# What takes seconds to import is imported where it is used, so that `--help` answers at once.

PRELOAD = ["models.run", "models.sweeping.estimate"]  # imported once, before any cell is forked
Work = Mapping[Cell, Arguments]


class Unit(NamedTuple):
    """Cells for one process, several if they train together; `began_with` counts those done too."""

    work: Work
    began_with: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the cells, tell of each.

    The exit status is 1 where a cell is not done, 2 for arguments that cannot work, 130 on Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipes", nargs="*", metavar="RECIPE", help="rows of models/recipes, or all")
    add("--list", action="store_true", help="list the recipes, or the cells of those named")
    add("--dry-run", action="store_true", help="count the cells and estimate memory and time")
    add("--small", action="store_true", help="the small form, for a machine without a large GPU")
    add("--runs", type=Path, default=Path("runs/sweep"), help="where run directories lie")
    add("--data-dir", type=Path, help="a folder for each task, such as sst2 (default: the hub)")
    add("--seeds", type=int, help="seeds of each cell (default: the recipe's)")
    add("--jobs", type=int, default=1, help="cells that run at a time")
    add(
        "--together",
        type=_together,
        metavar="N|auto",
        help="cells that train in one pass over "
        "their base; auto: as many as memory allows, where a measurement finds it faster",
    )
    add(
        "--stop-losers",
        action="store_true",
        help="after 1, 2, 4, ... epochs of cells that train "
        "together, stop the half with the lower validation scores",
    )
    add("--graphs", action="store_true", help="on a GPU, replay steps from CUDA graphs")
    add("--only", nargs="+", default=[], metavar="AXIS=LABEL", help="cells with these labels")
    add("--retry", action="store_true", help="run cells again that have failed")
    add("--ray", metavar="ADDRESS", help="run the cells on a Ray cluster with these directories")
    options = parser.parse_args(argv)
    try:
        recipes = _recipes(options.recipes, options.small)
        if not recipes and not options.list:
            raise ValueError(f"name a recipe: {', '.join(RECIPES)}")
        for name in ("seeds", "jobs"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
        _check_together(options)
        cells = [cell for recipe in recipes for cell in chosen(recipe, options.only, options.seeds)]
        if options.list and not recipes:
            return _list_recipes()
        return _run(cells, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _together(text: str) -> Together:
    return "auto" if text == "auto" else int(text)


def _check_together(options: argparse.Namespace) -> None:
    if options.together not in (None, "auto") and options.together < 1:
        raise ValueError(f"--together {options.together} must be at least 1, or auto")
    if options.together is not None and options.ray is not None:
        raise ValueError("--together packs cells on this machine: leave out --ray")
    if options.stop_losers and options.together is None:
        raise ValueError("--stop-losers compares cells that train together: name --together")


def _recipes(names: Sequence[str], small: bool) -> list[Recipe]:
    names = list(RECIPES) if list(names) == ["all"] else list(names)
    if small:
        return [recipe_of(name.removesuffix(SMALL)).small_form() for name in names]
    return [recipe_of(name) for name in names]


def chosen(recipe: Recipe, only: Sequence[str], seeds: int | None = None) -> list[Cell]:
    """The cells with the labels of `--only`. Raises ValueError for a label that no axis has."""
    wanted: dict[str, list[str]] = {}
    for text in only:
        axis, _, label = text.partition("=")
        if axis not in recipe.axes or label not in recipe.axes[axis]:
            known = "; ".join(f"{axis}={', '.join(row)}" for axis, row in recipe.axes.items())
            raise ValueError(f"--only {text}: {recipe.name} has {known}")
        wanted.setdefault(axis, []).append(label)
    return [
        cell
        for cell in recipe.cells(seeds)
        if all(cell.labels[axis] in labels for axis, labels in wanted.items())
    ]


def _run(cells: Sequence[Cell], options: argparse.Namespace) -> int:
    """Sort the cells by their state; then list, estimate or run them."""
    work: dict[Cell, Arguments] = {}
    states: dict[Cell, State] = {}
    for cell in cells:
        try:
            work[cell] = arguments_of(cell, options.runs, options.data_dir)
            if options.graphs:
                work[cell] = dataclasses.replace(work[cell], graphs=True)
            states[cell] = state_of(work[cell])
        except (ValueError, OSError) as error:
            states[cell] = State("failed", " ".join(str(error).split()))
    if options.list:
        for cell, state in states.items():
            print(f"{cell.name}: {_words(state)}")
        return 0
    if options.dry_run:
        from .sweeping.dry_run import print_estimates

        print_estimates(work, states, options.jobs)
        return 0
    kept = {cell for cell, state in states.items() if state.name == "done"}
    failed = {cell for cell, state in states.items() if state.name == "failed"}
    if options.retry:
        retried = failed & work.keys()
        for cell in retried:
            (work[cell].directory() / "error.json").unlink(missing_ok=True)
            states[cell] = state_of(work[cell])
        failed = {cell for cell in failed if states[cell].name == "failed"}
    stopped = {cell for cell, state in states.items() if state.name == "stopped"}
    for cell in () if options.stop_losers else stopped:
        (work[cell].directory() / STOPPED).unlink()  # it goes on
    if kept:
        print(f"{len(kept)} of {len(cells)} cells are done already")
    for cell in failed:
        print(f"{cell.name}: failed before, {states[cell].why} (--retry runs it again)")
    over = kept | failed | (stopped if options.stop_losers else set())
    packs = [
        Unit({cell: work[cell] for cell in pack if cell not in over}, len(pack))
        for pack in packs_of(work, options.together, options.jobs)
    ]
    states |= _run_all([unit for unit in packs if unit.work], len(over), options)
    counts = Counter(state.name for state in states.values())
    print(f"{options.runs}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0 if counts["done"] == len(cells) else 1


def _run_all(units: Sequence[Unit], kept: int, options: argparse.Namespace) -> dict[Cell, State]:
    """Run cells and tell of each as it ends, with the time that is left."""
    work = {cell: arguments for unit in units for cell, arguments in unit.work.items()}
    if not work:
        return {}
    started, found = time.perf_counter(), {}
    ends = (
        on_ray(work, options.ray)
        if options.ray is not None
        else in_processes(units, options.jobs, options.together == "auto", options.stop_losers)
    )
    for cell, state in ends:
        found[cell] = state
        # Only what has run in this sweep says how long a cell takes.
        left = len(work) - len(found)
        seconds = (time.perf_counter() - started) / len(found) * left
        rest = f"; {left} left, about {duration(seconds)}" if left else ""
        number = f"[{kept + len(found)}/{kept + len(work)}]"
        print(f"{number} {cell.name}: {_words(state)}{rest}", flush=True)
        if state.name == "failed":
            print(f"    {work[cell].directory() / LOG}", flush=True)
    return found


def in_processes(
    units: Sequence[Unit], jobs: int, measure: bool = False, stop_losers: bool = False
) -> Iterator[tuple[Cell, State]]:
    """Yield each cell with its state as it ends; `jobs` units run at a time, a process for each.

    A process that imported everything forks them, so a cell starts in a tenth of a second.
    `measure` and `stop_losers` are for units of several cells, as in `run_together`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    limit = None if "OMP_NUM_THREADS" in os.environ else threads
    waiting = deque(units)
    running: dict[Any, tuple[Any, dict[int, Cell]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                options = {"threads": limit, "measure": measure}
                options["stop_losers"] = unit.began_with if stop_losers else None
                runs = list(unit.work.values())
                process = context.Process(target=_child, args=(runs, options, theirs))
                process.start()
                theirs.close()
                running[ours] = process, dict(enumerate(unit.work))
            pipes: list[Any] = connection.wait(list(running))
            for pipe in pipes:
                process, cells = running[pipe]
                try:
                    number, state = pipe.recv()
                except EOFError:  # it ended
                    process.join()
                    del running[pipe]
                    for cell in cells.values():
                        yield cell, _death(process.exitcode)
                else:
                    yield cells.pop(number), state
    finally:
        for process, _ in running.values():
            process.terminate()


def _child(runs: Sequence[Arguments], options: Mapping[str, Any], pipe: Any) -> None:
    """Run the cells of a unit in a process of their own, which ends when the sweep's does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # the run goes on from its last checkpoint

    threading.Thread(target=follow, daemon=True).start()
    if len(runs) == 1 and options["stop_losers"] is None:
        pipe.send((0, run_cell(runs[0], options["threads"])))
    else:
        run_together(runs, lambda number, state: pipe.send((number, state)), **options)


def _death(code: int | None) -> State:
    signal = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    hint = "; out of memory? fewer --jobs may help" if code == -9 else ""
    return State("died", f"{signal}{hint}; the same command goes on with it")


def on_ray(work: Work, address: str) -> Iterator[tuple[Cell, State]]:
    """As `in_processes`, as tasks of the Ray cluster at `address`.

    Every node must see the run directories, the data and this checkout under the same paths. Raises
    ImportError where Ray is not installed.
    """
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("--ray needs the ray package: pip install ray") from error
    # The workers find this package as we do, also where it was not installed.
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # A process for each cell, so that one cell's memory is its own.
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(run_cell)
        cells = {task.remote(arguments): cell for cell, arguments in work.items()}
        while cells:
            (ended,), _ = ray.wait(list(cells), num_returns=1)
            try:
                state = ray.get(ended)
            except ray.exceptions.RayError as error:
                state = State("died", " ".join(str(error).split()))
            yield cells.pop(ended), state
    finally:
        ray.shutdown()


def _list_recipes() -> int:
    for recipe in RECIPES.values():
        full, small = (sum(1 for _ in form.cells()) for form in (recipe, recipe.small_form()))
        cells = f"{full} cell{'s' * (full != 1)}, small {small}"
        print(f"{recipe.name:14} {recipe.item}  {recipe.title}: {cells}")
    return 0


def _words(state: State) -> str:
    took = f" in {duration(state.seconds)}" if state.seconds else ""
    return f"{state.name}{took}{', ' * bool(state.why)}{state.why}"


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(3725)
    '1 h 2 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
