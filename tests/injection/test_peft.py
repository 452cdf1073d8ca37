"""fuse_peft on real PEFT models: values, gradients, every state that changes, the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable

import peft
import peft.utils.hotswap
import pytest
import torch
import transformers as tf
from torch import nn

from lora_kernels import explain, fuse_peft, load_adapter, unfuse_peft
from lora_kernels.autograd.functional import lora_layer, lora_linears
from lora_kernels.injection.peft import fused_peft_layers
from tests.support import zoo
from tests.support.small_layers import Int8Tensor
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


@pytest.fixture
def fused_calls(monkeypatch) -> list[int]:
    """Grows by one with each layer that runs fused, in a group or alone."""
    calls: list[int] = []
    alone, together = lora_layer, lora_linears

    def counted_alone(*args, **kwargs):
        calls.append(1)
        return alone(*args, **kwargs)

    def counted_together(x, layers, settings):
        calls.extend(1 for _ in layers)
        return together(x, layers, settings)

    monkeypatch.setattr("lora_kernels.injection.peft.lora_layer", counted_alone)
    monkeypatch.setattr("lora_kernels.layers.group.lora_linears", counted_together)
    return calls


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
    batches = 16 if "magnitude" in str(list(model.state_dict())) else 4  # these are few numbers
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


def disabled(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def two_active(model: nn.Module) -> None:
    model.base_model.set_adapter(["default", "dora"])


def hooked(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer.register_forward_hook(lambda _, __, output: output * 2)


def base_trains(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer.weight.requires_grad_()


def quantised(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer.weight = Int8Tensor.of(module.base_layer.weight)


def tensor_scaling(model: nn.Module) -> None:
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model)


STATES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "disabled": (disabled, "adapters are disabled"),
    "merged": (lambda model: model.merge_adapter(), "merged: only the base layer runs"),
    "two": (two_active, "2 adapters are active, not all plain LoRA without dropout: default, dora"),
    "variant": (lambda model: model.set_adapter("alora"), "'alora' is a LoRA variant: ALora"),
    "hooked": (hooked, "hooks or a patched forward"),
    "base-trains": (base_trains, "the base weight trains too"),
    "quantised": (quantised, "its weight is a tests.support.small_layers.Int8Tensor"),
    "tensor-scaling": (tensor_scaling, "the scaling of adapter 'default' is a Tensor, no number"),
}


def with_adapters() -> nn.Module:
    model = peft_model(task_type=None)
    config = {"r": 2, "target_modules": ["query", "value"]}
    model.add_adapter("plain2", peft.LoraConfig(**config, lora_alpha=9))
    model.add_adapter("alora", peft.LoraConfig(**config, alora_invocation_tokens=[1]))
    model.add_adapter("dora", peft.LoraConfig(**config, use_dora=True))
    model.add_adapter("biased", peft.LoraConfig(**config, lora_bias=True))
    zoo.randomise(model, "lora_B")
    return model.eval()


@pytest.mark.parametrize("change, reason", STATES.values(), ids=STATES)
def test_what_is_no_plain_lora_runs_pefts_forward(change, reason, fused_calls):
    """In whichever order: the state may change after fuse_peft or have changed before."""
    late, early, eager = with_adapters(), with_adapters(), with_adapters()
    assert len(fuse_peft(late).fused) == 4
    for model in (late, early, eager):
        change(model)
    report = fuse_peft(early)
    assert not report.fused and len(report.skipped) == 4
    assert re.search(reason, report.skipped[0].reason)
    expected = zoo.logits(eager)
    assert torch.equal(zoo.logits(late), expected)
    assert torch.equal(zoo.logits(early), expected)
    assert not fused_calls


def test_switching_back_runs_fused_again(fused_calls):
    model, eager = with_adapters(), with_adapters()
    fuse_peft(model)
    with model.disable_adapter(), eager.disable_adapter():
        assert torch.equal(zoo.logits(model), zoo.logits(eager))
    model.merge_adapter()
    zoo.logits(model)
    model.unmerge_adapter()
    assert not fused_calls
    for adapter in ("plain2", "dora", "biased", "default"):
        fresh = with_adapters()
        for each in (model, fresh):
            each.set_adapter(adapter)
        torch.testing.assert_close(
            zoo.logits(copy.deepcopy(model).double()), zoo.logits(fresh.double())
        )
    assert len(fused_calls) == 16


def told(model: nn.Module, **options) -> list[str]:
    """What a forward of the model warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**zoo.batch(), **options)
    return [str(each.message) for each in caught if "PEFT's own forward" in str(each.message)]


