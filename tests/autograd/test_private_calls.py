"""Where torch lacks a private call of ours, the public way gives the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.autograd import function
from lora_kernels.training import captures

ROOT = Path(__file__).resolve().parents[2]
# A layer of many tokens and one of few, with dropout; then what torch.func is told.
RUN = """
import torch
{removed}
from lora_kernels import lora_linear
import lora_kernels.autograd.function as function
for M in (3, 10000):
    torch.manual_seed(M)
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((M, 8), (3, 8), (12, 3)))
    weight = torch.randn(12, 8)
    for given in (x, x.view(1, M, 8)):
        y = lora_linear(given, weight, A, B, dropout=0.25)
        y.mul_(2)  # which a plain view made inside a Function would refuse
        found = y, *torch.autograd.grad(y.sum(), (x, A, B))
        print([t.double().sum().item().hex() for t in found])
    try:
        torch.func.vmap(lambda x: lora_linear(x, weight, A, B))(x.detach().view(M, 1, 8))
    except RuntimeError:
        print("refused")
print("public:", function.apply == function.LoRALinears.apply)
"""


def run(removed: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(removed=removed)], capture_output=True, text=True,
        check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_the_look_at_transforms():
    *usual, public = run("")
    assert public == "public: False" and usual.count("refused") == 2
    *without, public = run("del torch._C._functorch.peek_interpreter_stack")
    # The few tokens run by the Function as well, since torch.func would not be refused there.
    assert public == "public: True" and without[3:] == usual[3:]
    assert without.count("refused") == 2 and len(without) == len(usual)


def test_without_an_inner_apply(monkeypatch):
    class Inner:
        apply = staticmethod(lambda: "inner")

    for bases, said in (((Inner,), "inner"), ((), "public")):
        public = type("Public", bases, {"apply": staticmethod(lambda: "public")})
        monkeypatch.setattr(torch.autograd, "Function", public)
        assert function.fastest_apply(type("Made", (public,), {}))() == said


def test_without_the_operator_of_a_view(monkeypatch):
    rows = torch.randn(6, 4)
    shaped = function.shaped(rows, torch.Size((2, 3)))
    monkeypatch.setattr(function, "_UNSAFE_VIEW", None)
    assert torch.equal(function.shaped(rows, torch.Size((2, 3))), shaped)


@pytest.mark.parametrize("name", ["copy_", "add_"])
def test_without_foreach(name, monkeypatch):
    found = []
    for _ in range(2):
        targets, values = ([torch.full((2,), n) for n in ns] for ns in ((1.0, 2.0), (3.0, 5.0)))
        captures._each(name, targets, values)
        found.append(targets)
        monkeypatch.delattr(torch, f"_foreach_{name}", raising=False)
    assert all(map(torch.equal, *found)) and found[0][0][0] == (3 if name == "copy_" else 4)


def test_without_fake_tensors():
    code = (
        "import sys, torch; from torch import nn; sys.modules['torch._subclasses'] = None; "
        "from lora_kernels.injection.bypassed import *; from lora_kernels.layers import base; "
        "print(base._PLAIN == (nn.Parameter, torch.Tensor))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr


def test_the_look_at_transforms_is_torchs_own():
    assert function.TRANSFORMS is torch._C._functorch.peek_interpreter_stack
