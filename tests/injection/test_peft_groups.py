"""Siblings of a fused PEFT model run as one problem, as long as PEFT's own state lets them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from lora_kernels import fuse_peft, unfuse_peft
from lora_kernels.injection.peft import fused_peft_layers
from tests.support import zoo
from tests.support.zoo import peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("many_tokens"),
]

QKV = ["query", "key", "value"]


def test_siblings_are_one_problem_and_explain_says_so():
    model = peft_model(target_modules=QKV)
    fuse_peft(model, group=False)
    assert zoo.nodes(model) == [1] * 6
    fuse_peft(model)
    assert zoo.nodes(model) == [3, 3]
    assert {p.segments for _, p, _ in fused_peft_layers(model, 8)} == {3}
    unfuse_peft(model)
    assert zoo.nodes(model) == []


def test_deberta_s_content_projections_are_one_problem_until_unfuse():
    model = peft_model("deberta-v3", target_modules=["query_proj", "key_proj", "value_proj"])
    eager = copy.deepcopy(model)
    fuse_peft(model)
    zoo.judge_models(model, eager)
    assert zoo.nodes(model) == [1, 1, 1, 1, 3, 3]
    fuse_peft(model)
    parents = [module for module in model.modules() if module is not model]
    assert sum(len(module._forward_pre_hooks) for module in parents) == 2
    unfuse_peft(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_sibling_that_changes_leaves_its_group_and_comes_back():
    model = peft_model(target_modules=QKV)
    eager = copy.deepcopy(model)
    fuse_peft(model)
    key = model.base_model.model.roberta.encoder.layer[0].attention.self.key
    key.merge()
    assert zoo.nodes(model) == [1, 1, 3]
    torch.testing.assert_close(zoo.logits(model), zoo.logits(eager))
    key.unmerge()
    assert zoo.nodes(model) == [3, 3]
    key.scaling["default"] *= 2
    assert zoo.nodes(model) == [1, 1, 1, 3]


def test_a_result_that_waits_is_not_that_of_another_adapter():
    """query(x), a switch of adapters, key(x): the key computed with the first must not come out."""
    model = peft_model(target_modules=QKV)
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=5, target_modules=QKV))
    zoo.randomise(model, "lora_B")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.mul_(-2)
    eager = copy.deepcopy(model)
    fuse_peft(model)
    ours, theirs = (
        m.base_model.model.roberta.encoder.layer[0].attention.self for m in (model, eager)
    )
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(ours.query(x), theirs.query(x))
    for m in (model, eager):
        m.set_adapter("other")
    torch.testing.assert_close(ours.key(x), theirs.key(x))
    torch.testing.assert_close(ours.query(x), theirs.query(x))
    with torch.no_grad():
        for attention in (ours, theirs):
            attention.value.lora_B["other"].weight.mul_(3)
    torch.testing.assert_close(ours.value(x), theirs.value(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_grouped_peft_block_compiles_to_one_graph(autocast):
    model = peft_model(target_modules=QKV)
    fuse_peft(model)
    attention = model.base_model.model.roberta.encoder.layer[0].attention.self
    torch._dynamo.reset()

    def block(x):
        return attention.query(x) * 2 + attention.key(x) * 3 - attention.value(x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32, requires_grad=True)
    leaves = [x, attention.key.lora_A["default"].weight, attention.value.lora_B["default"].weight]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        results = [f(x) for f in (block, compiled, compiled)]
    gradients = [torch.autograd.grad(y.float().square().sum(), leaves) for y in results]
    for y, grads in zip(results[1:], gradients[1:], strict=True):
        torch.testing.assert_close(y, results[0])
        for a, b in zip(grads, gradients[0], strict=True):
            assert b.abs().sum() > 0
            torch.testing.assert_close(a, b)
