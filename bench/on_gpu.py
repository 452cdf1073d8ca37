"""All that a machine with a GPU is asked to do, in one go: `make gpu`.

Nothing is installed: the Python that runs this has torch, Triton, transformers, peft, pytest and
pytest-xdist. A step that fails or runs out of its share of the time does not stop the next. Rows
are written as they are measured, so a second call goes on; tuning alone begins anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

# A test of each kernel: under the memory checker all tests would take a day.
EACH_KERNEL = (
    "tests/algebra/test_masks.py",
    "tests/autograd/test_functional.py",
    "tests/autograd/test_packs.py",
    "tests/layers/test_dora.py",
    "-k",
    "every_gradient or every_strategy or project_draws or applied or kernels_gain",
)
MEMORY_CHECKER = "compute-sanitizer"


class Step(NamedTuple):
    """Arguments for Python, their share of the time in percent, and a program to run them under.

    `{seconds}` is five sixths of the share, `{workers}` the count of pytest's processes.
    """

    name: str
    share: int
    command: tuple[str, ...]
    under: tuple[str, ...] = ()


_TESTS = ("-m", "pytest", "-q", "-m", "not slow", "--maxfail", "20")
_KERNELS = ("-m", "bench", "kernels", "--quick", "--seconds", "{seconds}")
_MEMCHECK = (MEMORY_CHECKER, "--tool", "memcheck", "--target-processes", "all")

STEPS = (
    # Interrupted, not killed, pytest still says what failed. Tests mostly wait for the compiler.
    Step("test", 22, (*_TESTS, "-n", "{workers}", "--dist", "worksteal")),
    Step(
        "check memory", 12, ("-m", "pytest", "-q", *EACH_KERNEL),
        under=(*_MEMCHECK, "--error-exitcode", "1"),
    ),
    Step("measure kernels", 12, _KERNELS),
    Step("measure packs", 7, ("-m", "bench", "packs", "--samples", "5")),
    Step("measure NF4", 2, ("-m", "bench", "quantised")),  # says so where bitsandbytes is missing
    Step("measure DoRA", 2, ("-m", "bench", "dora", "--samples", "10")),
    Step("tune", 12, ("-m", "lora_kernels.cli", "tune", "--model", "roberta-base")),
    Step("measure training steps", 17, ("-m", "bench", "end_to_end", "--quick")),
    Step("measure kernels, tuned", 12, _KERNELS),
    Step("plot", 2, ("-m", "bench", "plots")),
)  # fmt: skip


def command_of(step: Step, minutes: int, workers: int) -> list[str]:
    """The whole command of a step: interrupted at the end of its share, killed 30 s later."""
    seconds = minutes * 60 * step.share // 100
    values = {"{seconds}": str(seconds * 5 // 6), "{workers}": str(workers)}
    command = [values.get(word, word) for word in step.command]
    return ["timeout", "-s", "INT", "-k", "30", str(seconds), *step.under, sys.executable, *command]


def run(step: Step, minutes: int, workers: int) -> str:
    """Run a step; returns how it ended, in words."""
    if step.under and shutil.which(step.under[0]) is None:
        return f"no {step.under[0]} here"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if step.under:  # each tensor is an allocation of its own, so that its edges are seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = command_of(step, minutes, workers)
    print("+", *command, flush=True)
    with subprocess.Popen(command, env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # `timeout` hands it on, so nothing is left running
            raise
    return {0: "done", 124: "out of time", 137: "out of time, killed"}.get(code, f"failed ({code})")


def main(argv: Sequence[str] | None = None) -> None:
    """Run every step in its order, and say at the end how each ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=50, help="for all steps together")
    parser.add_argument("--workers", type=int, default=8, help="pytest's processes")
    arguments = parser.parse_args(argv)
    ends = {step.name: run(step, arguments.minutes, arguments.workers) for step in STEPS}
    for name, end in ends.items():
        print(f"{name:<23} {end}")


if __name__ == "__main__":
    main()
