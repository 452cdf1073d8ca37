"""fuse_peft on real PEFT models: values, gradients, several adapters, copies, the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

from lora_kernels import explain, fuse_peft, load_adapter, unfuse_peft
from lora_kernels.injection.peft import fused_peft_layers
from tests.injection.test_peft_fallbacks import with_adapters
from tests.support import zoo
from tests.support.zoo import peft_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_fused_layer_prints_as_peft_prints_it():
    model = peft_model()
    plain = repr(model)
    fuse_peft(model, "split")
    assert repr(model).replace("fused, strategy='split'", "") != repr(model)
    assert "lora.Linear(" in repr(model) and "FusedLinear" not in repr(model)
    unfuse_peft(model)
    assert repr(model) == plain


DECODER = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]

CASES: dict[str, Callable[[], nn.Module]] = {
    "roberta": peft_model,
    "gpt2-conv1d": lambda: peft_model("gpt2", fan_in_fan_out=True),
    "llama-no-bias": lambda: peft_model("llama"),
    "rslora": lambda: peft_model(use_rslora=True, rank_pattern={"query": 5}),
    "base-biases-train": lambda: peft_model(bias="all"),
    "dora": lambda: peft_model(use_dora=True),
    "dora-conv1d": lambda: peft_model("gpt2", fan_in_fan_out=True, use_dora=True),
    "dora-no-bias": lambda: peft_model("llama", use_dora=True, target_modules=DECODER),
    "lora-bias": lambda: peft_model(lora_bias=True),
    "lora-bias-without-bias": lambda: peft_model("llama", lora_bias=True),
}


@pytest.mark.parametrize("group", [True, False], ids=["grouped", "alone"])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_as_good_as_eager(build, group, fused_calls):
    model = build()
    eager = copy.deepcopy(model)
    report = fuse_peft(model, group=group)
    assert not report.skipped
    batches = 16  # these are few numbers
    zoo.judge_models(model, eager, batches)
    assert len(fused_calls) == batches * len(report.fused) >= 8


def test_half_precision_base_with_fp32_adapters_is_as_good_as_eager(fused_calls):
    base = zoo.build("roberta").to(torch.bfloat16)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config).eval()
    zoo.randomise(model, "lora_B")
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    eager = copy.deepcopy(model)
    fuse_peft(model)
    zoo.judge_models(model, eager, batches=16)  # few bf16 errors make a poor yardstick
    assert fused_calls


def test_names_values_flags_and_files_stay(tmp_path):
    model = peft_model()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    modules = list(model.modules())
    report = fuse_peft(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.base_model.model.classifier.original_module.parameters())
    assert report.counts["classifier"] == (head, head)
    assert report.counts["frozen"][0] == 0 and "fused 4 layers" in str(report)
    model.save_pretrained(tmp_path)
    plain = zoo.build("roberta")
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(zoo.logits(plain.double()), zoo.logits(unfuse_peft(model).double()))


def test_unfuse_restores_peft_to_the_bit(fused_calls):
    model = peft_model()
    expected = zoo.logits(model)
    instance_state = [set(vars(module)) for module in model.modules()]
    fuse_peft(model)
    fuse_peft(model)
    zoo.logits(model)
    assert len(fused_calls) == len(fused_peft_layers(model, 8)) == 4
    assert unfuse_peft(model) is model
    assert torch.equal(zoo.logits(model), expected)
    assert len(fused_calls) == 4 and not fused_peft_layers(model, 8)
    assert [set(vars(module)) for module in model.modules()] == instance_state


@pytest.mark.usefixtures("many_tokens")
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_several_plain_adapters_run_as_one_of_their_ranks(late, fused_calls):
    model = with_adapters()
    names = ["default", "plain2"]
    if late:
        fuse_peft(model)
    model.base_model.set_adapter(names)
    eager = unfuse_peft(copy.deepcopy(model))
    if not late:
        assert len(fuse_peft(model).fused) == 4
    zoo.judge_models(model, eager, batches=16)
    assert len(fused_calls) == 16 * 4
    assert {(p.R, p.segments) for _, p, _ in explain(model).rows} == {(5, 1)}
    model.set_adapter("default")
    zoo.logits(model)
    assert {p.segments for _, p, _ in explain(model).rows} == {2}


def test_a_layer_that_holds_one_of_several_active_adapters_runs_fused(fused_calls):
    models = peft_model(task_type=None), peft_model(task_type=None)
    for model in models:
        other = peft.LoraConfig(r=2, target_modules=["value"], lora_dropout=0.1)
        model.add_adapter("other", other)
        model.eval()
        model.base_model.set_adapter(["default", "other"])
        zoo.randomise(model, "lora_")
    report = fuse_peft(models[0])
    assert {row.name.split(".")[-1] for row in report.fused} == {"query"}
    torch.testing.assert_close(*map(zoo.logits, models))
    assert len(fused_calls) == 2


def test_a_shallow_copy_of_a_layer_runs_on_its_own_state(fused_calls):
    model = with_adapters()
    fuse_peft(model)
    layer = model.base_model.model.roberta.encoder.layer[0].attention.self.query
    x, twin = torch.randn(2, 5, 32), copy.copy(layer)
    expected, fused = layer(x), len(fused_calls)
    torch.testing.assert_close(twin(x), expected)
    assert len(fused_calls) == fused + 1
    layer.set_adapter("plain2")
    torch.testing.assert_close(twin(x), expected)
    twin._disable_adapters = True
    assert torch.equal(twin(x), layer.base_layer(x)) and not torch.equal(layer(x), twin(x))


def test_a_fused_model_goes_with_its_last_name():
    model = peft_model(target_modules=["query", "key", "value"])
    fuse_peft(model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    layers[0](torch.randn(2, 5, 32))  # the results of the others wait
    traces = [weakref.ref(layer) for layer in layers]
    gc.collect()
    gc.disable()
    try:
        del model, layers
        assert [trace() for trace in traces] == [None] * 6
    finally:
        gc.enable()


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="has no PEFT LoRA layer: use add_lora"):
        fuse_peft(zoo.build("bert"))
    with pytest.raises(ValueError, match="unknown strategy 'spilt'"):
        fuse_peft(peft_model(), strategy="spilt")


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_run_on_their_own_parameters(duplicate, fused_calls):
    model = peft_model()
    fuse_peft(model)
    expected, twin = zoo.logits(model), duplicate(model)
    assert torch.equal(zoo.logits(twin), expected)
    zoo.randomise(model, "lora_A")
    assert torch.equal(zoo.logits(twin), expected)
    assert not torch.equal(zoo.logits(model), expected)
    assert len(fused_calls) == 4 * 4


def test_dropout_masks_the_lora_branch_alone_by_pefts_rate():
    """With lora_A = lora_B = 1 (identities) and no base, the output is the dropped input itself."""
    size, p = 64, 0.25
    base = nn.Sequential(nn.Linear(size, size))
    config = peft.LoraConfig(r=size, lora_alpha=2 * size, lora_dropout=p, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.fill_(1.0)
        layer.lora_A["default"].weight.copy_(torch.eye(size))
        layer.lora_B["default"].weight.copy_(torch.eye(size))
    fuse_peft(model)
    x = torch.rand(100, size) + 0.5
    torch.manual_seed(0)
    kept = (model(x) - 1) / (2 * x / (1 - p))
    torch.testing.assert_close(kept, kept.round().clamp(0, 1))
    deviations = (kept.mean() - (1 - p)) / (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(deviations) < 4
    torch.manual_seed(0)
    assert torch.equal((model(x) - 1) / (2 * x / (1 - p)), kept)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), 1 + 2 * x)


def test_under_autocast_a_base_that_peft_merged_in_place_is_what_is_used():
    """PEFT merges through `weight.data`, which no version counter shows."""
    model, eager = peft_model(), peft_model()
    eager.load_state_dict(model.state_dict())
    fuse_peft(model)
    for change in (
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: [p.data.add_(0.5) for n, p in m.named_parameters() if "query.base" in n],
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = zoo.logits(model)
            for each in (model, eager):
                change(each)
            after, wanted = zoo.logits(model), zoo.logits(eager)
        torch.testing.assert_close(after, wanted, rtol=0.02, atol=0.02)
    assert not torch.equal(after, before)
