"""Rows of results: what every row says, and the file they live in.

A file holds the rows of one suite on one device, as a JSON list. The rows of a CPU are in a file
`cpu-...` and say `"device": "cpu"`; they never mix with a GPU's. A run that was cut short goes on
where it stopped: rows of the same code are not measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lora_kernels.durable import locked, replacing

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# What identifies a row within a file: a new one of the same key replaces the old.
KEYS: Mapping[str, tuple[str, ...]] = {
    "kernels": ("case", "provider", "mode", "direction", "M", "R", "dtype", "dropout"),
    "end_to_end": ("model", "method", "precision", "batch", "length"),
    "training_run": ("model", "task", "method"),
    "host": ("case", "provider", "precision", "dropout"),
    "packs": ("case", "provider", "batch", "adapters"),
    "quantised": ("case", "provider", "M", "R", "dtype", "dropout"),
    "dora": ("case", "provider", "M", "R", "dtype", "dropout"),
}
MACHINE = ("gpu", "device", "driver", "torch", "triton", "commit", "code", "date")
_LAYER = (
    "M", "N", "K", "R", "dtype", "dropout", "status", "median_us", "p20_us", "p80_us",
    "floor_ratio", "peak_bytes", *MACHINE,
)  # fmt: skip
# The columns that every row of a suite has, in the order of the file.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "kernels": ("suite", "case", "provider", "mode", "direction", *_LAYER),
    "end_to_end": (
        "suite",
        "model",
        "method",
        "provider",
        "precision",
        "batch",
        "length",
        "status",
        "samples_per_second",
        "step_ms",
        "peak_memory_bytes",
        "launches",
        "busy_share",
        *MACHINE,
    ),
    "training_run": ("suite", "model", "task", "method", "seconds", "metrics", *MACHINE),
    "host": ("suite", "case", "provider", "precision", "dropout", "status", "median_us", *MACHINE),
    "packs": ("suite", "case", "provider", "batch", "adapters", "status", "median_us", *MACHINE),
    "quantised": ("suite", "case", "provider", "mode", *_LAYER),
    "dora": ("suite", "case", "provider", "mode", *_LAYER),
}


def folder_of(arguments: Any) -> Path:
    """The folder of the result files; SystemExit if rows of toys would replace measured ones."""
    if getattr(arguments, "tiny", False) and arguments.results == RESULTS:
        raise SystemExit("error: --tiny measures toys: say with --results where their rows may go")
    folder: Path = arguments.results
    return folder


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "CPU" with the processor's name, family and vector instructions.

    The family tells processors apart to which a virtual machine gives one name.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = {"model name": platform.processor() or platform.machine()}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        found = [line.partition(":") for line in first.splitlines()]
        facts |= {name.strip(): value.strip() for name, _, value in found}
    family = f" family {facts['cpu family']}" if "cpu family" in facts else ""
    return f"CPU {facts['model name']}{family} {torch.backends.cpu.get_cpu_capability()}"


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def code_digest() -> str:
    """A digest of the library's sources: it tells what was measured, committed or not."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lora_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def machine(device: torch.device) -> Row:
    """The columns that every row of this process shares."""
    row: Row = {
        "gpu": device_name(device),
        "device": device.type,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "transformers": _version("transformers"),
        "commit": _commit(),
        "code": code_digest(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    if device.type == "cpu":
        row |= {"driver": None, "threads": torch.get_num_threads()}
    return row


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--", "lora_kernels"):
        commit += "-dirty"
    return commit


def _output(*command: str) -> str | None:
    """The first line that a command prints, if it exists and succeeds."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return lines[0].strip()
    return None


class Results:
    """The file of one suite on one device; each `add` is on the disk when it returns."""

    def __init__(self, suite: str, device: torch.device, folder: Path = RESULTS) -> None:
        self.suite, self.device = suite, device
        self.path = folder / f"{slug(device_name(device))}-{suite.replace('_', '-')}.json"
        self._held: set[tuple[Any, ...]] | None = None

    def rows(self) -> list[Row]:
        """All rows of the file."""
        return read(self.path) if self.path.exists() else []

    def has(self, row: Row) -> bool:
        """Whether the file holds this measurement of the same code; a failed one does not count."""
        if self._held is None:  # the file is read once: a full suite asks 100,000 times
            same = (old for old in self.rows() if old["code"] == code_digest())
            self._held = {self._key(old) for old in same if old.get("status") != "failed"}
        return self._key(row) in self._held

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows, each in place of the old one of its key; other processes may do the same."""
        new = {self._key(row): self._complete(row) for row in rows}
        with locked(self.path):
            kept = [row for row in self.rows() if self._key(row) not in new]
            write(self.path, [*kept, *new.values()])
        if self._held is not None:
            self._held |= new.keys()

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in KEYS[self.suite])

    def _complete(self, row: Row) -> Row:
        row = {"suite": self.suite, **row, **machine(self.device)}
        return {name: row.pop(name, None) for name in FIELDS[self.suite]} | row


def read(path: Path) -> list[Row]:
    """The rows of a file; ValueError that names the file if it holds something else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of rows")
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a file in one step: a reader sees the old rows or the new, never half."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def every_row(suite: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a suite on every device that has a file."""
    paths = sorted(folder.glob(f"*-{suite.replace('_', '-')}.json"))
    return [row for path in paths for row in read(path)]
