"""The frozen weight: merged and unmerged, copied and pickled, changed under autocast."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.algebra import reference
from lora_kernels.injection.siblings import group_siblings
from tests.support.oracle import DEVICE, Case, expected, inputs, judge, run
from tests.support.small_layers import HALVES, KINDS, adapted, autocast, base, batch

# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_gives_the_same_y_and_unmerging_the_same_bits(kind):
    layer = adapted(kind, dropout=0.5).eval()
    weight, before = layer.weight, layer.weight.detach().clone()
    x = batch(rows=64)
    frozen = before.T if kind == "conv1d" else before
    parts = [t.detach() for t in (x, frozen, layer.lora_A, layer.lora_B)]
    exact = reference.forward(
        *(t.double() for t in parts), bias=layer.bias.double(), scale=layer.scale
    )
    _, _, lora_A, lora_B = (
        parts  # merged eagerly, as PEFT does it: one more rounding, of the weight
    )
    eager = nn.functional.linear(x, frozen + layer.scale * (lora_B @ lora_A), layer.bias)
    unmerged = layer(x).detach()
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before)
    judge("merged", layer(x).detach(), eager, exact)
    assert not layer.train()(x).isnan().any() and torch.equal(layer(x), layer(x))  # no dropout
    once = layer.weight
    layer.merge()
    assert layer.weight is once, "merging twice must not add the update twice"
    layer.eval().unmerge()
    layer.unmerge()
    assert layer.weight is weight and torch.equal(layer.weight, before) and not layer.merged
    assert torch.equal(layer(x).detach(), unmerged)


def test_a_merged_state_is_not_taken_for_a_base_and_its_update():
    """Loaded into a plain LoRA layer, a merged weight would get the update a second time."""
    layer, merged = adapted(), adapted()
    merged.merge()
    for target, source in ((layer, merged), (merged, layer)):
        with pytest.raises(RuntimeError, match="_unmerged"):
            target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_half_weight_is_rounded_once(kind, dtype):
    layer = adapted(kind, dtype=dtype)
    nn.init.normal_(layer.lora_B, std=1e-2)
    update = layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
    exact = layer.weight.double() + (update.T if kind == "conv1d" else update)
    twice = layer.weight + update.to(dtype).reshape_as(layer.weight)
    layer.merge()
    assert layer.weight.dtype == dtype
    assert (layer.weight == exact.to(dtype)).float().mean() > 0.99
    assert (twice == exact.to(dtype)).float().mean() < 0.99, "the test would not see two roundings"


@pytest.mark.parametrize("merged", [False, True], ids=["base", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_linear_gives_the_class_that_was_replaced(kind, merged):
    original = base(kind)
    layer = FusedLoRALinear.from_linear(original, rank=3).eval()
    nn.init.normal_(layer.lora_B)
    if merged:
        layer.merge()
    plain = layer.to_linear()
    assert type(plain) is type(original) and not plain.training
    assert plain.weight is layer.weight and plain.bias is layer.bias
    assert repr(plain) == repr(original) and set(plain.state_dict()) == set(original.state_dict())
    x = batch()
    y = layer(x) if merged else original(x)
    torch.testing.assert_close(plain(x), y)
    assert FusedLoRALinear.supports(plain) is None


# ---------------------------------------------------------------- copies, files, dtypes


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_whole_and_their_own(kind):
    layer = adapted(kind, dropout=0.25, rslora=True, strategy="library").eval()
    with autocast():
        layer(batch())
    file = io.BytesIO()
    torch.save(layer, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    x = batch()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved):
        assert twin.extra_repr() == layer.extra_repr() and twin.scale == layer.scale
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.lora_B.zero_()
            twin.weight.zero_()
        assert layer.lora_B.abs().sum() > 0 and layer.weight.abs().sum() > 0
        assert not torch.equal(twin(x), layer(x))


def test_a_merged_copy_can_be_unmerged():
    layer = adapted()
    before = layer.weight.detach().clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, before) and layer.merged


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(-2)


def replace_the_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * -2, requires_grad=False)


def change_in_place_behind_the_version_counter(layer):
    """As PEFT merges."""
    layer.weight.data.mul_(-2)


def change_one_number_behind_the_version_counter(layer):
    layer.weight.data[3, 5] += 8


def replace_the_data(layer):
    layer.weight.data = layer.weight.detach() * -2


def load_a_state(layer):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight"] *= -2
    layer.load_state_dict(state)


def assign_a_state(layer):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight"] *= -2
    layer.load_state_dict(state, assign=True)


def merge_it(layer):
    layer.merge()


def train_the_weight_to_fp16_and_back(layer):
    layer.half().float()


CHANGES = [
    change_in_place, change_in_place_behind_the_version_counter,
    change_one_number_behind_the_version_counter, replace_the_parameter, replace_the_data,
    load_a_state, assign_a_state, merge_it, train_the_weight_to_fp16_and_back,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_a_changed_weight_is_what_is_used(kind, change):
    layer = adapted(kind)
    x = batch()
    with autocast():
        before = layer(x)
        change(layer)
        after = layer(x)
        assert torch.equal(after, copy.deepcopy(layer)(x))
    if change not in (merge_it, train_the_weight_to_fp16_and_back):
        assert not torch.equal(after, before)


def test_merging_and_unmerging_under_autocast_changes_copies():
    layer = adapted()
    x = batch()
    with autocast():
        before = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), before, rtol=0.05, atol=0.05)
        bare = nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), bare), "the merged weight, cast, and nothing else"
        layer.unmerge()
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_autocast_is_the_half_layer_with_wide_adapters(dtype):
    case = Case(M=40, N=24, K=20, R=3, scale=2.0, adapter=torch.float32)
    given = inputs(case, dtype)
    layer = adapted()

    def call(x, weight, lora_A, lora_B, bias):
        tensors = {"weight": weight.float(), "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
        with autocast(dtype):
            return torch.func.functional_call(layer, tensors, (x,))

    actual = run(given, call)
    exact, eager = expected(given, case, None)
    for name in exact:
        judge(name, actual[name], eager[name], exact[name])


def test_training_follows_an_evaluation_in_inference_mode():
    layer, x = adapted(), batch()
    with torch.inference_mode(), autocast():
        layer(x.detach())
    with autocast():
        y = layer(x)
    y.float().sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0


def test_merging_under_autocast_is_exact():
    layer, under = (adapted() for _ in range(2))
    under.load_state_dict(layer.state_dict())
    layer.merge()
    with autocast():
        under.merge()
    assert torch.equal(under.weight, layer.weight)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "autocast"])
def test_inference_mode(enabled):
    """Its tensors count no versions, neither an x nor a weight that was made in it."""
    layer, x = adapted(dropout=0.5).eval(), batch().detach()
    siblings = nn.ModuleDict({"query": adapted().eval(), "key": adapted().eval()})
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
        expected = [layer(x), siblings.query(x), siblings.key(2 * x)]
        assert group_siblings(siblings)
        with torch.inference_mode():
            inner = x.clone()
            assert torch.equal(layer(inner), expected[0])
            assert torch.equal(siblings.query(inner), expected[1])
            assert torch.equal(siblings.key(inner.mul_(2)), expected[2]), "x has changed"
            assert not FusedLoRALinear(20, 24, device=DEVICE)(inner).isnan().any()
