"""Few tokens on a CPU: torch's own gradients, the same layer."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from lora_kernels import FusedLoRALinear, explain, lora_linear
from lora_kernels.algebra.operands import Settings, Weights
from lora_kernels.algebra.packs import Pack
from lora_kernels.autograd import few
from lora_kernels.autograd.functional import lora_linears
from lora_kernels.layers import linear
from lora_kernels.layers.group import Group, problem_of
from lora_kernels.strategies.problem import FEW_ELEMENTS


def tensors(*shape: int, bias: bool = True, dtype: torch.dtype = torch.float64):
    """x [..., K], and weight (strided), bias, lora_A and lora_B of a layer with N = 12, R = 3."""
    K = shape[-1]
    draw = torch.Generator().manual_seed(1)
    sizes = (shape, (K, 12), (3, K), (12, 3), (12,))
    x, weight, lora_A, lora_B, b = (torch.randn(s, generator=draw, dtype=dtype) for s in sizes)
    for trained in (x, lora_A, lora_B):
        trained.requires_grad_()
    return x, weight.T, lora_A, lora_B, b if bias else None


def takes(x: torch.Tensor, *, adapters: torch.dtype | None = None, **changes):
    weights = Weights(
        torch.empty(12, x.shape[-1], dtype=x.dtype), None,
        *(torch.empty(s, dtype=adapters or x.dtype) for s in ((3, x.shape[-1]), (12, 3))),
    )  # fmt: skip
    return few.takes(x, (weights,), Settings(**changes))


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (2, 3, 8), (8,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_that_of_the_library(shape, bias):
    x, weight, lora_A, lora_B, b = tensors(*shape, bias=bias)
    found = []
    for strategy in ("auto", "library"):
        y = lora_linear(x, weight, lora_A, lora_B, bias=b, scale=1.5, strategy=strategy)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append((y, *torch.autograd.grad(y, (x, lora_A, lora_B), dy)))
    nodes = [type(each[0].grad_fn).__name__ for each in found]
    assert "LoRALinears" not in nodes[0]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_is_on_the_low_rank_branch_and_the_same_in_backward():
    K = 64
    x = torch.rand(40, K).add_(1).requires_grad_()
    eye, weight = torch.eye(K), torch.zeros(K, K)
    torch.manual_seed(5)
    y = lora_linear(x, weight, eye, eye, scale=2.0, dropout=0.25)
    kept = y != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(y, torch.where(kept, x * 2 / 0.75, 0))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, kept * (2 / 0.75))
    torch.manual_seed(5)
    assert torch.equal(lora_linear(x, weight, eye, eye, scale=2.0, dropout=0.25), y)


def test_what_is_taken():
    assert takes(torch.empty(FEW_ELEMENTS // 8, 8)) and not takes(
        torch.empty(FEW_ELEMENTS // 8 + 1, 8)
    )
    x = torch.empty(4, 8)
    assert not takes(x, strategy="library") and not takes(x, columns=((0, 12),))
    assert not takes(x.half()) and not takes(x.to("meta"))
    for rows, taken in (
        (FEW_ELEMENTS // 8, True),
        (FEW_ELEMENTS // 8 + 1, False),
    ):  # each adapter has few
        pack = Pack((0, rows, rows + 2), (3, 3), (1.0, 1.0), (0.0, 0.0))
        assert takes(torch.empty(rows + 2, 8), pack=pack) is taken
    half = x.bfloat16()
    assert takes(half) and takes(half, adapters=torch.float32)
    assert not takes(half, adapters=torch.float16)


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)], ids=str)
def test_a_second_derivative_is_that_of_the_formula(shape):
    x, weight, lora_A, lora_B, _ = tensors(*shape)
    F, leaves = nn.functional.linear, (x, lora_A, lora_B)
    found = []
    for y in (
        lora_linear(x, weight, lora_A, lora_B, scale=0.5),
        F(x, weight) + 0.5 * F(F(x, lora_A), lora_B),
    ):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert all(g.abs().sum() > 0 for g in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)], ids=str)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_short_way_of_a_layer_is_the_long_one(shape, dropout, conv1d, autocast, monkeypatch):
    base = Conv1D(12, 8) if conv1d else nn.Linear(8, 12)
    layer = FusedLoRALinear.from_linear(base, rank=3, alpha=6, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    x, found = torch.randn(shape), []
    for way in (few.few_layer, lambda *_: None):
        monkeypatch.setattr(linear, "few_layer", way)
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert (way(leaf, layer) is None) == bool(found)
            torch.manual_seed(3)
            y = layer(leaf)
        assert y.dtype is (torch.bfloat16 if autocast else torch.float32)
        grads = torch.autograd.grad(y.square().sum(), (leaf, layer.lora_A, layer.lora_B))
        found.append((y.detach(), *grads))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.merge(),
        lambda layer: setattr(layer, "strategy", "library"),
        lambda layer: setattr(layer, "disabled", True),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.bias.requires_grad_(),
        lambda layer: layer.double(),
        lambda layer: setattr(layer.lora_A, "data", torch.randn(2, 8)),
        lambda layer: setattr(layer.lora_B, "data", torch.randn(1, 3)),
        lambda layer: setattr(layer.weight, "data", torch.randn(1, 8)),
        lambda layer: setattr(layer.bias, "data", torch.randn(1)),
        lambda layer: setattr(layer, "dropout", 1.0),
    ],
    ids=["merged", "strategy", "disabled", "weight-trains", "bias-trains", "float64", "lora_A",
         "lora_B", "weight", "bias", "dropout"],
)  # fmt: skip
def test_the_short_way_is_for_common_calls(change):
    layer = FusedLoRALinear(8, 12, rank=3)
    x = torch.randn(4, 8)
    assert few.few_layer(x, layer) is not None
    with torch.autocast("cpu", torch.float16):
        assert few.few_layer(x, layer) is None
    for other in (
        torch.randn(4, 9),
        x.int(),
        nn.Parameter(x),
        x.tolist(),
        torch.randn(FEW_ELEMENTS, 8),
    ):
        assert few.few_layer(other, layer) is None
    change(layer)
    assert few.few_layer(x, layer) is None


@pytest.mark.parametrize("strategy", ["auto", "library"])
def test_siblings_of_few_tokens_run_one_by_one(strategy):
    query, *others = [FusedLoRALinear(8, 8, rank=3, strategy=strategy) for _ in range(3)]
    group = query.group = Group([query, *others])
    x, y = torch.randn(5, 8), torch.randn(FEW_ELEMENTS // 8 + 1, 8)
    query(x)
    assert (group._waiting is None) == (strategy == "auto")
    assert problem_of(query, len(x)).segments == (1 if strategy == "auto" else 3)
    group.parent_called()
    query(y)
    assert group._waiting is not None and problem_of(query, len(y)).segments == 3


def test_explain_says_so():
    layer = FusedLoRALinear(8, 12, rank=3)
    assert "torch's own gradients" in str(explain(layer, tokens=4))
    assert "torch's own gradients" not in str(explain(layer, tokens=FEW_ELEMENTS))


def test_one_row_of_query_key_and_value_rounds_no_more_than_eager_code():
    K = 768
    errors: dict[str, list[torch.Tensor]] = {"ours": [], "eager": []}
    for seed in range(4):
        torch.manual_seed(seed)
        x, dy = torch.randn(1, K), torch.randn(1, K)
        layers = tuple(
            Weights(torch.randn(K, K), None, torch.randn(8, K), torch.randn(K, 8)) for _ in range(3)
        )
        dx = {}
        for name, dtype in (("ours", None), ("eager", None), ("exact", torch.float64)):
            leaf = x.clone().to(dtype or x.dtype).requires_grad_()
            if name == "ours":
                ys = lora_linears(leaf, layers, Settings(strategy="library"))
            else:
                each = [[t if t is None else t.to(leaf) for t in w] for w in layers]
                ys = [leaf @ w.T + leaf @ a.T @ b.T for w, _, a, b in each]
            (dx[name],) = torch.autograd.grad(ys, leaf, [dy.to(leaf)] * 3)
        for name, found in errors.items():
            found.append(dx[name].double() - dx["exact"])
    ours, eager = (torch.cat(found).square().mean().sqrt() for found in errors.values())
    assert ours <= 1.1 * eager


def compiled(module: nn.Module, backend: str) -> tuple[nn.Module, list[str]]:
    """The module under torch.compile, and the names of what its first graph calls."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    fast, called = torch.compile(module, backend=counter), []

    def run(x: torch.Tensor) -> torch.Tensor:
        y = fast(x)
        nodes = counter.graphs[0].graph.nodes
        called[:] = [str(node.target) for node in nodes if node.op == "call_function"]
        return y

    return run, called


@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_sees_the_formula(backend, dropout):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    layer = FusedLoRALinear(16, 12, rank=3, alpha=12, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    fast, called = compiled(layer, backend)
    x = torch.randn(5, 16, requires_grad=True)
    leaves = x, layer.lora_A, layer.lora_B
    y = fast(x)
    assert called and not [name for name in called if "lora_kernels" in name]
    found = y, *torch.autograd.grad(y.square().sum(), leaves)
    if dropout:  # by masks of torch's own, which differ from call to call
        assert not torch.equal(fast(x), y) and all(t.abs().sum() > 0 for t in found)
        layer.eval()
        y = fast(x)
        found = y, *torch.autograd.grad(y.square().sum(), leaves)
    y = layer(x)
    for a, b in zip(found, (y, *torch.autograd.grad(y.square().sum(), leaves)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_dynamic_shape_has_many_tokens():
    """A guard on their number would be a second graph, or an error under torch.export."""
    layer = FusedLoRALinear(16, 12, rank=3)
    fast, called = compiled(layer, "aot_eager")
    x = torch.randn(5, 16)
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(fast(x), layer(x))
    assert [name for name in called if "lora_kernels" in name]
