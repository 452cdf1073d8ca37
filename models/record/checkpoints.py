"""Checkpoints that are whole: each is sealed by a list of its files and their digests.

The seal is written last. A kill, a full disk or a hand in the directory shows as a file that is
missing or differs from its digest, and the checkpoint before is taken instead.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lora_kernels.durable import replacing

from .digests import file_digest

TRAINED, PROGRESS, STATE = "trained.safetensors", "progress.json", "trainer_state.json"
NEEDED = (TRAINED, PROGRESS, STATE, "optimizer.pt", "scheduler.pt", "rng_state.pth")
KEPT = 2  # checkpoints on disk: the last, and the one before in case the last is damaged
_SEAL = "seal.json"


def seal(checkpoint: Path) -> None:
    """Write down the digest of every file of a checkpoint: it is complete."""
    files = {path.name: file_digest(path) for path in _files(checkpoint)}
    with replacing(checkpoint / _SEAL) as aside:
        aside.write_text(json.dumps(files))


def last_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `directory`, and why each newer one was passed over."""
    passed_over: list[str] = []
    for checkpoint in _newest_first(directory):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {damage}")
    return None, passed_over


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole."""
    try:
        sealed = dict(json.loads((checkpoint / _SEAL).read_text()))
    except (OSError, ValueError, TypeError):
        return "it was not written to the end"
    # Of several processes each has a state of its own, and the seal names them all.
    needed = NEEDED[:-1] if "rng_state_0.pth" in sealed else NEEDED
    for name in (*needed, *sealed):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sealed.get(name) != file_digest(path):
            return f"{name} is not what was written"
    steps = json.loads((checkpoint / STATE).read_text())["global_step"]
    progress = json.loads((checkpoint / PROGRESS).read_text())
    if "epochs" not in progress:
        return "an earlier version wrote it, which did not tell of epochs"
    losses = len(progress["losses"])
    if not steps == losses == _step(checkpoint):
        return f"its state is of step {steps}, and it holds {losses} losses"
    return None


def _newest_first(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("checkpoint-*") if _step(path) is not None]
    return sorted(found, key=lambda path: -(_step(path) or 0))


def _step(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.iterdir() if path.is_file() and path.name != _SEAL]
