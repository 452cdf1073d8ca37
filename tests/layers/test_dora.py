"""DoRA and lora_bias against PEFT: values, gradients, dropout, starts, files, merging."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    add_lora,
    explain,
    fuse_peft,
    load_adapter,
    save_adapter,
)
from lora_kernels import merge as merged
from lora_kernels.algebra.operands import Parts, Settings, Weights
from lora_kernels.autograd import gain
from lora_kernels.injection.inject import fused_layers
from lora_kernels.layers import dora
from lora_kernels.strategies.problem import interpreting, triton_kernels
from tests.adapters.test_load_save import CONFIG, WEIGHTS, from_peft, injected
from tests.support import zoo
from tests.support.oracle import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KINDS = {"dora": {"dora": True}, "lora-bias": {"lora_bias": True}}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def scattered(model: nn.Module) -> nn.Module:
    """The model with magnitudes that are not what they start as."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape))
    return model


@pytest.fixture
def by_kernels(monkeypatch):
    """On DEVICE the gain is made by kernels: on a CPU by Triton's interpreter."""
    if DEVICE.type == "cpu" and not interpreting():
        pytest.skip("the kernels need a GPU, or TRITON_INTERPRET=1")
    launched = []
    whole = triton_kernels().row_gains
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gain, "_takes", lambda *_: True)
    monkeypatch.setattr(
        triton_kernels(), "row_gains", lambda *a, **k: launched.append(1) or whole(*a, **k)
    )
    yield
    assert launched


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_gain_is_pefts(dropout, dtype):
    if dropout and DEVICE.type == "cuda":
        pytest.skip("there torch's masks depend on the dtype, and float64 has others")
    test_a_layer_is_pefts_with_the_same_masks("use_dora", dropout, dtype, DEVICE)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="its models are on a CPU")
@pytest.mark.usefixtures("by_kernels")
def test_the_kernels_gain_trains_a_model_as_peft_does():
    test_a_step_of_training_is_pefts(KINDS["dora"], "llama")


@pytest.mark.usefixtures("by_kernels")
def test_the_kernels_gain_at_the_edges():
    """x without rows, strides, a bias that trains, a y changed in place, a second derivative."""
    layer = FusedLoRALinear.from_linear(nn.Linear(9, 6), rank=2, dora=True)
    zoo.randomise(layer, "lora_B", "lora_magnitude")
    layer.to(DEVICE)
    twin = copy.deepcopy(layer).double()
    for name in ("bias", "lora_magnitude"):
        apart = getattr(layer, name).detach()[:, None].expand(-1, 2).clone()[:, 0]
        setattr(layer, name, nn.Parameter(apart))
    assert layer.bias.stride() == layer.lora_magnitude.stride() == (2,)
    twin.bias.requires_grad_()
    x = torch.randn(2, 3, 9, device=DEVICE)
    assert layer(x[:0]).shape == (0, 3, 6)
    for each in (layer, twin):
        each(x.to(each.weight.dtype)).sum().backward()
    for ours, exact in zip(layer.parameters(), twin.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, exact.grad.float())
    for frozen in (layer.lora_magnitude, layer.bias):
        frozen.requires_grad_(False)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).sum(), layer.lora_B)[0], layer.lora_B.grad
    )
    for given in (x, x[0]):
        layer(given).mul_(2)  # which a plain view made inside a Function would refuse
    y = layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["use_dora", "lora_bias"])
