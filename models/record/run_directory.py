"""The run directory: which run it holds, and the files that a run leaves in it.

Every file is written aside and renamed, `result.json` last: where that file exists, the run is
whole.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_kernels.durable import locked, replacing

from ..arguments import DIGESTS, Arguments
from . import show
from .checkpoints import last_checkpoint

RESULT, ARGUMENTS, CHECKPOINTS = "result.json", "arguments.json", "checkpoints"
STEPS, HISTORY, PLOT, PREDICTIONS = "steps.csv", "history.csv", "plot.png", "predictions.csv"
RANKS = "ranks.png"
TRACKED = "tracked"  # what TensorBoard writes; other trackers have places of their own
FOLDERS = ("adapter", "model", TRACKED, CHECKPOINTS)
# All that a run writes. Only that is deleted: the result first, lest half a run be taken for whole,
# and last the arguments, which show that the directory holds a run.
WRITTEN = (
    RESULT,
    *(STEPS, HISTORY, PREDICTIONS, PLOT, RANKS),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"),
    *("model/config.json", "model/generation_config.json"),
    *("model/model*.safetensors", "model/model.safetensors.index.json"),
    f"{TRACKED}/events.out.tfevents.*",
    *(f"{CHECKPOINTS}/checkpoint-*/*.{end}" for end in ("json", "safetensors", "pt", "pth", "bin")),
    ARGUMENTS,
)
_ASIDE = re.compile(  # what killed writers leave beside these files, now and in earlier versions
    r"((adapter|model|checkpoints/checkpoint-\d+)/)?"
    r"\.(adapter|model|result|arguments|steps|history|plot|predictions|ranks|seal)[^/]*"
    r"(-\d+-\d+\.(new|old)|\.\d+\.part)(\.\w+)?(/.*)?|\.run\.lock"
)
_OURS = {"task", "method", "rank", "seed"}  # every version's `arguments.json` has these


def find_run(
    directory: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """The result of the run that `identity` names, if the directory holds it finished; or None.

    None means that the run starts or continues. Nothing is changed. Raises ValueError for a
    directory where it may do neither: it holds a run of another identity, or one to continue though
    `resume` is False; it would be overwritten and is not a run's; what the run writes lies there
    and is not a run's; it is a part of another run.
    """
    try:
        return _find(directory, identity, resume, overwrite)
    except FileNotFoundError as error:  # it was there a moment ago
        raise ValueError(
            f"another process is changing the run in {directory} ({error}): wait until it ends"
        ) from error


@contextmanager
def opened(
    directory: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Path | None]:
    """Let this process alone write the run; yields the checkpoint to continue from, or None.

    Without one, what an earlier run wrote is deleted. Raises ValueError as `find_run` does, and if
    another process is writing here or has just finished.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(directory / "run", wait=False))
        except BlockingIOError:
            raise ValueError(
                f"another process is writing the run in {directory}: "
                "wait until it ends, or choose another --output-dir"
            ) from None
        found = find_run(directory, identity, resume=resume, overwrite=overwrite)
        if found is not None:
            raise ValueError(
                f"{directory} was finished by another process just now: "
                "the same command reads it back"
            )
        checkpoint = None
        if not overwrite:
            checkpoint, damages = last_checkpoint(directory / CHECKPOINTS)
            print(*damages, sep="\n", end="\n" * bool(damages))
        if checkpoint is None:
            if _holds_run(directory):
                _clear(directory)
            with writing(directory):
                write_json(directory / ARGUMENTS, identity)
        yield checkpoint


def _find(
    directory: Path, identity: Mapping[str, Any], resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    _refuse_place(directory, overwrite)
    if overwrite or not _holds_run(directory):
        return None
    before, finished = noted_flags(directory), (directory / RESULT).is_file()
    noted = all(name in before for name in DIGESTS)
    if not finished:
        if not noted and any((directory / CHECKPOINTS).glob("checkpoint-*")):
            raise ValueError(
                f"{directory} was begun by a version that did not note which rows and model it "
                "read, so it cannot be continued: --overwrite it"
            )
        if last_checkpoint(directory / CHECKPOINTS)[0] is None:
            return None  # it ended before there was anything to continue from
    now = identity if noted else {k: v for k, v in identity.items() if k not in DIGESTS}
    changed = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{directory} holds a run with other arguments ({'; '.join(changed)}): "
            "choose another --output-dir, or --overwrite it"
        )
    if not resume:
        raise ValueError(
            f"{directory} holds a run already: --overwrite it, or leave out --no-resume"
        )
    if not finished:
        return None
    result = read_json(directory / RESULT)
    if "metrics" not in result:
        raise ValueError(f"{directory / RESULT} is no result of a run: --overwrite it")
    return result


