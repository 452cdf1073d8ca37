"""The command line: `lora-kernels COMMAND [--json]`, the same as `python -m lora_kernels.cli`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .adapters import convert as conversion
from .tools import compile_report, doctor, shapes, tune
from .tools.compile_report import DTYPES


def _doctor(arguments: argparse.Namespace) -> int:
    findings = doctor.examine()
    print(json.dumps(findings, indent=2) if arguments.json else doctor.render(findings))
    return 0 if findings["usable"] else 1


def _compile_report(arguments: argparse.Namespace) -> int:
    rows = compile_report.compile_report(arguments.arch, arguments.dtype, arguments.keep)
    data = [row._asdict() for row in rows]
    print(json.dumps(data, indent=1) if arguments.json else compile_report.render(rows))
    return 1 if any(row.refusal for row in rows) else 0


def _tune(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = arguments.batch * arguments.length
    dtypes = [DTYPES[name] for name in arguments.dtype]
    problems = shapes.problems_of(arguments.model, tokens, arguments.rank, dtypes, device)
    quiet = (lambda line: None) if arguments.json else print
    rows = tune.tune(problems, device, report=quiet)
    if arguments.json:
        data = [{"problem": key, **row._asdict()} for key, row in rows.items()]
        print(json.dumps(data, indent=1))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    enabled = arguments.enable_lora and tuple(flag == "1" for flag in arguments.enable_lora)
    source = conversion.Source(
        arguments.source, arguments.base, arguments.model_class, arguments.num_labels,
        arguments.alpha, enabled,
    )  # fmt: skip
    form = "merged" if arguments.command == "merge" else arguments.to
    done = conversion.convert(source, arguments.target, form)
    if arguments.json:
        print(json.dumps({**asdict(done), "target": str(arguments.target)}, indent=1))
    else:
        alpha = "" if done.alpha is None else f", alpha {done.alpha:g} (the file does not hold it)"
        print(f"{arguments.target}: {done.form}, LoRA on {done.layers} layers{alpha}")
        print(f"outputs before and after differ by {done.difference:.1e} of their size")
    return 0


_CONVERTED: dict[str, dict[str, Any]] = {
    "source": {"type": Path, "metavar": "SRC",
               "help": "a PEFT directory, a loralib file, a checkpoint or a merged model"},
    "target": {"type": Path, "metavar": "DST", "help": "what to write; it must not exist"},
    "--base": {"metavar": "MODEL", "help": "the base model, where SRC does not name it"},
    "--model-class": {"metavar": "NAME", "help": "transformers' class (default: the base's own)"},
    "--num-labels": {"type": int, "metavar": "N", "help": "outputs of the task head"},
    "--alpha": {"type": float, "help": "of a loralib file, which does not hold it"},
    "--enable-lora": {"nargs": "+", "choices": ["0", "1"], "metavar": "0|1",
                      "help": "which parts of a loralib MergedLinear have LoRA, such as 1 0 1"},
}  # fmt: skip
_MODELS = f"{', '.join(shapes.MODELS)}, or a directory with config.json"
_ARCHS, _DTYPES = list(compile_report.ARCHITECTURES), list(DTYPES)
# Name -> what prints and returns the exit code, a summary, and the flags beside --json.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, dict[str, dict[str, Any]]]] = {
    "doctor": (
        _doctor,
        "say what this machine has, which strategies run on it, and why not the others",
        {},
    ),
    "compile-report": (
        _compile_report,
        "compile every kernel for cards that need not be here: registers, spills, shared memory",
        {
            "--arch": {"nargs": "+", "choices": _ARCHS, "default": list(compile_report.GATED)},
            "--dtype": {"nargs": "+", "choices": _DTYPES, "default": _DTYPES},
            "--keep": {"type": Path, "metavar": "DIR", "help": "write each cubin into DIR"},
        },
    ),
    "tune": (
        _tune,
        "measure strategies and tiles for a model's layers on this GPU, and remember the fastest",
        {
            "--model": {"default": "roberta-base", "help": _MODELS},
            "--batch": {"type": int, "default": 16},
            "--length": {"type": int, "default": 128},
            "--rank": {"type": int, "default": 8},
            "--dtype": {"nargs": "+", "choices": _DTYPES, "default": ["bfloat16"]},
        },
    ),
    "convert": (
        _convert,
        "convert among PEFT directories, loralib files and merged models, and check the outputs",
        {
            **_CONVERTED,
            "--to": {
                "choices": conversion.FORMS,
                "help": "default: loralib for a DST that ends in "
                f"{', '.join(conversion.SUFFIXES)}, else peft",
            },
        },
    ),
    "merge": (_convert, "fold an adapter into its base model, and check the outputs", _CONVERTED),
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="lora-kernels", description="Fused LoRA layers: tools.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, summary, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", action="store_true", help="print JSON")
        for flag, options in flags.items():
            command.add_argument(flag, **options)
        command.set_defaults(run=run)
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
    except (ValueError, RuntimeError, OSError) as error:
        print(f"lora-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    raise SystemExit(main())
