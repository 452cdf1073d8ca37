"""What lora_linear refuses: tensors that do not fit, second derivatives, torch.func, traces.

Values of wrong types are in tests/test_public_arguments.py.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels import FusedLoRALinear, lora_linear
from lora_kernels.algebra.operands import PackWeights, Settings
from lora_kernels.algebra.packs import Pack
from lora_kernels.autograd.packs import packed_linears
from tests.support.oracle import Case, inputs


@pytest.mark.usefixtures("many_tokens")  # few have torch's own derivatives: test_few.py
def test_a_second_derivative_is_refused():
    given = inputs(Case(M=5, N=4, K=6, R=2), torch.float64)
    y = lora_linear(given.x, given.weight, given.lora_A, given.lora_B)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), given.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):  # where zeros were no error
        torch.autograd.functional.hessian(
            lambda x: lora_linear(x, given.weight, given.lora_A, given.lora_B).square().sum(),
            given.x,
        )


def test_torch_func_is_refused_in_words():
    given = inputs(Case(M=5, N=4, K=6, R=2), torch.float32)

    def loss(lora_A):
        return lora_linear(given.x, given.weight, lora_A, given.lora_B).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(given.lora_A.detach())


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_is_refused_in_words(training):
    layer = FusedLoRALinear(6, 4, rank=2).train(training)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a LoRA layer: merge"):
        torch.jit.trace(layer, torch.zeros(3, 6))
    layer.merge()
    torch.jit.trace(layer, torch.zeros(3, 6))


def bad(**changes):
    """A fitting call with some arguments replaced."""
    arguments = {
        "x": torch.zeros(2, 6), "weight": torch.zeros(4, 6),
        "lora_A": torch.zeros(3, 6), "lora_B": torch.zeros(4, 3), "bias": torch.zeros(4),
    }  # fmt: skip
    arguments.update(changes)
    return arguments


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x has 5 features.*K = 6"),
        (
            {"lora_A": torch.zeros(0, 6), "lora_B": torch.zeros(4, 0)},
            ValueError,
            r"rank must be at least 1",
        ),
        ({"lora_A": torch.zeros(3, 5)}, ValueError, r"lora_A must be \[3, 6\].*got \[3, 5\]"),
        ({"lora_B": torch.zeros(4, 2)}, ValueError, r"lora_B \[4, 3\].*\[4, 2\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[4\]: got \[5\]"),
        (
            {"weight": torch.zeros(4, 6, dtype=torch.float16)},
            TypeError,
            r"x is torch.float32 but weight",
        ),
        ({"lora_A": torch.zeros(3, 6, device="meta")}, ValueError, r"share one device.*meta"),
        ({"weight": torch.zeros(6)}, ValueError, r"two: got \[2, 6\], \[6\]"),
    ],
)
def test_bad_input_gets_one_error_that_names_the_values(changes, error, words):
    with pytest.raises(error, match=words):
        lora_linear(**bad(**changes))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_torch_func_is_refused_in_words_for_several_adapters(transform):
    pack = Pack((0, 2, 5), (2, 2), (1.0, 1.0), (0.0, 0.0), names=("a", "b"))
    lora_A, lora_B = (torch.ones(2, 6),) * 2, (torch.ones(4, 2),) * 2
    weights = PackWeights(torch.ones(4, 6), None, lora_A, lora_B)
    settings = Settings(1.0, 0.0, "library", pack=pack)

    def loss(x):
        return packed_linears(x, (weights,), settings)[0].sum()

    with pytest.raises(RuntimeError, match=r"several adapters has no rules for torch\.func"):
        transform(loss)(torch.ones(5, 6) if transform is torch.func.grad else torch.ones(3, 5, 6))
