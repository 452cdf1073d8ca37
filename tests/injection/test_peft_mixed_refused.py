"""Mixed batches that cannot train, or cannot run: each is refused by name, and leaves no trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import explain
from tests.injection.test_peft_mixed import fused, step, three, training
from tests.support import zoo
from tests.support.small_layers import Int8Tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

QUERY = "bert.encoder.layer.0.attention.self.query"


def other(**options) -> nn.Module:
    """The model of a, b and c with one adapter more, d, which trains too."""
    model = three("bert", heads=False)
    model.add_adapter("d", peft.LoraConfig(**{"r": 2, "target_modules": ["query"]} | options))
    return training(fused(model), *"abcd")


def hooks(model: nn.Module) -> list[int]:
    """How many hooks each module of the base model has."""
    return [len(module._forward_pre_hooks) for module in model.base_model.model.modules()]


def late() -> nn.Module:
    model = fused(three("bert", heads=False))
    model.add_adapter("d", peft.LoraConfig(r=2, target_modules=["classifier"]))
    return training(model, *"abcd")


def quantised() -> nn.Module:
    model = three("bert", heads=False)
    base = model.get_submodule(f"base_model.model.{QUERY}").base_layer
    base.weight = Int8Tensor.of(base.weight)
    return training(fused(model))


def normalized() -> nn.Module:
    model = three("bert", heads=False)
    model.base_model.model.bert.pooler.activation = nn.BatchNorm1d(32)
    return training(fused(model))


def experts() -> nn.Module:
    """One expert that gets all examples: nothing but its name tells it from another layer."""
    base = nn.Sequential()
    base.add_module("experts", nn.ModuleList([nn.Linear(4, 4)]))
    base.forward = base.experts[0].forward
    config = peft.LoraConfig(r=2, target_modules=["experts.0"])
    return fused(peft.get_peft_model(base, config, adapter_name="d")).train()


def with_bias() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all")
    return fused(peft.get_peft_model(zoo.build("bert"), config, adapter_name="d")).train()


class Case(NamedTuple):
    """A model whose adapter d cannot train in a mixed batch, and what the error says."""

    name: str
    build: Callable[[], nn.Module]
    says: str


CASES = (
    Case("dora", lambda: other(use_dora=True), f"cannot train '{QUERY}': adapter 'd' is DoRA"),
    Case("lora-bias", lambda: other(lora_bias=True),
        f"cannot train '{QUERY}': adapter 'd' has a bias of its own"),
    Case("embedding", lambda: other(target_modules=["word_embeddings"]),
        "cannot train 'bert.embeddings.word_embeddings': .*Embedding is no plain LoRA"),
    Case("tokens", lambda: other(trainable_token_indices=[5]),
        "cannot train 'bert.embeddings.word_embeddings': .*TrainableTokensWrapper"),
    Case("late", late, "cannot train 'classifier': it is not fused .* call it again"),
    Case("bias", with_bias, "adapter 'd' has bias='all': it trains biases of the base model"),
    Case("experts", experts, "cannot train 'experts.0': experts get tokens in an order of their"),
)  # fmt: skip
OF_ALL = (
    Case("quantised", quantised, f"cannot train '{QUERY}': its weight is a .*Int8Tensor"),
    Case("batch-norm", normalized, "'bert.pooler.activation': it normalizes over the rows of all"),
)


@pytest.mark.parametrize("case", [*CASES, *OF_ALL], ids=lambda case: case.name)
def test_what_would_train_wrong_is_refused_by_name(case):
    model = case.build()
    name = "a" if case in OF_ALL else "d"
    batch = {"input": torch.randn(2, 4)} if case.name == "experts" else zoo.batch(rows=2)
    before = hooks(model)
    with pytest.raises(ValueError, match=case.says):
        model(**batch, adapter_names=["__base__", name])
    assert hooks(model) == before


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.name)
def test_the_other_adapters_of_such_a_model_train(case):
    """All but those of PEFT's trained tokens, whose wrapper has nothing for other adapters."""
    if case.name == "tokens":
        with pytest.raises(ValueError, match=case.says):
            step(case.build(), tuple("ab"))
        return
    found = step(case.build(), tuple("ab"))
    assert any(".a." in key for key in found) and any(".b." in key for key in found)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ("abc", TypeError, "must be a list with a name for each example: got 'abc'"),
        ([0, 1, 2], TypeError, "must be a list with a name for each example"),
        (["a", "b"], ValueError, "Length of `adapter_names` should be .* 2 and 3"),
        (["a", "b", "x"], ValueError, "adapter(\\(s\\): x| 'x': there are \\['a', 'b', 'c'\\])"),
    ],
    ids=["string", "numbers", "too-few", "unknown"],
)
def test_names_that_do_not_fit_are_refused_and_forgotten(names, error, says, train):
    """PEFT leaves its hooks on after an error: the next call would still be a mixed one."""
    model = training(fused(three())).train(train)
    expected = model(**zoo.batch()).logits
    with pytest.raises(error, match=says):
        model(**zoo.batch(), adapter_names=names)
    assert torch.equal(model(**zoo.batch()).logits, expected)


