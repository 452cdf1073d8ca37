"""FusedLoRALinear and LoRAConfig: parameters, values, bad input, words."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lora_kernels import STRATEGIES, FusedLoRALinear, LoRAConfig, lora_linear
from tests.support.oracle import DEVICE, Case, judge_layer
from tests.support.small_layers import KINDS, Int8Tensor, adapted, autocast, base, batch

# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("kind", KINDS)
def test_the_very_parameters_are_shared_and_frozen(kind):
    original = base(kind)
    weight, bias = original.weight, original.bias
    layer = FusedLoRALinear.from_linear(original, rank=3)
    assert layer.weight is weight and layer.bias is bias
    assert layer.in_features == 20 and layer.out_features == 24
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert layer.lora_A.shape == (3, 20) and layer.lora_B.shape == (24, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_keys_are_those_of_the_layer_and_two_more(kind):
    original = base(kind)
    keys = set(original.state_dict())
    assert set(FusedLoRALinear.from_linear(original).state_dict()) == keys | {"lora_A", "lora_B"}


def test_autocast_leaves_no_trace_among_parameters_and_keys():
    layer = adapted()
    names, keys = [n for n, _ in layer.named_parameters()], list(layer.state_dict())
    with autocast():
        layer(batch())
    assert [n for n, _ in layer.named_parameters()] == names and list(layer.state_dict()) == keys


@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["plain", "dropout"])
def test_on_the_meta_device_a_step_has_shapes_alone(dropout):
    """As tools do that count memory before a model is loaded."""
    layer = FusedLoRALinear(20, 24, rank=3, dropout=dropout, device="meta")
    x = torch.empty(2, 5, 20, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, 5, 24) and y.device.type == "meta"
    for leaf in (x, layer.lora_A, layer.lora_B):
        assert leaf.grad.shape == leaf.shape


def test_a_layer_without_bias_has_none():
    layer = FusedLoRALinear.from_linear(base("linear", bias=False), rank=3)
    assert layer.bias is None and set(layer.state_dict()) == {"weight", "lora_A", "lora_B"}
    made = FusedLoRALinear(20, 24, rank=3, bias=False)
    assert made.bias is None and set(made.state_dict()) == {"weight", "lora_A", "lora_B"}


def test_adapters_are_fp32_at_least_over_a_half_base():
    wanted = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    wanted |= {torch.float32: torch.float32, torch.float64: torch.float64}
    for dtype, adapter in wanted.items():
        layer = FusedLoRALinear.from_linear(base("linear", dtype=dtype))
        assert layer.weight.dtype == dtype
        assert layer.lora_A.dtype == layer.lora_B.dtype == adapter


def test_a_dtype_named_at_construction_is_that_of_every_parameter():
    for dtype in (torch.bfloat16, torch.float64):
        layer = FusedLoRALinear(20, 24, dtype=dtype, device=DEVICE)
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert {parameter.device.type for parameter in layer.parameters()} == {DEVICE.type}


def test_training_starts_at_the_base_model_with_a_as_peft_draws_it():
    original = base("linear")
    torch.manual_seed(5)
    layer = FusedLoRALinear.from_linear(original, rank=3)
    torch.manual_seed(5)
    drawn = nn.init.kaiming_uniform_(torch.empty(3, 20, device=DEVICE), a=math.sqrt(5))
    assert torch.equal(layer.lora_A, drawn)
    assert (layer.lora_B == 0).all()
    nn.init.normal_(layer.lora_B)
    layer.reset_lora_parameters()
    assert (layer.lora_B == 0).all() and not torch.equal(layer.lora_A, drawn)


def test_the_scale_is_alpha_over_rank_or_its_root():
    assert FusedLoRALinear(20, 24, rank=4, alpha=6).scale == 1.5
    assert FusedLoRALinear(20, 24, rank=4, alpha=6, rslora=True).scale == 3.0
    layer, root = adapted(rank=4, alpha=6), adapted(rank=4, alpha=6, rslora=True)
    root.load_state_dict(layer.state_dict())
    x = batch()
    frozen = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(root(x) - frozen, 2 * (layer(x) - frozen))


# ---------------------------------------------------------------- values


@pytest.mark.usefixtures("many_tokens")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", KINDS)
def test_y_and_every_gradient_are_the_reference_s(kind, bias, training):
    if kind == "conv1d" and not bias:
        pytest.skip("a Conv1D always has a bias")
    case = Case(
        M=40, N=24, K=20, R=3, weight=kind, bias=bias, scale=2.0, dropout=0.3 if training else 0.0
    )
    layer = adapted(kind, bias=bias, dropout=0.3).train(training)

    def call(x, weight, lora_A, lora_B, bias):
        tensors = {
            "weight": weight.T if kind == "conv1d" else weight,
            "lora_A": lora_A, "lora_B": lora_B, "bias": bias,
        }  # fmt: skip
        return torch.func.functional_call(layer, tensors, (x,))

    judge_layer(call, case, torch.float32)


def test_the_strategy_named_is_the_one_that_runs():
    seen = []
    layer = adapted(strategy="split")
    x = batch()
    y = layer(x)
    for strategy in STRATEGIES:
        other = lora_linear(
            x, layer.weight, layer.lora_A, layer.lora_B, bias=layer.bias, scale=2.0,
            strategy=strategy,
        )  # fmt: skip
        torch.testing.assert_close(y, other)
        seen.append(other.grad_fn.call.strategy.name)
    assert y.grad_fn.call.strategy.name == "split" and seen == list(STRATEGIES)


def test_a_replaced_layer_s_mode_is_kept():
    assert not FusedLoRALinear.from_linear(base("linear").eval()).training
    assert FusedLoRALinear.from_linear(base("linear")).training


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, r"rank must be an integer of at least 1: got 0"),
        ({"rank": -2}, r"got -2"),
        ({"rank": True}, r"got True"),
        ({"rank": 2.0}, r"got 2.0"),
        ({"alpha": math.inf}, r"alpha must be a finite number: got inf"),
        ({"alpha": math.nan}, r"got nan"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\): got 1.0"),
        ({"dropout": -0.1}, r"got -0.1"),
        ({"dropout": math.nan}, r"got nan"),
        ({"strategy": "libary"}, r"unknown strategy 'libary'.*did you mean 'library'"),
    ],
    ids=str,
)
def test_options_out_of_range_name_the_value(options, words):
    with pytest.raises(ValueError, match=words):
        FusedLoRALinear(20, 24, **options)
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**options)
    original = base("linear")
    with pytest.raises(ValueError, match=words):
        FusedLoRALinear.from_linear(original, **options)
    assert original.weight.requires_grad, "a layer that was refused is left as it was"


def with_(change) -> nn.Module:
    layer = nn.Linear(20, 24)
    change(layer)
    return layer


class Special(nn.Linear):
    pass


def int8(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def float8(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def sparse(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)


def quantised(layer):
    layer.weight = Int8Tensor.of(layer.weight)


def patched(layer):
    layer.forward = lambda x: x


REFUSED = {
    "forward hook": (lambda m: m.register_forward_hook(print), "hooks, which would be lost"),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(print), "hooks"),
    "backward hook": (lambda m: m.register_full_backward_hook(print), "hooks"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(print), "hooks"),
    "patched": (patched, "forward"),
    "parametrized": (parametrizations.weight_norm, "[Pp]arametrized"),
    "int8": (int8, "its weight is torch.int8"),
    "float8": (float8, "its weight is torch.float8_e4m3fn"),
    "sparse": (sparse, "its weight is torch.sparse_coo"),
    "quantised": (quantised, r"its weight is a tests\.support\.small_layers\.Int8Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_replaced_is_refused_with_the_reason(name):
    change, words = REFUSED[name]
    layer = with_(change)
    with pytest.raises(TypeError, match=words):
        FusedLoRALinear.from_linear(layer)
    assert FusedLoRALinear.supports(nn.Linear(20, 24)) is None


@pytest.mark.parametrize(
    "layer", [Special(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), FusedLoRALinear(4, 4)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_another_class_is_refused_by_name(layer):
    with pytest.raises(TypeError, match=f"{type(layer).__name__} is not a plain Linear or Conv1D"):
        FusedLoRALinear.from_linear(layer)


def test_a_wrong_x_gets_the_errors_of_lora_linear():
    layer = adapted()
    with pytest.raises(ValueError, match=r"x has 21 features, but weight \[24, 20\] takes K = 20"):
        layer(torch.zeros(2, 21, device=DEVICE))
    with pytest.raises(TypeError, match=r"x is torch.float16 but weight is torch.float32"):
        layer(torch.zeros(2, 20, device=DEVICE, dtype=torch.float16))


# ---------------------------------------------------------------- words


def test_extra_repr():
    layer = FusedLoRALinear(20, 24, rank=4, alpha=8, dropout=0.1)
    assert repr(layer) == (
        "FusedLoRALinear(in_features=20, out_features=24, bias=True, rank=4, alpha=8, dropout=0.1, "
        "strategy='auto')"
    )
    layer = FusedLoRALinear(20, 24, bias=False, rslora=True, strategy="split")
    layer.merge()
    assert layer.extra_repr() == (
        "in_features=20, out_features=24, bias=False, rank=8, alpha=16, dropout=0.0, "
        "strategy='split', rslora=True, merged"
    )


def test_config_takes_a_name_or_names_and_cannot_change():
    assert LoRAConfig().targets is None and LoRAConfig().train == ()
    config = LoRAConfig(targets="all-linear", train="classifier")
    assert config.targets == ("all-linear",) and config.train == ("classifier",)
    assert LoRAConfig(targets=["query", "value"]).targets == ("query", "value")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="targets is empty"):
        LoRAConfig(targets=())
    with pytest.raises(ValueError, match=r"alone: got \('all-linear', 'query'\)"):
        LoRAConfig(targets=("all-linear", "query"))
    wrong = (("train", None), ("targets", ("query", 5)), ("alpha", "16"), ("dropout", None))
    for field, value in wrong:
        with pytest.raises(ValueError, match=f"{field} must .*: got {re.escape(repr(value))}"):
            LoRAConfig(**{field: value})
    assert hash(config) == hash(LoRAConfig(targets=("all-linear",), train=("classifier",)))
