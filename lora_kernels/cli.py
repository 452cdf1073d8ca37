"""The command line: `lora-kernels COMMAND [--json]`, the same as `python -m lora_kernels.cli`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__
from .tools import compile_report, doctor, shapes, tune


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


def _compile_report_arguments(parser: argparse.ArgumentParser) -> None:
    archs, dtypes = list(compile_report.ARCHITECTURES), list(compile_report.DTYPES)
    parser.add_argument("--arch", nargs="+", choices=archs, default=list(compile_report.GATED))
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write each cubin into DIR")


def _compile_report(arguments: argparse.Namespace) -> int:
    rows = compile_report.compile_report(arguments.arch, arguments.dtype, arguments.keep)
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        print(compile_report.render(rows))
    return 1 if any(row.refusal for row in rows) else 0


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    models = ", ".join(shapes.MODELS)
    parser.add_argument(
        "--model", default="roberta-base", help=f"{models}, or a directory with config.json"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--dtype", nargs="+", choices=list(compile_report.DTYPES), default=["bfloat16"]
    )


def _tune(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = arguments.batch * arguments.length
    dtypes = [compile_report.DTYPES[name] for name in arguments.dtype]
    problems = shapes.problems_of(arguments.model, tokens, arguments.rank, dtypes, device)
    quiet = (lambda line: None) if arguments.json else print
    rows = tune.tune(problems, device, report=quiet)
    if arguments.json:
        print(json.dumps(tune.as_json(rows), indent=1))
    return 0


COMMANDS = (
    Command(
        "doctor",
        "say what this machine has, which strategies run on it, and why not the others",
        _doctor,
    ),
    Command(
        "compile-report",
        "compile every kernel for cards that need not be here: registers, spills, shared memory",
        _compile_report,
        _compile_report_arguments,
    ),
    Command(
        "tune",
        "measure strategies and tiles for a model's layers on this GPU, and remember the fastest",
        _tune,
        _tune_arguments,
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
    except (ValueError, RuntimeError) as error:
        print(f"lora-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    raise SystemExit(main())