def test_a_layer_whose_input_is_no_batch_of_examples_is_refused():
    """DeBERTa-v3's query and key also read the relative positions, which all examples share."""
    a, b = (peft.LoraConfig(r=r, target_modules=["query_proj", "value_proj"]) for r in (2, 3))
    model = peft.get_peft_model(zoo.build("deberta-v3"), a, adapter_name="a")
    model.add_adapter("b", b)
    with pytest.raises(ValueError, match="number of inputs, but got 3 and 1"):
        training(fused(model), "a", "b")(**zoo.batch(), adapter_names=["a", "b", "a"])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_merged_layers_are_refused(train):
    model = training(fused(three())).train(train)
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(**zoo.batch(), adapter_names=list("abc"))


def test_a_frozen_adapter_is_refused_where_gradients_are_wanted():
    model = training(fused(three()), "a", "b")
    with pytest.raises(ValueError, match=r"adapter 'c' has rows .* but none of its LoRA"):
        step(model, tuple("abc"))
    assert step(model, ("a", "b", "__base__"))
    with torch.no_grad():
        model(**zoo.batch(), adapter_names=list("abc"))


def test_a_frozen_head_is_named():
    model = training(fused(three()))
    for parameter in model.base_model.model.classifier.modules_to_save["b"].parameters():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen .* trains: classifier\.b\. model\.set_req"):
        step(model, tuple("abc"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="frozen")
        step(model, ("a", "c", "__base__"))


@pytest.mark.parametrize("around", ["checkpoint", "reentrant", "no_grad"])
def test_a_checkpoint_that_would_forget_the_names_is_refused(around):
    model = training(fused(three()))
    layer = model.base_model.model.bert.encoder.layer[0]
    forward = layer.forward

    def changed(x, *args, **kwargs):
        if around == "no_grad":
            with torch.no_grad():
                return forward(x, *args, **kwargs)
        if around == "checkpoint":
            return checkpoint(forward, x, *args, use_reentrant=False, **kwargs)
        return checkpoint(lambda x: forward(x, *args, **kwargs), x, use_reentrant=True)

    layer.forward = changed
    with pytest.raises(RuntimeError, match=r"Use gradient_checkpointing_enable\(\)"):
        step(model, tuple("abc"))
    del layer.forward
    assert step(model, tuple("abc"))


def test_a_head_that_reads_more_than_one_tensor_is_refused():
    model = training(fused(three()))
    head = model.base_model.model.classifier
    x = torch.randn(2, 32)
    for call in (lambda: head(x, x, adapter_names=["a", "b"]), lambda: head(adapter_names=["a"])):
        with pytest.raises(ValueError, match="gets other than one tensor, by position"):
            call()


def test_in_inference_a_layer_that_cannot_be_packed_runs_pefts_forward_and_says_so():
    model = other(lora_bias=True).eval()
    eager, names = copy.deepcopy(three("bert", heads=False)), ["a", "d", "__base__"]
    eager.add_adapter("d", peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True))
    eager.load_state_dict(model.state_dict())
    with torch.no_grad(), pytest.warns(UserWarning, match="reason: adapter 'd' has a bias of its"):
        found = model(**zoo.batch(), adapter_names=names).logits
    with torch.no_grad():
        torch.testing.assert_close(found, eager(**zoo.batch(), adapter_names=names).logits)
    assert {row.name.rpartition(".")[2] for row in explain(model).unfused} == {"query"}
    model(**zoo.batch(), adapter_names=list("abc"))
    assert not explain(model).unfused


def test_adapters_of_two_dtypes_are_refused_in_training_and_pefts_in_inference():
    model = training(fused(three()))
    model.get_submodule(f"base_model.model.{QUERY}").lora_A["b"].double()
    with pytest.raises(ValueError, match=f"'{QUERY}': its adapters differ in dtype: torch.float32"):
        step(model, tuple("abc"))
