"""lora_linear: every strategy, every output and gradient, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import STRATEGIES, lora_linear
from lora_kernels.algebra import reference
from lora_kernels.algebra.operands import Operands, Settings, Weights
from lora_kernels.autograd import operators
from lora_kernels.autograd.functional import lora_linears
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem
from tests.support.oracle import DEVICE, Case, inputs, judge, judge_layer, run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES = [
    Case(M=129, N=96, K=80, R=8),
    Case(M=129, N=71, K=45, R=3, dropout=0.1),
    Case(M=17, N=64, K=128, R=12, bias=False),
    Case(M=64, N=33, K=64, R=1, dropout=0.5, weight="conv1d"),
    Case(M=40, N=96, K=32, R=64, dropout=0.25, bias=False, weight="conv1d"),
    Case(M=130, N=48, K=50, R=5, x="strided", dropout=0.1),
    Case(M=65, N=40, K=72, R=16, x="transposed", weight="conv1d"),
    Case(M=48, N=56, K=64, R=3, adapter=torch.float32, dropout=0.1),
    Case(M=1, N=19, K=23, R=3, dropout=0.3),
    Case(M=300, N=5, K=300, R=4, weight="conv1d"),  # few columns of y, then of dx
    Case(M=300, N=300, K=5, R=4),
]
# float16 x and dy, float32 adapters: what is small or large in float16 is neither in float32.
RANGE = [
    Case(M=65, N=96, K=80, R=8, adapter=torch.float32, **sizes)
    for sizes in (
        {},
        {"B": 0.0},
        {"B": 1e-4, "dy": 1e-4},
        {"B": 1e-6, "dropout": 0.1},
        {"B": 1e-4, "dy": 2e-6, "dropout": 0.1},
        {"B": 1e4, "scale": 1e-4},
        {"B": 1e-4, "scale": 1e4, "weight": "conv1d"},
    )
] + [
    Case(M=1024, N=40, K=48, R=8, adapter=torch.float32, B=0.5, dy=40.0, agree=True),
    Case(M=65, N=40, K=48, R=8, adapter=torch.bfloat16, B=1e-6, dy=1e-4),
    Case(M=65, N=40, K=48, R=8, adapter=torch.float64, B=1e-6, dy=1e-4),
]


def call(case: Case, strategy: str):
    def layer(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x, weight, lora_A, lora_B,
            bias=bias, scale=case.scale, dropout=case.dropout, strategy=strategy,
        )  # fmt: skip

    return layer


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_every_gradient(case, dtype, strategy):
    problem = Problem.on(DEVICE, case.M, case.N, case.K, case.R, dtype, dropout=case.dropout > 0)
    assert choose(problem, strategy).strategy == strategy, choose(problem, strategy).reason
    judge_layer(call(case, strategy), case, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", RANGE, ids=str)
def test_float16_loses_no_range_of_wider_adapters(case, strategy):
    judge_layer(call(case, strategy), case, torch.float16)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("columns", [None, ((0, 32), (40, 72))], ids=["group", "columns"])
def test_a_group_loses_no_range_of_wider_adapters(columns, strategy):
    """Siblings, and ranges of one weight's columns, give what each gives as a layer of its own."""
    parts = [
        inputs(Case(M=65, N=32, K=48, R=8, adapter=torch.float32, B=1e-4), torch.float16, seed)
        for seed in (0, 1)
    ]
    x, dy = parts[0].x, [part.dy * 1e-4 for part in parts]
    expected = []
    for part, each in zip(parts, dy, strict=True):
        y = lora_linear(x, part.weight, part.lora_A, part.lora_B, scale=2.0, strategy=strategy)
        expected += torch.autograd.grad(y, (part.lora_A, part.lora_B), each)
    if columns is None:
        layers = tuple(Weights(part.weight, None, part.lora_A, part.lora_B) for part in parts)
        y = lora_linears(x, layers, Settings(2.0, 0.0, strategy))
    else:
        (a, b), gap = parts, parts[0].weight[:8]
        weight = torch.cat((a.weight, gap, b.weight, gap))
        lora_A, lora_B = torch.cat((a.lora_A, b.lora_A)), torch.cat((a.lora_B, b.lora_B))
        layers = (Weights(weight, None, lora_A, lora_B),)
        (whole,) = lora_linears(x, layers, Settings(2.0, 0.0, strategy, columns))
        y = tuple(whole[:, start:stop] for start, stop in columns)
    leaves = [leaf for part in parts for leaf in (part.lora_A, part.lora_B)]
    for actual, alone in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert (actual - alone).norm() <= 1e-3 * alone.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_float64_adapters(dtype, strategy):
    case = Case(M=40, N=24, K=32, R=3, adapter=torch.float64, dropout=0.1)
    judge_layer(call(case, strategy), case, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_have_the_dtype_of_their_parameters(strategy):
    case = Case(M=20, N=24, K=16, R=3, adapter=torch.float32)
    given = inputs(case, torch.float16)
    actual = run(given, call(case, strategy))
    dtypes = {name: tensor.dtype for name, tensor in actual.items()}
    half, full = torch.float16, torch.float32
    assert dtypes == {"y": half, "dx": half, "dlora_A": full, "dlora_B": full, "dbias": half}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_empty_batch_gives_zero_gradients(strategy):
    case = Case(M=0, N=24, K=16, R=3, dropout=0.1)
    actual = run(inputs(case, torch.float32), call(case, strategy))
    assert actual["y"].shape == (0, 24) and actual["dx"].shape == (0, 16)
    for name in ("dlora_A", "dlora_B", "dbias"):
        assert (actual[name] == 0).all(), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leading_dimensions_and_an_expanded_gradient(strategy):
    case = Case(M=30, N=24, K=16, R=3)
    given = inputs(case, torch.float32)
    flat = call(case, strategy)(given.x, given.weight, given.lora_A, given.lora_B, given.bias)
    deep_x = given.x.detach().view(2, 3, 5, 16).requires_grad_()
    deep = call(case, strategy)(deep_x, given.weight, given.lora_A, given.lora_B, given.bias)
    assert deep.shape == (2, 3, 5, 24)
    assert torch.equal(deep.view(30, 24), flat)
    (dx,) = torch.autograd.grad(deep.sum(), deep_x)
    (ones_dx,) = torch.autograd.grad(flat, given.x, torch.ones_like(flat))
    torch.testing.assert_close(dx.view(30, 16), ones_dx)
    assert ones_dx.abs().sum() > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "wanted", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "lora_B")], ids="-".join
)
def test_only_the_gradients_asked_for(strategy, wanted):
    case = Case(M=33, N=24, K=40, R=3, dropout=0.2)
    given = inputs(case, torch.float32)
    torch.manual_seed(5)
    every = run(given, call(case, strategy))
    for name in ("x", "lora_A", "lora_B", "bias"):
        getattr(given, name).requires_grad_(name in wanted)
    torch.manual_seed(5)
    y = call(case, strategy)(given.x, given.weight, given.lora_A, given.lora_B, given.bias)
    saved = [t is not None for t in y.grad_fn.saved_tensors]
    assert saved[0] == ("lora_A" in wanted), "x is saved only for dlora_A"
    y.backward(given.dy)
    for name in ("x", "lora_A", "lora_B", "bias"):
        gradient = getattr(given, name).grad
        assert (gradient is not None) == (name in wanted)
        if gradient is not None:
            torch.testing.assert_close(gradient, every[f"d{name}"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_dropped_outside_training(strategy):
    case = Case(M=20, N=24, K=16, R=3, dropout=0.5)
    given = inputs(case, torch.float32)
    arguments = (given.x, given.weight, given.lora_A, given.lora_B)
    options = {"bias": given.bias, "scale": 0.5, "strategy": strategy}
    evaluated = lora_linear(*arguments, dropout=0.5, training=False, **options)
    assert torch.equal(evaluated, lora_linear(*arguments, **options))
    assert not torch.equal(evaluated, lora_linear(*arguments, dropout=0.5, **options))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_call_gives_the_same_bits(strategy):
    case = Case(M=150, N=40, K=72, R=8, dropout=0.1)
    given = inputs(case, torch.float16)
    results = []
    for _ in range(2):
        torch.manual_seed(9)
        results.append(run(given, call(case, strategy)))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointing_recomputes_the_same_mask(strategy):
    case = Case(M=40, N=24, K=32, R=4, dropout=0.5)
    given = inputs(case, torch.float32)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(
            call(case, strategy), *arguments, use_reentrant=False
        )

    torch.manual_seed(4)
    plain = run(given, call(case, strategy))
    torch.manual_seed(4)
    again = run(given, checkpointed)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_is_the_half_precision_layer(strategy, dtype):
    """fp32 tensors under autocast give what half x and weight with fp32 adapters give."""
    case = Case(M=40, N=24, K=32, R=3, adapter=torch.float32)
    half = inputs(case, dtype)
    wide = inputs(case, dtype)
    wide.x = half.x.detach().float().requires_grad_()
    wide.weight = half.weight.float()
    expected = run(half, call(case, strategy))
    with torch.autocast(DEVICE.type, dtype=dtype):
        actual = run(wide, call(case, strategy))
    assert actual["y"].dtype == dtype and actual["dx"].dtype == torch.float32
    for name in expected:
        torch.testing.assert_close(actual[name].float(), expected[name].float(), msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_backward_under_autocast_is_that_of_its_forward(strategy):
    case = Case(M=40, N=24, K=16, R=3)
    given = inputs(case, torch.float32)
    expected = run(given, call(case, strategy))
    with torch.autocast(DEVICE.type, torch.bfloat16):

        def outside(*arguments):
            with torch.autocast(DEVICE.type, enabled=False):
                return call(case, strategy)(*arguments)

        actual = run(given, outside)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bias_of_any_stride(strategy):
    case = Case(M=40, N=24, K=16, R=3)
    given = inputs(case, torch.float32)
    spread = torch.full((24, 2), torch.nan, device=DEVICE)
    spread[:, 0] = given.bias.detach()
    expected = run(given, call(case, strategy))
    given.bias = spread[:, 0].detach().requires_grad_()
    assert given.bias.stride() == (2,)
    actual = run(given, call(case, strategy))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_the_caller_s_tensors_are_left_alone():
    case = Case(M=33, N=24, K=40, R=3, dropout=0.2)
    given = inputs(case, torch.float32)
    before = [
        t.detach().clone() for t in (given.x, given.weight, given.lora_A, given.lora_B, given.dy)
    ]
    for strategy in STRATEGIES:
        run(given, call(case, strategy))
    after = (given.x, given.weight, given.lora_A, given.lora_B, given.dy)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_float64_passes_gradcheck_through_the_library():
    case = Case(M=5, N=4, K=6, R=2)
    given = inputs(case, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: lora_linear(x, given.weight, a, b, bias=bias, scale=0.7),
        (given.x, given.lora_A, given.lora_B, given.bias),
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["function", "operator"])
def test_a_weight_that_is_not_frozen_gets_its_gradient(compiled):
    given = inputs(Case(M=20, N=24, K=16, R=3), torch.float32)
    weight = given.weight.requires_grad_()
    leaves = (given.x, weight, given.lora_A, given.lora_B, given.bias)

    def layer(x, weight, lora_A, lora_B, bias):
        if compiled:
            operands = Operands.of([Weights(weight, bias, lora_A, lora_B)])
            return operators.call(x, operands, Settings(0.5, strategy="library"), None)[0]
        return lora_linear(x, weight, lora_A, lora_B, bias=bias, scale=0.5)

    for wanted in (leaves, (weight,)):
        actual = torch.autograd.grad(layer(*leaves), wanted, given.dy)
        y = reference.forward(*leaves[:4], bias=given.bias, scale=0.5)
        expected = torch.autograd.grad(y, wanted, given.dy)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
            assert a.abs().sum() > 0
    given.lora_A.requires_grad_(False)  # then x is saved for the weight alone
    (dweight,) = torch.autograd.grad(layer(*leaves), weight, given.dy)
    torch.testing.assert_close(dweight, given.dy.T @ given.x)


def test_a_zero_B_gives_the_frozen_layer_and_a_gradient_to_B_alone():
    given = inputs(Case(M=20, N=24, K=16, R=3), torch.float32)
    given.lora_B.data.zero_()
    for strategy in STRATEGIES:
        actual = run(given, call(Case(M=20, N=24, K=16, R=3), strategy))
        frozen = torch.nn.functional.linear(
            given.x.double(), given.weight.double(), given.bias.double()
        )
        judge(
            "y", actual["y"], torch.nn.functional.linear(given.x, given.weight, given.bias), frozen
        )
        assert (actual["dlora_A"] == 0).all()
        assert actual["dlora_B"].abs().min() > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_output_can_be_changed_in_place(strategy):
    """As any layer's: with leading dimensions it is no view that torch refuses to change."""
    case = Case(M=30, N=24, K=16, R=3)
    given = inputs(case, torch.float32)
    arguments = given.weight, given.lora_A, given.lora_B
    gradients = []
    for shape, in_place in (((30,), False), ((30,), True), ((2, 3, 5), True)):
        x = given.x.detach().view(*shape, 16).requires_grad_()
        y = lora_linear(x, *arguments, scale=0.5, strategy=strategy)
        assert y.grad_fn is not None and y.shape == (*shape, 24) and y.is_contiguous()
        y = torch.relu_(y.mul_(2)) if in_place else torch.relu(y * 2)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, given.lora_A]))
    for expected, *others in zip(*gradients, strict=True):
        assert expected.abs().sum() > 0
        for actual in others:
            assert torch.equal(actual.view(expected.shape), expected)


def test_one_row_without_leading_dimensions():
    case = Case(M=1, N=24, K=16, R=3)
    given = inputs(case, torch.float32)
    x = given.x.detach()[0].requires_grad_()
    y = lora_linear(x, given.weight, given.lora_A, given.lora_B, bias=given.bias, scale=0.5)
    assert y.shape == (24,)
    (dx,) = torch.autograd.grad(y, x, given.dy[0])
    row = lora_linear(given.x, given.weight, given.lora_A, given.lora_B, bias=given.bias, scale=0.5)
    assert torch.equal(y, row[0])
    assert torch.equal(dx, torch.autograd.grad(row, given.x, given.dy)[0][0])
