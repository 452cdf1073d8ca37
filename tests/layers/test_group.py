"""Siblings that read one x: the same numbers as each alone, one launch, and nothing assumed."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lora_kernels import STRATEGIES, FusedLoRALinear
from lora_kernels.algebra import masks, reference
from lora_kernels.algebra.operands import Settings, Weights
from lora_kernels.autograd.function import mask_of
from lora_kernels.autograd.functional import lora_linears
from lora_kernels.injection.siblings import group_siblings
from tests.support.oracle import DEVICE, YARDSTICKS, Case, coarser, inputs, judge
from tests.support.small_layers import nodes_of

CASES = {
    "qkv": ((40, 40, 40), 8, 0.0, torch.float32),
    "qkv-dropout-half": ((48, 48, 48), 3, 0.25, torch.float16),
    "ragged-gqa": ((64, 33, 33), 5, 0.1, torch.float32),
    "gate-up-bf16": ((56, 56), 4, 0.1, torch.bfloat16),
}


def members(sizes, rank, dtype, conv1d=False):
    layout = "conv1d" if conv1d else "linear"
    cases = [Case(M=70, N=N, K=48, R=rank, weight=layout) for N in sizes]
    return [inputs(case, dtype, seed) for seed, case in enumerate(cases)]


def layers_of(given):
    return tuple(Weights(m.weight, m.bias, m.lora_A, m.lora_B) for m in given)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_every_output_and_gradient_of_a_group(name, strategy):
    sizes, rank, dropout, dtype = CASES[name]
    given = members(sizes, rank, dtype)
    x = given[0].x
    torch.manual_seed(0)
    y = lora_linears(x, layers_of(given), Settings(0.75, dropout, strategy))
    mask = mask_of(y[0])
    leaves = [x] + [t for m in given for t in (m.lora_A, m.lora_B, m.bias)]
    gradients = torch.autograd.grad(y, leaves, [m.dy for m in given])

    def expected(dtype, device=DEVICE):
        cast = [t.detach().to(device, dtype).requires_grad_() for t in leaves]
        outputs = []
        for g, m in enumerate(given):
            keep = None if mask is None else masks.unpack(mask[g], 48).to(device)
            A, B, bias = cast[1 + 3 * g : 4 + 3 * g]
            weight = m.weight.detach().to(device, dtype)
            outputs.append(
                reference.forward(
                    cast[0], weight, A, B, bias=bias, scale=0.75, keep=keep, dropout=dropout
                )
            )
        found = torch.autograd.grad(outputs, cast, [m.dy.to(device, dtype) for m in given])
        return [*(y.detach() for y in outputs), *found]

    exact, eager = expected(torch.float64), expected(dtype)
    if YARDSTICKS > 1:
        eager = [*map(coarser, eager, expected(dtype, "cpu"), exact)]
    names = (
        [f"y{g}" for g in range(len(given))]
        + ["dx"]
        + [f"{n}{g}" for g in range(len(given)) for n in ("dlora_A", "dlora_B", "dbias")]
    )
    actual = [*(each.detach() for each in y), *gradients]
    for label, *values in zip(names, actual, eager, exact, strict=True):
        judge(label, *values, independent=70 * rank)
    if mask is not None:  # each layer draws its own
        assert not torch.equal(mask[0], mask[1])


class Attention(nn.Module):
    """Calls its projections as Hugging Face models do."""

    def __init__(self, dropout=0.0, rank=4, **changes) -> None:
        super().__init__()
        for name in ("query", "key", "value"):
            layer = FusedLoRALinear(
                24,
                24,
                rank=changes.get(name, rank),
                dropout=dropout,
                strategy="library",
                device=DEVICE,
            )
            nn.init.normal_(layer.lora_B)
            setattr(self, name, layer)

    def forward(self, x, other=None):
        other = x if other is None else other
        return self.query(x) * 2 + self.key(other) * 3 - self.value(other)


def launches(y):
    """How many autograd nodes of ours are behind y."""
    return len(nodes_of(y))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 5, 24, device=DEVICE, requires_grad=True)


def test_siblings_share_one_node_and_keep_their_names(x):
    model = Attention()
    keys = set(model.state_dict())
    alone = model(x)
    assert launches(alone) == 3
    assert group_siblings(model) == (("query", "key", "value"),)
    together = model(x)
    assert launches(together) == 1
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(together, alone)
    wanted = [x, *model.parameters()]
    wanted = [t for t in wanted if t.requires_grad]
    for a, b in zip(
        torch.autograd.grad(together.sum(), wanted),
        torch.autograd.grad(alone.sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


def test_a_projection_can_be_called_alone_and_with_another_x(x):
    model = Attention()
    other = torch.randn_like(x)
    expected = [layer(t) for t in (x, other) for layer in (model.query, model.key, model.value)]
    cross = model(x, other)
    group_siblings(model)
    actual = [layer(t) for t in (x, other) for layer in (model.query, model.key, model.value)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    torch.testing.assert_close(model.key(x), expected[1])
    for _ in range(5):
        torch.testing.assert_close(model(x, other), cross)
    assert launches(model(x)) == 1, "cross attention leaves nothing behind"


def test_results_that_are_computed_and_dropped_are_told(x):
    model = Attention()
    group_siblings(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with pytest.warns(UserWarning, match="got different tensors.*group=False"):
        model(x, torch.randn_like(x))


def detr(model, x, other):
    return model.query(x) * 2 + model.key(x) * 3 - model.value(other)


def first_and_last(model, x, other):
    return model.query(x) * 2 + model.key(other) * 3 - model.value(x)


def replaced(model, x, other):
    return model.query(x) * 2 + model.key(x + 0) * 3 - model.value(x.clone())


def cross(model, x, other):
    return model(x, other)


CALLS = [cross, detr, first_and_last, replaced]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_checkpointing_recomputes_what_forward_did_whatever_siblings_read(call, reentrant, x):
    model, other = Attention(dropout=0.5), torch.randn_like(x)
    group_siblings(model)
    wanted = [x, model.query.lora_A, model.key.lora_A, model.value.lora_B]
    for step in range(6):
        torch.manual_seed(step)
        plain = torch.autograd.grad(call(model, x, other).square().sum(), wanted)
        torch.manual_seed(step)
        y = torch.utils.checkpoint.checkpoint(call, model, x, other, use_reentrant=reentrant)
        for t in wanted:
            t.grad = None
        y.square().sum().backward()
        for gradient, t in zip(plain, wanted, strict=True):
            torch.testing.assert_close(t.grad, gradient)


@pytest.mark.parametrize("call", CALLS)
def test_masks_do_not_depend_on_what_was_called_before(call, x):
    """A resumed run starts with fresh groups, and must draw what the uninterrupted one draws."""
    model, other = Attention(dropout=0.5), torch.randn_like(x)
    group_siblings(model)
    for _ in range(5):
        call(model, x, other).sum().backward()
    resumed = pickle.loads(pickle.dumps(model))
    for step in range(5):
        outputs = []
        for each in (model, resumed):
            torch.manual_seed(step)
            outputs.append(call(each, x, other))
        assert torch.equal(*outputs)


def test_a_model_goes_with_its_last_name_and_takes_what_waits_along(x):
    model = Attention()
    group_siblings(model)
    y = model.query(x)  # the results of key and value wait, as after a call that was interrupted
    waiting = model.query.group._waiting.results
    others = [weakref.ref(waiting[id(layer)][0]) for layer in (model.key, model.value)]
    traces = [weakref.ref(layer) for layer in model.modules()] + others
    del waiting
    gc.collect()
    gc.disable()
    try:
        del model, y
        assert [trace() for trace in traces] == [None] * len(traces)
    finally:
        gc.enable()


def test_what_an_interrupted_call_left_is_gone_before_the_next_computes(x, monkeypatch):
    model = Attention()
    group_siblings(model)
    model.key(x)
    left = weakref.ref(model.query.group._waiting.results[id(model.query)][0])
    gone = []

    def spied(*args):
        gone.append(left() is None)
        return lora_linears(*args)

    monkeypatch.setattr("lora_kernels.layers.group.lora_linears", spied)
    model(torch.randn_like(x))
    assert gone == [True]


def test_a_layer_without_its_siblings_still_runs(x):
    model = Attention()
    group_siblings(model)
    expected, key = model.key(x), model.key
    del model
    torch.testing.assert_close(key(x), expected)
    torch.testing.assert_close(copy.deepcopy(key)(x), expected)
    torch.testing.assert_close(copy.copy(key)(x), expected)


def test_threads_that_share_a_model_do_not_mix_their_results():
    model, inputs_ = Attention(), [torch.randn(2, 5, 24, device=DEVICE) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs_]
    group_siblings(model)

    @torch.no_grad()  # which each thread decides for itself
    def calls(x):
        return [model(x) for _ in range(200)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(calls, inputs_))
    finally:
        sys.setswitchinterval(before)
    for outputs, e in zip(found, expected, strict=True):
        for y in outputs:
            torch.testing.assert_close(y, e)
    assert launches(model(torch.randn(2, 5, 24, device=DEVICE))) == 1, "still a group"


def test_masks_are_drawn_anew_and_the_seed_reproduces_them(x):
    model = Attention(dropout=0.5)
    group_siblings(model)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_checkpointing_recomputes_the_same_step(x):
    model = Attention(dropout=0.5)
    group_siblings(model)
    wanted = [x, model.query.lora_A, model.value.lora_B]
    for reentrant in (False, True):
        torch.manual_seed(2)
        plain = torch.autograd.grad(model(x).square().sum(), wanted)
        torch.manual_seed(2)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        for t in wanted:
            t.grad = None
        y.square().sum().backward()
        for gradient, t in zip(plain, wanted, strict=True):
            torch.testing.assert_close(t.grad, gradient)


def test_merging_dissolves_a_group_cleanly(x):
    model, x = Attention().double(), x.detach().double()  # merged, another order of sums
    group_siblings(model)
    before = model(x)
    model.key.merge()
    torch.testing.assert_close(model(x), before)
    assert launches(model(x)) == 2
    model.key.unmerge()
    assert launches(model(x)) == 1


def test_copies_and_pickles_hold_their_own_group(x):
    model = Attention()
    group_siblings(model)
    model.query(x)  # results wait for key and value: they must not travel
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.query.group is twin.key.group is not model.query.group
        assert twin.query.group.members[0] is twin.query
        torch.testing.assert_close(twin(x), model(x))


def test_members_of_another_layout_or_rank_are_computed_one_by_one():
    """A parameter replaced after grouping must not be read with its sibling's strides."""
    given = members((24, 24), 4, torch.float32)
    x, (first, second) = given[0].x, given
    third = inputs(Case(M=70, N=24, K=48, R=5), torch.float32, 7)
    second.lora_B = second.lora_B.detach().T.contiguous().T
    second.weight = second.weight.T.contiguous().T
    for group in ((first, second), (first, third)):
        unbiased = tuple(each._replace(bias=None) for each in layers_of(group))
        together = lora_linears(x, unbiased, Settings(0.5, strategy="split"))
        for y, m in zip(together, group, strict=True):
            exact = reference.forward(x, m.weight, m.lora_A, m.lora_B, scale=0.5)
            torch.testing.assert_close(y, exact)


