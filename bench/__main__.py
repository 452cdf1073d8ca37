"""`python -m bench <suite>`: one table of suites; each module brings its flags and its `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

SUITES = {
    "kernels": "single layers against the frozen floor and the peers",
    "end_to_end": "whole fine-tuning steps, and one real run",
    "host": "what needs no GPU: CPU speed, Python overhead a call, import time",
    "packs": "several adapters on one base, packed against one after another",
    "quantised": "single layers in bitsandbytes' NF4, with LoRA on them",
    "dora": "single layers with DoRA, beside PEFT's",
    "roofline": "predicted times for cards by their datasheets, checked where measured",
    "plots": "pictures of what the result files hold",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one suite, return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    modules = {}
    for name, text in SUITES.items():
        subparser = suites.add_parser(name, help=text, description=text)
        if name in arguments[:1]:  # the others' imports (matplotlib, transformers) are not needed
            modules[name] = importlib.import_module(f"bench.{name}")
            modules[name].add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    try:
        return modules[parsed.suite].run(parsed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
