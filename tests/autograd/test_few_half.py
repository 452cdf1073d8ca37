"""Few tokens in bfloat16 on a CPU: rank-sized products in float32, frozen weights not cast."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import FusedLoRALinear
from lora_kernels.algebra.operands import PackWeights, Settings, Weights
from lora_kernels.algebra.packs import Pack
from lora_kernels.autograd import few
from lora_kernels.autograd.autocast import casting_off
from lora_kernels.autograd.functional import lora_linears
from lora_kernels.autograd.packs import packed_linears
from lora_kernels.layers import linear
from tests.support.oracle import judge

HALF = torch.bfloat16


class Seen(TorchDispatchMode):
    """Which operators ran, with the shapes of what they took and the dtype of what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]], torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            shapes = [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]
            self.calls.append((function.overloadpacket.__name__, shapes, found.dtype))
        return found


def calls_of(graph: torch.fx.GraphModule) -> list[tuple[str, list[tuple[int, ...]], torch.dtype]]:
    """What `Seen` would see of a compiled graph; a dispatch mode turns torch.compile off."""
    return [
        (
            node.target.overloadpacket.__name__,
            [tuple(each.meta["val"].shape) for each in node.all_input_nodes],
            node.meta["val"].dtype,
        )
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def in_half(layer: FusedLoRALinear, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    """y, dx, dlora_A and dlora_B of a layer."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", HALF, enabled=autocast):
        y = layer(leaf)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (leaf, layer.lora_A, layer.lora_B), dy)]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("adapters", [torch.float32, HALF], ids=["fp32-adapters", "bf16-adapters"])
@pytest.mark.parametrize("rows", [1, few.FEW_ROWS, few.FEW_ROWS + 1])
def test_half_precision_rounds_no_more_than_eager_code(rows, adapters, autocast):
    found = []
    for seed in range(-(-64 // rows)):
        torch.manual_seed(seed)
        layer = FusedLoRALinear(48, 40, rank=4, alpha=8, bias=True)
        nn.init.normal_(layer.lora_B, std=0.5)
        layer.lora_A.data, layer.lora_B.data = (
            each.data.to(adapters) for each in (layer.lora_A, layer.lora_B)
        )
        if not autocast:
            layer.weight.data, layer.bias.data = layer.weight.to(HALF), layer.bias.detach().to(HALF)
        x = torch.randn(rows, 48).to(torch.float32 if autocast else HALF)

        def formula(x, w, b, A, B, layer=layer):
            F = nn.functional.linear
            return F(x, w, b) + layer.scale * F(F(x, A), B)

        given = [x, layer.weight, layer.bias, layer.lora_A, layer.lora_B]
        both = []
        for dtype in (torch.float64, HALF):
            leaves = [each.detach().to(dtype).requires_grad_() for each in given]
            y = formula(*leaves)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(HALF)
            wanted = leaves[0], *leaves[3:]
            both.append([y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))])
        ours = in_half(layer, x, autocast)
        assert [each.dtype for each in ours] == [HALF, x.dtype, adapters, adapters]
        found.append((ours, *reversed(both)))
    for i, name in enumerate(("y", "dx", "dlora_A", "dlora_B")):
        judge(name, *(torch.cat([each[k][i] for each in found]) for k in range(3)), 64 * 4)


@pytest.mark.parametrize("way", ["short", "long", "compiled"])
@pytest.mark.parametrize("rows", [few.FEW_ROWS, few.FEW_ROWS + 1])
def test_under_autocast_few_rows_cast_no_weight_and_small_products_are_float32(
    rows, way, monkeypatch
):
    layer = FusedLoRALinear(24, 20, rank=3, bias=True)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(rows, 24, requires_grad=True)
    if way == "long":
        monkeypatch.setattr(linear, "few_layer", lambda *_: None)
    graphs = AotEagerAndRecordGraphs()
    if way == "compiled":
        torch._dynamo.reset()
        layer = torch.compile(layer, backend=graphs)
    with nullcontext() if way == "compiled" else Seen() as seen:
        with torch.autocast("cpu", HALF):
            y = layer(x)
        y.sum().backward()
    assert y.dtype is HALF
    both = graphs.fw_graphs + graphs.bw_graphs
    calls = [each for graph in both for each in calls_of(graph)] if seen is None else seen.calls
    casts = [shapes for name, shapes, _ in calls if name == "_to_copy"]
    assert casts.count([(20, 24)]) == (rows > few.FEW_ROWS)
    products = [each for each in calls if each[0] in ("mm", "addmm")]
    assert len(products) == 8
    of_rank = [dtype for _, shapes, dtype in products if any(3 in shape for shape in shapes)]
    assert of_rank == [torch.float32] * 6


@pytest.mark.parametrize(
    ("rows", "ranks", "cast"),
    [((16, 5), (3, 2), False), ((17, 5), (3, 2), True), ((16, 5), (3, 0), True)],
    ids=["few", "one-has-more", "one-has-no-lora"],
)
def test_under_autocast_a_pack_casts_as_its_adapters_do_alone(rows, ranks, cast):
    weight, bias, x = torch.randn(20, 24), torch.randn(20), torch.randn(sum(rows), 24)
    lora_A = tuple([torch.randn(R, 24) if R else None for R in ranks])
    lora_B = tuple([torch.randn(20, R) if R else None for R in ranks])
    pack = Pack((0, rows[0], sum(rows)), ranks, (0.5, 2.0), (0.0, 0.0), ("a", "b"))
    layer = PackWeights(weight, bias, lora_A, lora_B)
    with torch.autocast("cpu", HALF):
        with Seen() as seen:
            (y,) = packed_linears(x, (layer,), Settings(pack=pack))
        casts = [shapes for name, shapes, _ in seen.calls if name == "_to_copy"]
        assert ([(20, 24)] in casts) == cast
        for c, own in enumerate(x.split(rows)):
            if ranks[c] and not cast:
                weights = Weights(weight, bias, lora_A[c], lora_B[c])
                (alone,) = lora_linears(own, (weights,), Settings((0.5, 2.0)[c]))
                torch.testing.assert_close(y.split(rows)[c], alone, rtol=2**-8, atol=1e-6)
    assert y.dtype is HALF


def test_a_backward_inside_of_autocast_gives_the_same_gradients_up_to_rounding():
    torch.manual_seed(0)
    layer = FusedLoRALinear(24, 20, rank=3)
    nn.init.normal_(layer.lora_B)
    x, found = torch.randn(5, 24), []
    for inside in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", HALF):
            y = layer(leaf)
        with torch.autocast("cpu", HALF, enabled=inside):
            found.append(torch.autograd.grad(y.sum(), (leaf, layer.lora_A, layer.lora_B)))
    for outside, inside in zip(*found, strict=True):
        ulp = torch.finfo(HALF).eps * outside.abs().max().item()
        torch.testing.assert_close(inside, outside, rtol=0, atol=4 * ulp)


@pytest.mark.parametrize("on", [True, False])
def test_autocast_is_as_before_after_a_call_that_fails(on):
    with torch.autocast("cpu", HALF, enabled=on):
        with pytest.raises(RuntimeError, match="planted"), casting_off():
            assert not torch.is_autocast_enabled("cpu")
            raise RuntimeError("planted")
        assert torch.is_autocast_enabled("cpu") == on


@pytest.mark.parametrize("way", ["short", "long", "pack"])
def test_autocast_leaves_float64_alone(way, monkeypatch):
    layer = FusedLoRALinear(24, 20, rank=3, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 24, dtype=torch.float64)
    expected = layer(x)
    if way == "long":
        monkeypatch.setattr(linear, "few_layer", lambda *_: None)
    with torch.autocast("cpu", HALF):
        if way == "pack":
            pack = Pack((0, 4), (3,), (layer.scale,), (0.0,), ("a",))
            weights = PackWeights(layer.weight, layer.bias, (layer.lora_A,), (layer.lora_B,))
            (y,) = packed_linears(x, (weights,), Settings(pack=pack))
        else:
            y = layer(x)
    torch.testing.assert_close(y, expected)
