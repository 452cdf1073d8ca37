"""The run directory: which run it holds, and the files that a run leaves in it.

Every file is written aside and renamed, `result.json` last: where that file exists, the run is
whole.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kernels.durable import replacing

from . import show

RESULT, ARGUMENTS, CHECKPOINTS = "result.json", "arguments.json", "checkpoints"


def open_run(
    directory: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Open the directory for the run that `identity` names; returns its result if it is finished.

    None means that the run starts, or continues from its checkpoints. `overwrite` deletes what the
    directory holds. Raises ValueError for a directory that holds a run of other arguments, for a
    run to continue where `resume` is False, and for `overwrite` on a directory that holds no run.
    """
    begun = directory / ARGUMENTS
    if overwrite:
        if directory.exists() and any(directory.iterdir()) and not begun.is_file():
            raise ValueError(f"{directory} is not a run directory: it has no {ARGUMENTS}")
        shutil.rmtree(directory, ignore_errors=True)
    if not begun.is_file():
        return None
    before = read_json(begun)
    changed = [
        f"{name} {before.get(name)!r} -> {identity.get(name)!r}"
        for name in dict.fromkeys((*before, *identity))
        if before.get(name) != identity.get(name)
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
    finished = directory / RESULT
    return read_json(finished) if finished.is_file() else None


def begin(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write down which run the directory holds, so that it can be continued."""
    write_json(directory / ARGUMENTS, identity)


def finish(
    directory: Path,
    result: Mapping[str, Any],
    losses: Sequence[float],
    save: Callable[[Path], Any],
) -> None:
    """Write the files of a run that has ended, the result last, and drop its checkpoints.

    `losses` are those of every step. `save` writes what was trained into the directory that it is
    given, which becomes `result["saved"]`.
    """
    per_epoch = len(losses) // len(result["history"])
    steps = [
        {"step": step, "epoch": (step - 1) // per_epoch + 1, "loss": loss}
        for step, loss in enumerate(losses, start=1)
    ]
    write_csv(directory / "steps.csv", steps)
    write_csv(directory / "history.csv", result["history"])
    with replacing(directory / result["saved"]) as aside:
        save(aside)
    with replacing(directory / "plot.png") as aside:
        show.plot(result, losses).savefig(aside, dpi=150)
    write_json(directory / RESULT, result)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises ValueError naming a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); --overwrite starts anew") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys; floats keep every digit."""
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
