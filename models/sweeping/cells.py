"""A cell of a sweep: its arguments, its state, and the function that runs it in any process.

The run directory is the state. With a `result.json` the cell is done, with an `error.json` it has
failed, with neither it is still to do, and a run that was cut off goes on from its last checkpoint.
A `stopped.json` says that better cells went on without it (`--stop-losers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import DIGESTS, Arguments
from ..recipes.recipe import Cell
from .bases import CLEAN, TINY, clean_sms, tiny_model

if TYPE_CHECKING:
    from ..training.seat import Seat

ERROR, STOPPED, LOG = "error.json", "stopped.json", "log.txt"
BASES, DATA = "bases", "data"  # below the runs: what `bases` makes


@dataclasses.dataclass(frozen=True)
class State:
    """`name` is "done", "failed", "stopped", "to do", "died" or "elsewhere"; `why` says more."""

    name: str
    why: str = ""
    seconds: float = 0.0


def arguments_of(cell: Cell, runs: Path, data_dir: Path | None) -> Arguments:
    """The arguments of a cell's run. Makes a tiny model or the clean split, if it needs one.

    `data_dir` has a folder for each task; None is the hub. Raises ValueError or FileNotFoundError
    for what is not there.
    """
    from ..data.tasks import task_of

    runs = runs.absolute()  # a node of a cluster may have another working directory
    data_dir = None if data_dir is None else data_dir.absolute()
    flags = dict(cell.flags)
    folder = flags.pop("data", flags["task"])
    place: Path | None = None
    if task_of(flags["task"]).build is not None:
        place = None
    elif folder == CLEAN:
        place = clean_sms(runs / DATA, None if data_dir is None else data_dir / flags["task"])
    elif data_dir is not None:
        place = data_dir / folder
    elif folder != flags["task"]:
        raise FileNotFoundError(f"{folder} is not on the hub: --data-dir must have it")
    if flags.get("model") in TINY:
        flags["model"] = str(tiny_model(flags["model"], runs / BASES))
    return Arguments(
        **flags,
        data_dir=None if place is None else str(place),
        output_dir=str(cell.directory(runs)),
    )


def state_of(arguments: Arguments) -> State:
    """What the run directory says of a cell, without reading rows or model.

    A cell is done with graphs or without: they are how it ran, not what.
    """
    from ..record.run_directory import RESULT, noted_flags, read_json

    directory = arguments.directory()
    if (directory / RESULT).is_file():
        before = noted_flags(directory)
        changed = [
            f"{name} {before.get(name)!r} -> {value!r}"
            for name, value in arguments.identity().items()
            if name not in (*DIGESTS, "graphs") and before.get(name) != value
        ]
        if changed:
            return State(
                "failed",
                f"{directory} holds a run with other arguments ({'; '.join(changed)}): "
                "choose other --runs, or delete it",
            )
        diverged = read_json(directory / RESULT).get("diverged", False)
        return State("done", "diverged" if diverged else "")
    if (directory / ERROR).is_file():
        return State("failed", read_json(directory / ERROR)["error"])
    if (directory / STOPPED).is_file():
        return State("stopped", read_json(directory / STOPPED)["why"])
    return State("to do")


def run_cell(arguments: Arguments, threads: int | None = None, seat: Seat | None = None) -> State:
    """Run a cell to its end in this process; what goes wrong is written down and returned.

    What the run prints goes into `log.txt` of its directory. `threads` are those of torch. With a
    `seat` it trains together with other cells (`together`).
    """
    import datasets
    import torch
    import transformers

    from lora_kernels.durable import locked

    from ..record.run_directory import write_json
    from ..train import train
    from ..training.seat import StoppedError
    from .estimate import check_fits

    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    directory = arguments.directory()
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        with (
            locked(directory / "cell", wait=False),
            (directory / LOG).open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                check_fits(arguments)
                result: dict[str, Any] = train(arguments, seat=seat)
            except StoppedError as stopped:
                write_json(directory / STOPPED, {"why": str(stopped)})
                return State("stopped", str(stopped), time.perf_counter() - started)
            except Exception as error:  # noqa: BLE001 - a failed cell does not stop the others
                traceback.print_exc()  # into the log
                error_line = f"{type(error).__name__}: {' '.join(str(error).split())}"
                write_json(
                    directory / ERROR,
                    {
                        "error": error_line,
                        "command": arguments.command(),
                        "traceback": traceback.format_exc(),
                    },
                )
                return State("failed", error_line, time.perf_counter() - started)
    except BlockingIOError:
        return State("elsewhere", "another sweep is running it")
    why = "diverged" if result.get("diverged") else ""
    return State("done", why, time.perf_counter() - started)
