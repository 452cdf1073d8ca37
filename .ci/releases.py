"""The oldest and the newest torch and Triton that pyproject.toml admits; run by `make nightly`.

Each release is downloaded without its dependencies into a folder that comes first on the path, next
to what is installed, and a layer trains one step there (on a CPU; Triton's kernels in its
interpreter). A release of more than LIMIT is left out, and so is one that the index does not give:
both are printed and fail nothing. The exit status is 1 where a release is there and the step fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))
from versions import PROJECT, ROOT

LIMIT = 400 << 20  # bytes of one wheel: CPU builds of torch are below, CUDA builds are not
PACKAGES = ("torch", "triton")
STEP = """
import numpy, torch, triton
from lora_kernels import STRATEGIES, FusedLoRALinear
from lora_kernels.kernels import launch
numbers = [tuple(map(int, m.__version__.split("+")[0].split(".")[:2])) for m in (triton, numpy)]
broken = numbers[0] < (3, 7) and numbers[1] >= (2, 4)  # as `lora-kernels doctor` says
for strategy in ("auto", "library") if broken else ("auto", *STRATEGIES):
    layer = FusedLoRALinear(24, 40, rank=3, dropout=0.1, strategy=strategy)
    torch.nn.init.normal_(layer.lora_B)
    layer(torch.randn(33, 24, requires_grad=True)).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0, strategy
print("torch", torch.__version__, "triton", triton.__version__, end="; ")
print("launch cache", "on" if launch.KNOWN else "off", end="")
print("; no kernel, since NumPy breaks this interpreter" if broken else "")
"""


def wanted() -> list[str]:
    """The requirements to try: the lower bound of each package, and its newest release."""
    found = []
    for row in map(Requirement, PROJECT["dependencies"]):
        if row.name in PACKAGES:
            (oldest,) = (each.version for each in row.specifier if each.operator == ">=")
            found += [f"{row.name}=={oldest}", f"{row.name}{row.specifier}"]
    return found


def offered(requirement: str) -> tuple[str, str] | str:
    """The name and the address of the wheel that pip would take; or why there is none."""
    done = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", requirement)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    (row,) = json.loads(done.stdout)["install"]
    name = f"{row['metadata']['name']}=={row['metadata']['version']}"
    return name, row["download_info"]["url"]


def size(address: str) -> int | None:
    """The bytes behind an address; None where that cannot be told without loading it."""
    if address.startswith("file:"):
        return Path(urllib.request.url2pathname(address.removeprefix("file://"))).stat().st_size
    try:
        asked = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            length = answer.headers["Content-Length"]
    except OSError:
        return None
    return int(length) if length else None


def tried(name: str) -> str | None:
    """The last line of what goes wrong with a release; None where a step of training passes."""
    with tempfile.TemporaryDirectory() as folder:
        done = _pip("install", "--target", folder, name)
        if done.returncode:
            print(f"  NOT DONE: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
            return None
        path = os.pathsep.join((folder, str(ROOT)))
        done = subprocess.run(
            [sys.executable, "-c", STEP], capture_output=True, text=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        )  # fmt: skip
    if done.returncode == 0:
        print(f"  a step of training passes: {done.stdout.strip()}")
        return None
    return (done.stderr.strip().splitlines() or ["?"])[-1]


def _pip(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", words[0], "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=1", "--no-cache-dir", *words[1:]]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def main() -> int:
    """A line or two for each release; returns the exit status."""
    failed, seen = False, set()
    for requirement in wanted():
        found = offered(requirement)
        if isinstance(found, str):
            print(f"{requirement}\n  NOT DONE: {found}")
            continue
        name, address = found
        if name in seen:
            continue
        seen.add(name)
        print(f"{requirement}: {name}", flush=True)
        length = size(address)
        if length is None or length > LIMIT:
            said = "of unknown size" if length is None else f"of {length >> 20} MiB"
            print(f"  NOT DONE: a wheel {said}; at most {LIMIT >> 20} MiB are loaded")
            continue
        error = tried(name)
        failed |= error is not None
        if error:
            print(f"  FAILED: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
