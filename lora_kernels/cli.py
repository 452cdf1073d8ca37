"""The command line: `lora-kernels COMMAND [--json]`, the same as `python -m lora_kernels.cli`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import __version__, doctor


@dataclass(frozen=True)
class Command:
    """A row of COMMANDS: `run` prints and returns the exit code; every command takes --json."""

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def _doctor(arguments: argparse.Namespace) -> int:
    findings = doctor.examine()
    print(json.dumps(findings, indent=2) if arguments.json else doctor.render(findings))
    return 0 if findings["usable"] else 1


COMMANDS = (
    Command(
        "doctor",
        "say what this machine has, which strategies run on it, and why not the others",
        _doctor,
    ),
)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="lora-kernels", description="Fused LoRA layers: tools.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for row in COMMANDS:
        command = commands.add_parser(row.name, help=row.summary, description=row.summary)
        command.add_argument("--json", action="store_true", help="print JSON")
        row.add_arguments(command)
        command.set_defaults(run=row.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for a command line that cannot be read)."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