def noted_flags(directory: Path) -> dict[str, Any]:
    """What `arguments.json` holds; a flag that came after that version had its default then."""
    return Arguments().identity() | read_json(directory / ARGUMENTS)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a failure to write into one OSError that says where, and how the run goes on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are torch's and its
        raise OSError(
            f"{directory} could not be written ({error}); "
            "once there is room, the same command goes on from the last checkpoint"
        ) from error


def _holds_run(directory: Path) -> bool:
    """Whether `arguments.json` is a file of ours: the name alone says nothing."""
    path = directory / ARGUMENTS
    if not path.is_file() or path.is_symlink():
        return False
    try:
        return read_json(path).keys() >= _OURS
    except ValueError:
        return False


def _refuse_place(directory: Path, overwrite: bool) -> None:
    """Raise ValueError for a directory that no run may start in."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output-dir {directory} is a file")
    outer = next((path for path in directory.absolute().parents if _holds_run(path)), None)
    if outer is not None:
        part = directory.absolute().relative_to(outer).parts[0]
        if overwrite or part in FOLDERS:
            raise ValueError(f"{directory} lies inside the run {outer}: choose another place")
    if not directory.is_dir():
        return
    strange = [name for name in _entries(directory) if not _is_written(directory, name)]
    within = [name for name in strange if name.partition("/")[0] in (*FOLDERS, *WRITTEN)]
    if overwrite and directory.is_symlink():
        raise ValueError(f"{directory} is a link, which --overwrite does not follow")
    if not _holds_run(directory):
        if overwrite and strange:
            raise ValueError(
                f"{directory} is not a run directory: it holds {strange[0]}, and no {ARGUMENTS} "
                "of a run"
            )
        there = [name for name in (*WRITTEN, *FOLDERS) if (directory / name).exists()]
        if there:
            raise ValueError(
                f"{directory} holds {there[0]}, which this run would replace, and no {ARGUMENTS} "
                "of a run: choose another --output-dir"
            )
    elif within:
        raise ValueError(
            f"{directory} holds {within[0]}, which no run wrote: move it away, or choose another "
            "--output-dir"
        )


def _entries(directory: Path) -> list[str]:
    """Files and links at any depth, and empty directories, as paths relative to `directory`."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )


def _is_written(directory: Path, name: str) -> bool:
    """Whether a run writes a file of this name; links it never writes."""
    if (directory / name).is_symlink():
        return False
    if (directory / name).is_dir():  # an empty one
        return name.partition("/")[0] in FOLDERS or _ASIDE.fullmatch(name) is not None
    return any(fnmatch(name, pattern) for pattern in WRITTEN) or _ASIDE.fullmatch(name) is not None


def _clear(directory: Path) -> None:
    """Delete what a run wrote into `directory`, and nothing else."""
    names = [name for name in _entries(directory) if _is_written(directory, name)]
    for name in sorted(names, key=lambda name: name != RESULT):
        if name not in (ARGUMENTS, ".run.lock"):  # this process holds the lock
            _remove(directory / name)
            for folder in (directory / name).parents:
                if folder == directory or any(folder.iterdir()):
                    break
                folder.rmdir()
    (directory / ARGUMENTS).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()


def finish(
    directory: Path,
    result: Mapping[str, Any],
    losses: Sequence[float],
    predictions: Sequence[Mapping[str, Any]],
    save: Callable[[Path], Any],
) -> None:
    """Write the files of a run that has ended, the result last, and drop its checkpoints.

    `losses` are those of every step, `predictions` a row for each row that was scored. `save`
    writes what was trained into the directory that it is given, which becomes `result["saved"]`.
    """
    per_epoch = result["steps_per_epoch"]
    steps = [
        {"step": step, "epoch": (step - 1) // per_epoch + 1, "loss": loss}
        for step, loss in enumerate(losses, start=1)
    ]
    with writing(directory):
        write_csv(directory / STEPS, steps)
        write_csv(directory / HISTORY, result["history"])
        write_csv(directory / PREDICTIONS, predictions)
        with replacing(directory / result["saved"]) as aside:
            save(aside)
        with replacing(directory / PLOT) as aside:
            show.plot(result, losses).savefig(aside, dpi=150)
        if "ranks" in result:
            with replacing(directory / RANKS) as aside:
                show.plot_ranks(result["ranks"]).savefig(aside, dpi=150)
        write_json(directory / RESULT, result)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises ValueError naming a file that holds no JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no object in JSON ({error}): delete the run, or --overwrite it"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON."""
    with replacing(path) as aside:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys; floats keep every digit."""
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
