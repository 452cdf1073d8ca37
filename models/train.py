"""Fine-tune one model on one task: `python -m models.train`.

With no arguments: MiniLM, fused LoRA, the docstrings of this Python's standard library; a few
minutes on two CPU cores. `train(Arguments(...))` does the same in process and returns the result.
`--config FILE` reads flags from JSON or YAML; those on the command line count more.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from transformers import HfArgumentParser

from .arguments import DIGESTS, Arguments, words_of

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .training.seat import Seat

# What takes seconds to import is imported where it is used, so that `--help` answers at once.


def train(
    arguments: Arguments,
    callbacks: tuple[TrainerCallback, ...] = (),
    seat: Seat | None = None,
) -> dict[str, Any]:
    """Run `arguments` to the end; returns what `result.json` holds.

    A run that was cut off continues from its last checkpoint and ends with the numbers that it
    would have had. A finished run is read back. Raises ValueError, FileNotFoundError or ImportError
    for arguments that cannot work, before any training. With a `seat` its steps are made in one
    pass with those of other runs (`python -m models.sweep --together`).

    >>> train(Arguments(task="sst2", rank=4))["metrics"]["test"]["accuracy"]
    """
    from .run import run

    return run(arguments, callbacks, seat)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """`--help` with each default told once, and the opposite of a flag told as that."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return f"the opposite of --{action.dest.replace('_', '-')}"
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parse(argv: list[str] | None = None) -> Arguments:
    """The flags of a command line, over those of its `--config` file.

    Exits with status 2, as argparse does, for what is no flag or cannot be read.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config", type=Path)
    chosen, words = options.parse_known_args(argv)
    parser = HfArgumentParser(
        Arguments,  # type: ignore[arg-type]
        prog="python -m models.train",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML with flags by name")
    if chosen.config is not None:
        try:
            words = [*read_config(chosen.config), *words]
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(f"--config {chosen.config}: {' '.join(str(error).split())}")
    arguments, *rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if rest[-1]:
        parser.error(f"unknown arguments: {' '.join(rest[-1])}")
    return arguments


def read_config(path: Path) -> list[str]:
    """The words of a command line for the flags in a file, such as a run's `arguments.json`.

    Flags are spelled with dashes or underscores; null leaves the default. Raises ValueError for a
    file that is no mapping, and for a name that is no flag, with near misses.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping from flags to values")
    known = [item.name for item in dataclasses.fields(Arguments)]
    words = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in DIGESTS or value is None:
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{key} is no flag{hint}")
        words += words_of(name, str(value) if isinstance(value, bool) else value, quote=False)
    return words


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, print the tables.

    The exit status is 2 for arguments, files or a place that cannot work, and 1 for a run that
    ended without a finite loss.
    """
    arguments = parse(argv)
    import datasets
    import transformers

    from .record import show
    from .training import processes

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        result = train(arguments)
    except (ValueError, OSError, ImportError) as error:
        if processes.is_first():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        processes.end()
    if processes.is_first():
        show.print_result(result, arguments.directory())
    return 1 if result.get("diverged") else 0


if __name__ == "__main__":
    sys.exit(main())
