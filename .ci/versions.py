"""What each supported Python makes of this package; run by `make versions`.

For each version: every source file parses under its grammar, and all declared dependencies resolve
under constraints.txt. Where an interpreter of the version is found, it compiles every file, and
imports the library if it has torch. Whatever could not be done is printed.

The exit status is 1 where a file does not parse or the library does not import. A package index
that does not answer is no fault of the code: what does not resolve is printed, and fails with
--strict alone.
"""

from __future__ import annotations

import argparse
import ast
import glob
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("lora_kernels", "models", "bench", "tests", ".ci")
COMPILE = """
import sys
for path in sys.stdin.read().splitlines():
    compile(open(path, "rb").read(), path, "exec")
"""
HERE = "{}.{}".format(*sys.version_info)


def supported() -> list[str]:
    """The versions that the classifiers of pyproject.toml name."""
    last = [row.rpartition(" :: ")[2] for row in PROJECT["classifiers"] if ":: Python ::" in row]
    return [name for name in last if name.count(".") == 1]


def interpreter(version: str) -> str | None:
    """A Python of this version on this machine: on PATH, or kept by uv or by pyenv."""
    uv, pyenv = shutil.which("uv"), shutil.which("pyenv")
    found = [sys.executable if version == HERE else shutil.which(f"python{version}")]
    if uv:
        found.append(_output(uv, "python", "find", version))
    if pyenv:
        found += sorted(glob.glob(f"{_output(pyenv, 'root')}/versions/{version}.*/bin/python"))
    say = "import sys; print('{}.{}'.format(*sys.version_info))"
    return next((each for each in found if each and _output(each, "-c", say) == version), None)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def unparsed(version: str, sources: list[Path]) -> list[str]:
    """The files that do not parse under the grammar of a version, as far as `ast` knows it."""
    wrong = []
    for path in sources:
        try:
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=_pair(version))
        except SyntaxError as error:
            wrong.append(f"{path.relative_to(ROOT)}:{error.lineno}: {error.msg}")
    return wrong


def _pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def failure(*command: str, text: str = "") -> str | None:
    """The last line that a command which fails has printed; None if it succeeds."""
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, cwd=ROOT
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def unresolved(version: str, python: str | None) -> str | None:
    """Why pip finds no set of packages for a version; None if it does. Nothing is installed."""
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "constraints.txt")
        pins.write_text("\n".join(_pins(version)), encoding="utf-8")
        where = ["--python-version", version, "--target", folder]
        command = [sys.executable, "-m", "pip", *(["--python", python] if python else [])]
        command += ["install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=1"]
        command += ["-c", str(pins), *([] if python else where), *wanted]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired:
            return "pip has not answered within 600 s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return None if done.returncode == 0 else (errors or ["pip failed"])[0]


def _pins(version: str) -> list[str]:
    """The lines of constraints.txt for a version; pip would read markers as its own Python's."""
    given = {"python_version": version, "python_full_version": f"{version}.0"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [f"{r.name}{r.specifier}" for r in found if not r.marker or r.marker.evaluate(given)]


def main() -> int:
    """Print a line for each check of each version; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=supported(), help="such as 3.10 3.13")
    parser.add_argument("--strict", action="store_true", help="fail on what does not resolve")
    arguments = parser.parse_args()
    sources = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    names = "\n".join(str(path) for path in sources)
    failed = False
    for version in arguments.versions:
        wrong, python = unparsed(version, sources), interpreter(version)
        failed |= bool(wrong)
        print(f"Python {version}")
        print(f"  grammar   {'; '.join(wrong) or f'{len(sources)} files parse'}")
        if python is None:
            print("  compile   NOT DONE: no such interpreter on PATH, nor kept by uv or pyenv")
        else:
            error = failure(python, "-c", COMPILE, text=names)
            failed |= error is not None
            print(f"  compile   {error or f'{len(sources)} files compile in {python}'}")
        if python is None or failure(python, "-c", "import torch"):
            print("  import    NOT DONE: no interpreter of this version has torch")
        else:
            error = failure(python, "-c", "import lora_kernels")
            failed |= error is not None
            print(f"  import    {error or 'lora_kernels imports'}")
        error = unresolved(version, python)
        failed |= arguments.strict and error is not None
        read = "" if python else f" (markers of dependencies read as Python {HERE}'s)"
        verdict = "all dependencies resolve" if error is None else f"NOT RESOLVED: {error}"
        print(f"  resolve   {verdict}{read}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
