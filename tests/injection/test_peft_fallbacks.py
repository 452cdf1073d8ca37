"""What fuse_peft leaves to PEFT's own forward: which states, the reason, and the way back."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable

import peft
import peft.utils.hotswap
import pytest
import torch
import transformers as tf
from torch import nn

from lora_kernels import explain, fuse_peft
from tests.support import zoo
from tests.support.small_layers import Int8Tensor
from tests.support.zoo import peft_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


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
