"""LoRA on ranges of one layer's columns: GPT-2's c_attn with only query and value adapted."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    STRATEGIES,
    FusedLoRALinear,
    LoRAConfig,
    add_lora,
    explain,
    load_adapter,
    merge,
    save_adapter,
)
from lora_kernels.algebra import masks, reference
from lora_kernels.algebra.columns import complement, fold, unfold
from lora_kernels.algebra.operands import Parts, Settings, Weights
from lora_kernels.autograd.function import mask_of
from lora_kernels.autograd.functional import lora_layer
from lora_kernels.injection.families import family_of
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem
from tests.support import zoo
from tests.support.groups import PROPERTY, VIEWS, laid
from tests.support.oracle import DEVICE, YARDSTICKS, coarser, judge, on_cpu

SLICED = [name for name in STRATEGIES if name != "fused"]  # whose refusal is tested below
SCALE = 0.5


@st.composite
def ranges(draw, smallest=1):
    """(columns, N): adapted ranges and gaps between them, any of which may be missing."""
    size = st.integers(smallest, 40)
    edges, columns = 0, []
    for _ in range(draw(st.integers(1, 3))):
        edges += draw(st.sampled_from((0, draw(size))))
        columns.append((edges, edges + draw(size)))
        edges = columns[-1][1]
    return tuple(columns), edges + draw(st.sampled_from((0, draw(size))))


def tensors(M, K, R, columns, N, *, whole, dtype=torch.float32, view="plain", seed=0):
    """(x, weight, bias, lora_A, lora_B, dy), all leaves but the weight."""
    draw = torch.Generator().manual_seed(seed)

    def normal(rows, width, view="plain", std=1.0):
        if whole:
            values = torch.randint(-1, 2, (rows, width), generator=draw).float()
        else:
            values = torch.randn(rows, width, generator=draw) * std
        return laid(values.to(DEVICE, dtype), view).detach()

    width = sum(stop - start for start, stop in columns)
    x = normal(M, K).requires_grad_()
    weight = normal(N, K, view, K**-0.5)
    bias = normal(1, N)[0].requires_grad_()
    lora_A = normal(len(columns) * R, K, std=K**-0.5).requires_grad_()
    lora_B = normal(width, R, std=R**-0.5).requires_grad_()
    return x, weight, bias, lora_A, lora_B, normal(M, N, view)


def results(given_, columns, strategy, dropout):
    x, weight, bias, lora_A, lora_B, dy = given_
    settings = Settings(SCALE, dropout, strategy, columns)
    y = lora_layer(x, Parts(Weights(weight, bias, lora_A, lora_B), settings))
    mask = mask_of(y)
    gradients = torch.autograd.grad(y, (x, bias, lora_A, lora_B), dy)
    return (y.detach(), *gradients), mask


def expected(given_, columns, mask, dropout, dtype):
    """The ranges one by one by the reference, added to the frozen layer."""
    x, weight, bias, lora_A, lora_B, dy = (
        t.detach().to(dtype).requires_grad_(t.requires_grad) for t in given_
    )
    R = lora_B.shape[1]
    y = x @ weight.T + bias
    offset = 0
    for g, (start, stop) in enumerate(columns):
        keep = None if mask is None else masks.unpack(mask[g], x.shape[1])
        A, B = lora_A[g * R : (g + 1) * R], lora_B[offset : offset + stop - start]
        dropped = reference.dropped(x, keep, dropout)
        adapted = SCALE * (dropped @ A.T @ B.T)
        y = y + nn.functional.pad(adapted, (start, y.shape[1] - stop))
        offset += stop - start
    gradients = torch.autograd.grad(y, (x, bias, lora_A, lora_B), dy)
    return y.detach(), *gradients


NAMES = ("y", "dx", "dbias", "dlora_A", "dlora_B")


@pytest.mark.parametrize("strategy", SLICED)
@given(
    ranges(), st.sampled_from((1, 17, 33)), st.sampled_from((7, 16, 40)),
    st.sampled_from((1, 3, 8, 17)), st.sampled_from((0.0, 0.5)), st.sampled_from(VIEWS),
)  # fmt: skip
@settings(PROPERTY, max_examples=12)
def test_whole_numbers_are_exact(strategy, columns_and_n, M, K, R, dropout, view):
    columns, N = columns_and_n
    problem = Problem.on(
        DEVICE, M, N, K, R, torch.float32, dropout=dropout > 0, segments=len(columns), columns=True
    )
    assert choose(problem, strategy).strategy == strategy
    given_ = tensors(M, K, R, columns, N, whole=True, view=view)
    actual, mask = results(given_, columns, strategy, dropout)
    for name, a, b in zip(
        NAMES, actual, expected(given_, columns, mask, dropout, torch.float64), strict=True
    ):
        assert torch.equal(a, b.to(a.dtype)), name


@pytest.mark.parametrize("strategy", SLICED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_random_numbers_keep_the_contract(strategy, dtype, dropout):
    columns, N = ((0, 32), (64, 96)), 96
    given_ = tensors(70, 48, 8, columns, N, whole=False, dtype=dtype, view="transposed")
    actual, mask = results(given_, columns, strategy, dropout)
    exact = expected(given_, columns, mask, dropout, torch.float64)
    eager = expected(given_, columns, mask, dropout, dtype)
    if YARDSTICKS > 1:
        here = tuple(map(on_cpu, given_)), columns, None if mask is None else mask.cpu()
        eager = map(coarser, eager, expected(*here, dropout, dtype), exact)
    for name, *values in zip(NAMES, actual, eager, exact, strict=True):
        judge(name, *values, independent=70 * 8)


def test_every_range_draws_a_mask_of_its_own():
    columns = ((0, 20), (20, 60))
    _, mask = results(tensors(64, 64, 2, columns, 60, whole=True), columns, "library", 0.5)
    assert mask.shape == (2, 64, 8)
    keep = masks.unpack(mask, 64).float()
    assert 0.4 < (keep[0] == keep[1]).float().mean() < 0.6


def test_fused_refuses_columns_with_a_reason():
    problem = Problem(64, 96, 32, 4, torch.float32, "sm_86", segments=2, columns=True)
    choice = choose(problem, "fused")
    assert choice.strategy != "fused" and "fused was asked for, but: columns" in choice.reason
    assert "2 column ranges" in str(problem) and problem.key.startswith("2-of-")


@pytest.mark.parametrize(
    "columns", [(), ((0, 0),), ((4, 8), (0, 4)), ((0, 5), (4, 8)), ((-1, 3),), ((0, 97),)]
)
def test_columns_must_be_ascending_ranges(columns):
    with pytest.raises(ValueError, match=r"ascending \(start, stop\) within \(0, 96\)"):
        FusedLoRALinear.from_linear(nn.Linear(32, 96), columns=columns)


@given(ranges(), st.integers(1, 5))
@settings(PROPERTY, max_examples=30)
def test_folding_undoes_unfolding(columns_and_n, R):
    columns, N = columns_and_n
    lora_B = torch.randn(sum(b - a for a, b in columns), R)
    full = unfold(lora_B, columns, N)
    assert full.shape == (N, len(columns) * R) and torch.equal(fold(full, columns), lora_B)
    covered = sorted((*columns, *complement(columns, N)))
    assert [i for a, b in covered for i in range(a, b)] == list(range(N))
    if len(columns) > 1:
        full[columns[0][0], -1] = 1.0
        with pytest.raises(ValueError, match="not zero outside the blocks"):
            fold(full, columns)


# ---------------------------------------------------------------- models


def sliced_gpt2(**options) -> nn.Module:
    model = zoo.build("gpt2")
    config = LoRAConfig(rank=3, alpha=5, targets=("c_attn.q", "c_attn.v"), **options)
    add_lora(model, LoRAConfig(**vars(config) | {"train": ("score",)}))
    zoo.randomise(model, "lora_")
    return model


def dense_copy(model: nn.Module) -> nn.Module:
    """The same model with one plain LoRA of the summed rank for each sliced layer."""
    dense = copy.deepcopy(model)
    for path, layer in model.named_modules():
        if isinstance(layer, FusedLoRALinear):
            ranges_ = len(layer.columns)
            whole = FusedLoRALinear.from_linear(
                layer.to_linear(), rank=layer.rank * ranges_, alpha=layer.alpha * ranges_
            )
            with torch.no_grad():
                for parameter, value in zip(
                    (whole.lora_A, whole.lora_B), layer.unfolded(), strict=True
                ):
                    parameter.copy_(value)
            dense.set_submodule(path, whole)
    return dense


@pytest.mark.parametrize("strategy", SLICED)
def test_gpt2_with_query_and_value_adapted(strategy):
    model = sliced_gpt2(strategy=strategy)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.columns == ((0, 32), (64, 96))
    assert layer.lora_A.shape == (6, 32) and layer.lora_B.shape == (64, 3)
    dense = dense_copy(model)
    actual, wanted = zoo.run(model, 1), zoo.run(dense, 1)
    assert actual.keys() == wanted.keys()
    for name, value in actual.items():
        other = wanted[name]
        if name.endswith("lora_B"):
            blocks = other[:32, :3], other[64:, 3:]
            other = torch.cat(blocks)
            assert other.abs().sum() > 0
        torch.testing.assert_close(value, other, msg=name)


@pytest.mark.parametrize(
    "targets", [("q", "v"), ("re:.*attn\\.c_attn\\.[qv]",), ("h.0.attn.c_attn.q",)], ids=str
)
def test_parts_are_named_like_modules(targets):
    model = zoo.build("gpt2")
    report = add_lora(model, LoRAConfig(rank=2, targets=targets))
    one = targets[0].startswith("h.0")
    assert [row.name for row in report.fused] == [
        f"transformer.h.{i}.attn.c_attn" for i in range(1 if one else 2)
    ]
    columns = model.transformer.h[0].attn.c_attn.columns
    assert columns == (((0, 32),) if one else ((0, 32), (64, 96)))
    assert str(columns) in str(report)
    assert "1 column ranges" in str(explain(model)) if one else "2 column" in str(explain(model))


@pytest.mark.parametrize("name", ["gpt2", "modernbert"])
def test_query_key_and_value_are_what_they_are_called(name):
    """A token that is alone attends to itself, whatever its query and its key are."""
    alone = {key: value[:, :1] for key, value in zoo.batch().items()}
    plain = zoo.build(name)
    ((layer, names),) = family_of(plain).columns.items()
    assert names == ("q", "k", "v")
    expected = plain(**alone).logits
    for part in names:
        model = zoo.build(name)
        add_lora(model, LoRAConfig(rank=3, targets=(f"{layer}.{part}",)))
        zoo.randomise(model, "lora_")
        moved = (model(**alone).logits - expected).abs().max()
        assert moved > 1e-3 if part == "v" else moved < 1e-6
        assert (zoo.logits(model) - zoo.logits(plain)).abs().max() > 1e-4


def test_a_layer_is_adapted_whole_or_in_part():
    with pytest.raises(ValueError, match="as a whole and for a part"):
        add_lora(zoo.build("gpt2"), LoRAConfig(targets=("c_attn", "c_attn.q")))
    with pytest.raises(ValueError, match=r"near misses: 'c_attn.[kqv]', "):
        add_lora(zoo.build("gpt2"), LoRAConfig(targets=("c_attn.w",)))
    with pytest.raises(ValueError, match="matches no layer"):
        add_lora(zoo.build("bert"), LoRAConfig(targets=("query.q",)))
    model = zoo.build("gpt2")
    add_lora(model, LoRAConfig(targets=("re:.*attn.*",)))  # matches c_attn itself and its parts
    assert model.transformer.h[0].attn.c_attn.columns is None


def test_cross_attention_has_no_parts():
    import transformers as tf

    model = tf.GPT2LMHeadModel(tf.GPT2Config(**zoo.GPT2, add_cross_attention=True))
    report = add_lora(model, LoRAConfig(targets=("c_attn.q",)))
    assert [row.name for row in report.fused] == [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]


def test_merge_and_unmerge():
    model = sliced_gpt2()
    before = zoo.logits(model)
    layer = model.transformer.h[1].attn.c_attn
    frozen = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(zoo.logits(model), before)
    changed = (layer.weight != frozen).any(0)
    assert changed.tolist() == [True] * 32 + [False] * 32 + [True] * 32
    layer.unmerge()
    assert torch.equal(layer.weight, frozen)
    merge(model)
    assert not any(isinstance(m, FusedLoRALinear) for m in model.modules())
    torch.testing.assert_close(zoo.logits(model), before)


def test_a_training_step_under_torch_compile():
    layer = sliced_gpt2(dropout=0.5).transformer.h[0].attn.c_attn.train()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 32)
    found = []
    for call in (layer, compiled):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [leaf, layer.lora_A, layer.lora_B])))
    for eager, other in zip(*found, strict=True):
        assert eager.abs().sum() > 0
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("rslora", [False, True])
def test_saved_adapters_are_peft_s_and_come_back_as_columns(rslora, tmp_path):
    peft = pytest.importorskip("peft")
    model = sliced_gpt2(rslora=rslora)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["target_modules"] == ["c_attn"]
    theirs = peft.PeftModel.from_pretrained(zoo.build("gpt2"), tmp_path)
    torch.testing.assert_close(zoo.logits(theirs), zoo.logits(model))
    plain = zoo.build("gpt2")
    load_adapter(plain, tmp_path)
    layer = plain.transformer.h[0].attn.c_attn
    assert layer.columns == ((0, 32), (64, 96)) and layer.rank == 3
    assert layer.scale == pytest.approx(5 / (3**0.5 if rslora else 3))
    assert torch.equal(zoo.logits(plain), zoo.logits(model))
    injected = sliced_gpt2(rslora=rslora)
    zoo.randomise(injected, "score")
    load_adapter(injected, tmp_path)
    assert torch.equal(zoo.logits(injected), zoo.logits(model))


def test_an_adapter_of_the_whole_layer_does_not_fit_columns(tmp_path):
    model = sliced_gpt2()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    values = load_file(path)
    name = next(key for key in values if "h.1" in key and "lora_B" in key)
    values[name][40, 0] = 1.0  # a key column
    save_file(values, path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn: lora_B is not zero outside"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    whole = zoo.build("gpt2")
    load_adapter(whole, tmp_path)  # without the metadata it is one LoRA of rank 6
    assert whole.transformer.h[0].attn.c_attn.columns is None
    assert whole.transformer.h[0].attn.c_attn.rank == 6


def test_loralib_values_load_into_columns(tmp_path):
    model = sliced_gpt2()
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    save_file(state, tmp_path / "lora.safetensors")
    other = zoo.build("gpt2")
    add_lora(other, LoRAConfig(rank=3, alpha=5, targets=("c_attn.q", "c_attn.v")))
    load_adapter(other, tmp_path / "lora.safetensors")
    for key, value in state.items():
        assert torch.equal(other.state_dict()[key], value)