def test_biases_of_two_dtypes_are_not_read_by_one_kernel():
    first, second = given = members((24, 24), 4, torch.float32)
    second.bias = second.bias.detach().half().requires_grad_()
    ys = lora_linears(first.x, layers_of(given), Settings(0.5, strategy="split"))
    assert ys[0].grad_fn is not ys[1].grad_fn
    for y, m in zip(ys, given, strict=True):
        exact = reference.forward(
            first.x, m.weight, m.lora_A, m.lora_B, bias=m.bias.float(), scale=0.5
        )
        torch.testing.assert_close(y, exact)


def test_layers_that_differ_are_left_alone():
    assert group_siblings(Attention(key=8)) == (("query", "value"),)
    for name in ("crossattention", "cross_attention", "EncDecAttention", "cross_attn_to_image"):
        assert group_siblings(nn.ModuleDict({name: Attention()})) == (), name
    model = Attention(key=8)
    model.value = nn.Linear(24, 24)
    assert group_siblings(model) == ()


def test_layers_that_zero_3_gathers_one_by_one_run_one_by_one(x):
    model = Attention()
    expected = model(x)
    group_siblings(model)
    for parameter in model.parameters():
        parameter.ds_id = 0  # as DeepSpeed marks what it gathers
    with pytest.warns(UserWarning, match="each is sharded by itself"):
        torch.testing.assert_close(model(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launches(model(x)) == 3, "and it is told once"
