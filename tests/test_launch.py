"""Launches compile nothing in the interpreter, so `launches.py` runs in a process without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_launches():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/launches.py"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
        check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


COST = """
from bench import launches
launches.CASES, launches.CALLS = (("split", 1, 0.1),), 1
for row in launches.launch_cost(1):
    assert row["status"] == "timed" and row["median_us"] > 0
    print(row["case"])
from lora_kernels.kernels.launch import KNOWN
assert KNOWN
"""


def test_the_cost_of_launches_is_a_row_each():
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", COST], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        f"{way} launches of 1, {direction}"
        for direction in ("forward", "backward")
        for way in ("dispatched", "remembered")
    ], done.stderr
