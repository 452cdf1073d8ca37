"""One real fine-tuning run by PEFT and one by us: same data, seeds and flags, side by side.

Each run is `python -m models.train` in a process of its own, whose `result.json` is read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .records import ROOT, Results, Row

METHODS = ("peft", "lora")
OWN_FLAGS = ("--method", "--output-dir")


def run(flags: Sequence[str], device: torch.device, folder: Path) -> int:
    """Run both, write their rows, print the table; 1 if a run failed. ValueError for OWN_FLAGS."""
    taken = [flag for flag in flags if flag in OWN_FLAGS]
    if taken:
        raise ValueError(f"{taken[0]} is this benchmark's own: leave it out")
    rows = []
    for method in METHODS:
        with tempfile.TemporaryDirectory(prefix="bench-run-") as directory:
            command = [sys.executable, "-m", "models.train", *flags, "--method", method]
            done = subprocess.run([*command, "--output-dir", directory + "/run"], cwd=ROOT)
            if done.returncode:
                print(f"error: models.train --method {method} ended with {done.returncode}")
                return 1
            rows.append(row_of(Path(directory) / "run" / "result.json", method, flags))
    results = Results("training_run", device, folder)
    results.add(rows)
    print(table(rows))
    print(f"rows in {results.path}")
    return 0


def row_of(path: Path, method: str, flags: Sequence[str]) -> Row:
    """The row of one run, from its `result.json`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        "model": result.get("model_name") or Path(str(result["model"])).name,
        "task": result["task"],
        "method": method,
        "seconds": result["seconds"],
        "samples_per_second": result["samples_per_second"],
        "metrics": result["metrics"],
        "primary_metric": result.get("primary_metric"),
        "history": result.get("history"),
        "peak_memory": result.get("peak_memory"),
        "command": " ".join(["python -m bench end_to_end --train-run", *flags]),
    }


def table(rows: Sequence[Row]) -> str:
    """Seconds, samples/s and final metrics of each run."""
    lines = [f"{'method':<8}{'seconds':>10}{'samples/s':>12}  final metrics"]
    for row in rows:
        metrics = ", ".join(
            f"{split} {name} {value:.4f}"
            for split, values in row["metrics"].items()
            for name, value in values.items()
            if isinstance(value, float)
        )
        numbers = f"{row['seconds']:>10.1f}{row['samples_per_second']:>12.1f}"
        lines.append(f"{row['method']:<8}{numbers}  {metrics}")
    return "\n".join(lines)