def test_a_layer_that_was_reported_as_fused_says_once_that_it_is_not(fused_calls):
    model = with_adapters()
    fuse_peft(model)
    assert told(model) == [] and explain(model).unfused == ()
    two_active(model)
    (text,) = told(model)
    assert text.endswith("plain LoRA without dropout: default, dora")
    assert told(model) == [] and len(explain(model).unfused) == 4 and not explain(model).rows
    assert "unfused 4 layers\n     4  2 adapters are active" in str(explain(model))
    model.set_adapter("default")
    names = ["default", "biased", "__base__"]
    (text,) = told(model, adapter_names=names)
    assert text.endswith("The reason: adapter 'biased' has a bias of its own (lora_bias)")
    assert told(model, adapter_names=names) == []
    assert {row.reason for row in explain(model).unfused} == {
        "in its last call: adapter 'biased' has a bias of its own (lora_bias)"
    }
    assert told(model) == [] and explain(model).unfused == () and len(explain(model).rows) == 4


def test_what_was_reported_as_unfused_and_what_is_off_say_nothing():
    model = with_adapters()
    two_active(model)
    assert not fuse_peft(model).fused
    assert told(model) == []
    model.set_adapter("default")
    zoo.logits(model)
    with model.disable_adapter():
        assert told(model) == [] and len(explain(model).unfused) == 4
    assert explain(model).unfused == ()


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


def test_layers_that_are_no_linear_are_reported_and_left_alone():
    model = peft_model(target_modules=["query", "word_embeddings"])
    report = fuse_peft(model)
    assert len(report.fused) == 2
    assert [row.name.split(".")[-1] for row in report.skipped] == ["word_embeddings"]
    assert "Embedding is no plain LoRA of a linear layer" in report.skipped[0].reason


def test_global_module_hooks_see_every_call_that_peft_makes(fused_calls):
    def calls_of(model: nn.Module) -> list[str]:
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(type(module).__name__.removeprefix("Fused"))
        )
        try:
            zoo.logits(model)
            reasons.extend(row.reason for row in fuse_peft(model).skipped if model is fused)
        finally:
            handle.remove()
        return seen

    reasons: list[str] = []
    fused, eager = peft_model(), peft_model()
    fuse_peft(fused)
    assert calls_of(fused) == calls_of(eager) and not fused_calls
    assert len(reasons) == 4 and "there are global module hooks" in reasons[0]
    zoo.logits(fused)
    assert len(fused_calls) == 4, "and without them it runs fused again"


def test_target_parameters_are_reported_and_run_as_they_did():
    torch.manual_seed(0)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    base = tf.MixtralForCausalLM(tf.MixtralConfig(**{**zoo.LLAMA, **sizes})).eval()
    parameters = ["mlp.experts.gate_up_proj", "k_proj.weight"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = peft.get_peft_model(base, config)
    zoo.randomise(model, "lora_B")
    expected = zoo.logits(model)
    report = fuse_peft(model)
    assert [row.name.split(".")[-1] for row in report.fused] == ["q_proj"]
    assert sorted(row.name.split(".")[-1] for row in report.skipped) == ["experts", "k_proj"]
    assert all("on a parameter (target_parameters)" in row.reason for row in report.skipped)
    torch.testing.assert_close(zoo.logits(model), expected)


def test_a_traced_model_is_pefts(fused_calls):
    model = peft_model()
    fuse_peft(model)
    ids = zoo.batch()["input_ids"]
    traced = torch.jit.trace(model.base_model.model, ids, strict=False, check_trace=False)
    assert not fused_calls
    torch.testing.assert_close(traced(ids)["logits"], zoo.logits(model))


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
