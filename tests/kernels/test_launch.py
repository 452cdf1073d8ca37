"""The interpreter compiles and launches nothing, so these tests run in processes without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python from the root of the checkout, where kernels are compiled."""
    clean = {k: v for k, v in os.environ.items() if k != "LORA_KERNELS_LAUNCH"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**clean, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def passes(*names: str, **environment: str) -> None:
    files = [f"tests/compiled/{name}" for name in names]
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


# The cards that ptx.py can play: `make test` takes the first.
PLAYED = (
    "sm_86",
    *(
        pytest.param(arch, marks=[pytest.mark.nightly, pytest.mark.slow])
        for arch in ("sm_80", "sm_89", "sm_90", "sm_120")
    ),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is compiled")
@pytest.mark.parametrize("arch", PLAYED)
def test_compiled_code(arch):
    passes("compiled_code.py", COMPILED_FOR=arch)


def test_launches():
    passes("launches.py", "launch_cache.py")


@pytest.mark.parametrize(
    ("value", "said"),
    [("triton", "cached: False"), ("fast", "ValueError: LORA_KERNELS_LAUNCH=fast")],
    ids=["triton", "unknown"],
)
def test_the_variable_is_read(value, said):
    code = "from lora_kernels.kernels import launch; print('cached:', launch.CACHED)"
    done = python("-c", code, LORA_KERNELS_LAUNCH=value)
    assert said in done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver's own libcuda is loaded")
def test_what_reaches_the_driver(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("Triton's launcher takes a C compiler to build")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    library = tmp_path / "libcuda.so.1"
    source = ROOT / "tests/compiled/libcuda.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", library], check=True
    )
    (tmp_path / "libcuda.so").symlink_to(library)  # by which the launcher is linked
    passes(
        "driver_calls.py", LD_LIBRARY_PATH=str(tmp_path), TRITON_LIBCUDA_PATH=str(tmp_path),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip


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
    done = python("-c", COST)
    assert done.stdout.splitlines() == [
        f"{way} launches of 1, {direction}"
        for direction in ("forward", "backward")
        for way in ("dispatched", "remembered")
    ], done.stderr