def test_a_layer_is_pefts_with_the_same_masks(name, dropout, dtype, device="cpu"):
    """Ours draws the mask of DoRA as PEFT does, so one seed gives both the same."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 20)).to(dtype)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["0"], **{name: True}
    )
    theirs = scattered(peft.get_peft_model(base, config).to(dtype))
    zoo.randomise(theirs, "lora_B", "lora_A")
    theirs.to(device)
    exact, ours = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    assert len(fuse_peft(ours).fused) == 1
    if dropout and name == "lora_bias":
        for model in (ours, theirs, exact):
            model.eval()  # plain LoRA draws other masks than nn.Dropout
    results = {}
    for label, model in (("ours", ours), ("theirs", theirs), ("exact", exact)):
        x = torch.randn(7, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x.to(dtype).to(next(model.parameters())).requires_grad_()
        torch.manual_seed(3)
        y = model(x)
        torch.manual_seed(4)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y))
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results[label] = {"y": y.detach(), "dx": x.grad, **trained}
    assert len(results["ours"]) == 5
    for key, truth in results["exact"].items():
        assert truth.abs().max() > 0
        worst = (results["ours"][key].double() - truth).abs().max()
        eager = (results["theirs"][key].double() - truth).abs().max()
        limit = 2 * eager + torch.finfo(dtype).eps * truth.abs().max()
        assert worst <= limit, f"{key}: {worst:.2e}, eager {eager:.2e}"


@each_kind
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_a_step_of_training_is_pefts(kind, name):
    """From the same start: the same magnitudes, the same update of every parameter."""
    ours = zoo.build(name)
    # The gradient of a key's bias is zero, but for rounding: softmax does not see it.
    attention = ["query", "value"] if "lora_bias" in kind else ["query", "key", "value"]
    targets = {"roberta": attention, "llama": ["q_proj", "v_proj", "up_proj"]}[name]
    add_lora(ours, LoRAConfig(rank=4, alpha=6, targets=tuple(targets), **kind))
    config = {"use_dora": True} if "dora" in kind else {"lora_bias": True}
    theirs = peft.get_peft_model(
        zoo.build(name), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **config)
    ).eval()
    layers = fused_layers(ours)
    peers = {path: theirs.base_model.model.get_submodule(path) for path in layers}
    for path, layer in layers.items():
        with torch.no_grad():
            peers[path].lora_A["default"].weight.copy_(layer.lora_A)
        if "dora" in kind:
            start = peers[path].lora_magnitude_vector["default"].weight
            torch.testing.assert_close(layer.lora_magnitude, start)
    for _ in range(3):
        for model in (ours, theirs):
            trained = [p for p in model.parameters() if p.requires_grad]
            model(**zoo.batch()).logits.square().sum().backward()
            with torch.no_grad():
                for parameter in trained:
                    parameter.sub_(0.05 * parameter.grad)
                    parameter.grad = None
    torch.testing.assert_close(zoo.logits(ours), zoo.logits(theirs), rtol=1e-4, atol=1e-6)
    for path, layer in layers.items():
        peer = peers[path]
        pairs = [(layer.lora_A, peer.lora_A), (layer.lora_B, peer.lora_B)]
        if "dora" in kind:
            pairs.append((layer.lora_magnitude, peer.lora_magnitude_vector))
        moved = [(own, theirs["default"].weight) for own, theirs in pairs]
        if "lora_bias" in kind:
            moved.append((layer.lora_bias, peer.lora_B["default"].bias))
        for own, other in moved:
            assert other.abs().max() > 0 and (own - other).abs().max() < 1e-2 * other.abs().max()


@each_kind
@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
def test_files_go_both_ways(kind, name, tmp_path):
    ours = scattered(injected(name, train=(), **kind))
    save_adapter(ours, tmp_path / "ours")
    theirs = from_peft(tmp_path / "ours", name)
    torch.testing.assert_close(zoo.logits(theirs), zoo.logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    again = zoo.build(name)
    report = load_adapter(again, tmp_path / "theirs")
    assert torch.equal(zoo.logits(again), zoo.logits(ours))
    assert report.trainable == sum(value.numel() for value in mine.values())
    type(ours).save_pretrained(ours, tmp_path / "whole")
    fresh = zoo.build(name)
    load_adapter(fresh, tmp_path / "whole")
    assert torch.equal(zoo.logits(fresh), zoo.logits(ours))


@each_kind
@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
def test_merging_copying_and_disabling(kind, name):
    model = scattered(injected(name, train=(), **kind))
    expected = zoo.logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(zoo.logits(twin), expected)
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model), zoo.logits(zoo.build(name)))
    for layer in fused_layers(model).values():
        layer.merge()
    torch.testing.assert_close(zoo.logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model), zoo.logits(zoo.build(name)))
    for layer in fused_layers(model).values():
        layer.unmerge()
    assert torch.equal(zoo.logits(model), expected)
    torch.testing.assert_close(zoo.logits(merged(model)), expected)
    assert not fused_layers(model)


@pytest.mark.usefixtures("many_tokens")
def test_siblings_of_dora_run_as_one_problem():
    model = zoo.build("roberta")
    add_lora(model, LoRAConfig(targets=("query", "key", "value"), dora=True))
    zoo.randomise(model, "lora_B")
    assert sorted(zoo.nodes(model)) == [3, 3]
    assert "library" in str(explain(model))
    assert not any("magnitude" in name for name, _ in zoo.build("roberta").named_parameters())


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_norms_are_those_of_the_sum(dtype, block, monkeypatch):
    monkeypatch.setattr(dora, "CACHED", block)
    torch.manual_seed(0)
    weight, lora_A, lora_B = torch.randn(9, 30).to(dtype), torch.randn(4, 30), torch.randn(9, 4)
    lora_A, lora_B = (t.to(torch.promote_types(dtype, torch.float32)) for t in (lora_A, lora_B))
    exact = (weight.double() + 0.7 * lora_B.double() @ lora_A.double()).norm(dim=1)
    for strided in (weight, weight.T.contiguous().T):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = dora.row_norms(Weights(strided, None, lora_A, lora_B), 0.7)
        assert found.dtype == lora_A.dtype
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


class Counted(TorchDispatchMode):
    """Counts operators that compute, and the bytes that they read or write of tensors by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and not function.is_view
        if made and "empty" not in str(function) and "unsafe_view" not in str(function):
            self.operators += 1
            for each in (*args, result):
                if isinstance(each, torch.Tensor):
                    self.bytes[tuple(each.shape)] += each.itemsize
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_plain_operators_cost(dtype):
    """The row of docs/kernels.md."""
    M, N, K, R = 64, 96, 80, 4
    made = [torch.randn(shape, requires_grad=True) for shape in ((R, K), (N, R), (N,))]
    lora_A, lora_B, magnitude = made
    weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    p, dy = torch.randn(M, N).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    parts = Parts(Weights(weight, None, lora_A, lora_B), Settings(2.0))
    with Counted() as forward:
        y = dora._scaled(p, parts, dora.Dora(magnitude, bias))
    with Counted() as backward:
        y.backward(dy)
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    row = re.search(r"plain operators, forward \+ backward \| (.*) \|", page)
    launches, *moved = row[1].split(" | ")
    of_y, of_weight = moved[:2][dtype is torch.float32], moved[2:][dtype is torch.float32]
    assert of_y == f"{forward.bytes[M, N]} + {backward.bytes[M, N]}"
    assert of_weight == str(forward.bytes[N, K])
    if dtype is torch.bfloat16:
        assert launches == f"{forward.operators} + {backward.operators}"


