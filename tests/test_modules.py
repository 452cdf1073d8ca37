"""FusedLoRALinear and LoRAConfig: parameters, values, what is held and saved, bad input."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from oracle import DEVICE, Case, expected, inputs, judge, judge_layer, run
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import STRATEGIES, FusedLoRALinear, LoRAConfig, lora_linear, reference
from lora_kernels.groups import group_siblings

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ["linear", "conv1d"]


def base(kind: str, K: int = 20, N: int = 24, bias: bool = True, dtype=torch.float32) -> nn.Module:
    """An nn.Linear, or transformers' Conv1D with weight [K, N]."""
    if kind == "linear":
        return nn.Linear(K, N, bias=bias, dtype=dtype, device=DEVICE)
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(N, K).to(DEVICE, dtype)
    nn.init.normal_(layer.bias)
    return layer


def adapted(kind: str = "linear", *, dtype=torch.float32, bias: bool = True, **options):
    """A layer whose update is not zero."""
    options = {"rank": 3, "alpha": 6} | options
    layer = FusedLoRALinear.from_linear(base(kind, bias=bias, dtype=dtype), **options)
    nn.init.normal_(layer.lora_B)
    return layer


def batch(dtype=torch.float32, rows: int = 7) -> torch.Tensor:
    return torch.randn(rows, 20, device=DEVICE).to(dtype).requires_grad_()


def autocast(dtype=torch.bfloat16):
    return torch.autocast(DEVICE.type, dtype=dtype)


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
    assert layer._cast is not None
    assert [n for n, _ in layer.named_parameters()] == names and list(layer.state_dict()) == keys


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
    eager = reference.forward(*parts, bias=layer.bias, scale=layer.scale)
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
    assert layer._cast is not None
    file = io.BytesIO()
    torch.save(layer, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    x = batch()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved):
        assert twin._cast is None, "a copy must not hold the weight twice"
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
    change_in_place, replace_the_parameter, replace_the_data, load_a_state, assign_a_state,
    merge_it, train_the_weight_to_fp16_and_back,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_cast_copy_is_never_used(kind, change):
    layer = adapted(kind)
    x = batch()
    with autocast():
        before = layer(x)
        change(layer)
        after = layer(x)
    layer._cast = None
    with autocast():
        fresh = layer(x)
    assert torch.equal(after, fresh)
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


def test_moving_or_casting_the_layer_lets_go_of_the_copy():
    layer = adapted()
    for move in (lambda: layer.to(torch.float16), layer.float, layer.half, layer.float):
        with autocast():
            layer(batch())
        assert layer._cast is not None
        move()
        assert layer._cast is None, "it would keep memory that nobody reads"
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].numel() == self.elements
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_weight_is_cast_once_under_autocast(kind):
    layer = adapted(kind, dropout=0.25)
    with Casts(layer.weight.numel()) as casts, autocast():
        for _ in range(3):
            layer(batch()).float().sum().backward()
            layer.lora_A.grad = layer.lora_B.grad = None
        assert casts.count == 1
        layer.eval()
        layer(batch())
        assert casts.count == 1
    with Casts(layer.weight.numel()) as casts, autocast(torch.float16):
        layer(batch())
        layer(batch())
    assert casts.count == 1, "another dtype of autocast is another copy"
    assert torch.equal(layer._cast, layer.weight.half()), "of the weight, not of the other copy"
    half = adapted(kind, dtype=torch.bfloat16)
    with Casts(layer.weight.numel()) as casts, autocast():
        half(batch())
    assert casts.count == 0 and half._cast is None


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


# ---------------------------------------------------------------- what backward saves


class Saved:
    """The tensors that autograd saves, split into those of `known` memory and new ones."""

    def __init__(self, **known: torch.Tensor) -> None:
        self.owners = {self._memory(t): name for name, t in known.items()}
        self.names: set[str] = set()
        self.new: list[torch.Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @staticmethod
    def _memory(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self.owners.get(self._memory(tensor))
        if name is None:
            self.new.append(tensor)
        else:
            self.names.add(name)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.new)


def saved_by(layer: FusedLoRALinear, x: torch.Tensor) -> tuple[Saved, torch.Tensor]:
    saved = Saved(x=x, **dict(layer.named_parameters()))
    with saved.hooks:
        y = layer(x)
    y.backward(torch.randn_like(y))
    return saved, y


M, K, N, R = 30, 136, 104, 3


def layer_to_save(dropout=0.25, dtype=torch.float16, **options) -> FusedLoRALinear:
    original = nn.Linear(K, N, dtype=dtype, device=DEVICE)
    layer = FusedLoRALinear.from_linear(original, rank=R, dropout=dropout, **options)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["plain", "dropout"])
def test_backward_saves_x_by_reference_and_h_and_one_bit_an_element(strategy, dropout):
    layer = layer_to_save(dropout, strategy=strategy)
    x = torch.randn(2, M // 2, K, device=DEVICE, dtype=torch.float16, requires_grad=True)
    saved, y = saved_by(layer, x)
    assert y.grad_fn is not None and layer.lora_A.grad.abs().sum() > 0
    assert saved.names == {"x", "weight", "lora_A", "lora_B"}
    kinds = {(tensor.dtype, tensor.numel()) for tensor in saved.new}
    mask = {(torch.uint8, M * K // 8)} if dropout else set()
    assert kinds == {(torch.float16, M * R)} | mask
    assert saved.bytes == M * R * 2 + (M * K // 8 if dropout else 0), "views of larger memory"
    if dropout:
        assert saved.bytes - M * R * 2 == x.nbytes / 16


def test_a_frozen_lora_a_needs_no_x():
    layer = layer_to_save()
    layer.lora_A.requires_grad_(False)
    x = torch.randn(M, K, device=DEVICE, dtype=torch.float16, requires_grad=True)
    saved, _ = saved_by(layer, x)
    assert saved.names == {"weight", "lora_A", "lora_B"}
    assert layer.lora_A.grad is None and layer.lora_B.grad.abs().sum() > 0


def test_the_first_layer_needs_no_weight():
    layer = layer_to_save()
    x = torch.randn(M, K, device=DEVICE, dtype=torch.float16)
    saved, _ = saved_by(layer, x)
    assert saved.names == {"x", "lora_A", "lora_B"}
    assert layer.lora_A.grad.abs().sum() > 0


def test_under_autocast_the_held_copy_is_what_is_saved():
    layer = layer_to_save(dtype=torch.float32)
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    with autocast():
        layer(x)
        saved = Saved(x=x, cast=layer._cast, **dict(layer.named_parameters()))
        with saved.hooks:
            y = layer(x)
    assert saved.names == {"x", "cast", "lora_A", "lora_B"}
    assert saved.bytes == M * R * 2 + M * K // 8
    y.float().sum().backward()


def test_evaluation_saves_nothing():
    layer = layer_to_save()
    saved = Saved()
    with saved.hooks, torch.no_grad():
        y = layer(torch.randn(M, K, device=DEVICE, dtype=torch.float16))
    assert not saved.new and y.grad_fn is None


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
    assert hash(config) == hash(LoRAConfig(targets=("all-linear",), train=("classifier",)))
