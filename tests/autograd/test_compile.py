"""torch.compile: one graph with no break, the eager numbers, sound operator registrations."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from lora_kernels import STRATEGIES, FusedLoRALinear, LoRAConfig, add_lora, lora_linear
from lora_kernels.algebra import masks
from lora_kernels.algebra.operands import Operands, Settings, Weights
from lora_kernels.autograd import operators
from tests.support.oracle import DEVICE, Case, inputs, run


def arguments(dtype=torch.float32, dropout=0.0, G=2, strategy="library"):
    given = [inputs(Case(M=20, N=24, K=16, R=3), dtype, seed) for seed in range(G)]
    layers = [Weights(m.weight, m.bias, m.lora_A, m.lora_B) for m in given]
    seed = torch.tensor([7], device=DEVICE) if dropout else None
    return given[0].x, *operators.flattened(Operands.of(layers)), seed, 0.5, dropout, strategy, [0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["plain", "dropout"])
def test_opcheck(dropout, strategy):
    torch.library.opcheck(operators.forward, arguments(dropout=dropout, strategy=strategy))


def test_opcheck_on_columns():
    x, (weight, *_), _, seed, scale, dropout, strategy, _ = arguments(dropout=0.25, G=1)
    lora_A = torch.randn(2 * 3, 16, device=DEVICE, requires_grad=True)
    lora_B = torch.randn(5 + 9, 3, device=DEVICE, requires_grad=True)
    operands = operators.flattened(Operands.of([Weights(weight, None, lora_A, lora_B)]))
    call = x, *operands, seed, scale, dropout, strategy, [2, 2, 7, 11, 20]
    torch.library.opcheck(operators.forward, call)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_operator_is_the_function(strategy):
    case = Case(M=33, N=24, K=16, R=3, dropout=0.25)
    given = inputs(case, torch.float32)

    def operator(x, weight, lora_A, lora_B, bias):
        operands = Operands.of([Weights(weight, bias, lora_A, lora_B)])
        settings = Settings(0.75, 0.25, strategy)
        return operators.call(x, operands, settings, masks.draw_seed(DEVICE))[0]

    def function(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x, weight, lora_A, lora_B, bias=bias, scale=0.75, dropout=0.25, strategy=strategy
        )

    results = []
    for layer in (operator, function):
        torch.manual_seed(0)
        results.append(run(given, layer))
    for name in results[1]:
        assert torch.equal(results[0][name], results[1][name]), name
        assert results[0][name].abs().sum() > 0


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def gradients(y, model, x):
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(y.float().square().sum(), wanted)


@pytest.mark.parametrize("strategy", ["auto", "split", "fused"])
@pytest.mark.parametrize("group", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_a_transformer_block_is_one_graph(family, group, strategy):
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "roberta":
        config = transformers.RobertaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attn_implementation="eager", **size,
        )  # fmt: skip
        model = transformers.RobertaModel(config, add_pooling_layer=False)
        block = model.encoder.layer[0]
    else:
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0,
            attn_implementation="eager",
        )  # fmt: skip
        model = transformers.GPT2Model(config)
        block = model.h[0]
    model.to(DEVICE)
    add_lora(model, LoRAConfig(rank=3, targets="all-linear", group=group, strategy=strategy))
    for layer in model.modules():
        if isinstance(layer, FusedLoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    fast = compiled(block)
    for length in (5, 9):  # a second length makes the graph dynamic; it must not break
        x = torch.randn(2, length, 16, device=DEVICE, requires_grad=True)
        expected, actual = first(block(x)), first(fast(x))
        torch.testing.assert_close(actual, expected)
        for a, e in zip(gradients(actual, block, x), gradients(expected, block, x), strict=True):
            torch.testing.assert_close(a, e)
            assert a.abs().sum() > 0
    assert not block.training or len(list(block.parameters())) > 0


def test_compiled_dropout_is_fresh_in_every_call_and_layer():
    layer = FusedLoRALinear(16, 16, rank=16, dropout=0.5, device=DEVICE)
    nn.init.eye_(layer.lora_A)
    nn.init.eye_(layer.lora_B)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x), self.layer(x)

    fast = compiled(Twice())
    x = torch.ones(8, 16, device=DEVICE)
    first, second = fast(x)
    again, _ = fast(x)
    assert not torch.equal(first, second)
    assert not torch.equal(first, again)


def test_compiled_autocast_reads_the_weight_as_it_is():
    layer = FusedLoRALinear(16, 24, rank=3, strategy="library", device=DEVICE)
    nn.init.normal_(layer.lora_B)
    fast = compiled(layer)
    x = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        expected = layer(x)
        for _ in range(3):
            actual = fast(x)
    torch.testing.assert_close(actual, expected)
    assert actual.dtype == torch.bfloat16
    layer.weight.data.add_(1)  # behind the version counter
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        torch.testing.assert_close(fast(x), layer(x))
        assert not torch.equal(fast(x), actual)


class Attention(nn.Module):
    """q and v read one x as a group; c_attn has LoRA on two ranges of its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.c_attn = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x):
        return self.q(x) * self.v(x) + self.c_attn(x)


def exported():
    """A model with LoRA of every kind, and its graph, whose number of rows is free."""
    torch.manual_seed(0)
    model = Attention().eval().to(DEVICE)
    add_lora(model, LoRAConfig(rank=3, targets=("q", "v")))
    model.c_attn = FusedLoRALinear.from_linear(model.c_attn, rank=3, columns=[(0, 8), (16, 24)])
    for layer in (model.q, model.v, model.c_attn):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 16, device=DEVICE)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        return model, torch.export.export(model, (x,), dynamic_shapes=({0: rows},))


@torch.no_grad()
def test_an_exported_graph_is_saved_and_gives_the_same(tmp_path):
    model, graph = exported()
    torch.export.save(graph, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (2, 33):
        x = torch.randn(rows, 16, device=DEVICE)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@torch.no_grad()
def test_aot_inductor(tmp_path):
    """Its runtime hands an operator None for an empty list."""
    model, graph = exported()
    package = torch._inductor.aoti_compile_and_package(graph, package_path=str(tmp_path / "m.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for rows in (2, 33):
        x = torch.randn(rows, 16, device=DEVICE)
        torch.testing.assert_close(loaded(x), model(x))