def test_what_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lora_bias goes with neither dora"):
        LoRAConfig(dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="dora must be True or False: got 1"):
        LoRAConfig(dora=1)
    for kind in KINDS.values():
        with pytest.raises(ValueError, match="are for whole layers: this one has columns"):
            add_lora(zoo.build("gpt2"), LoRAConfig(targets=("c_attn.q",), **kind))
    save_adapter(injected(dora=True, train=()), tmp_path)
    values = load_file(tmp_path / WEIGHTS)
    gone = next(key for key in values if "magnitude" in key)
    save_file({k: v for k, v in values.items() if k != gone}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="query lacks the magnitude of its LoRA"):
        load_adapter(zoo.build("roberta"), tmp_path)
    save_file(values, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(ValueError, match=r"query has the magnitude of its LoRA.*use_dora=False"):
        load_adapter(zoo.build("roberta"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lora_magnitude is in the file alone"):
        load_adapter(injected(train=()), tmp_path)
    values[gone] = values[gone][:-1].clone()
    save_file(values, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"lora_magnitude is \[31\] in the file and \[32\]"):
        load_adapter(zoo.build("roberta"), tmp_path)


@each_kind
def test_it_compiles_to_one_graph(kind):
    layer = FusedLoRALinear.from_linear(nn.Linear(16, 12), rank=2, **kind)
    zoo.randomise(layer, "lora_B", "lora_bias")
    x = torch.randn(5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
