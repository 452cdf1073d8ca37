"""The base model's output by disable_adapter, LoRA+ and LoRA-FA."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, disable_adapter, lora_fa, lora_plus
from lora_kernels.injection.inject import fused_layers
from lora_kernels.strategies.problem import FEW_ELEMENTS
from tests.adapters.test_load_save import injected
from tests.support import zoo
from tests.support.zoo import peft_model


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_without_its_adapter_a_model_is_the_base_model(name, merged):
    base = zoo.build(name)
    model = injected(name, train=(), targets="all-linear", dropout=0.2)
    tuned = zoo.logits(model)
    if merged:
        for layer in fused_layers(model).values():
            layer.merge()
    for context in (lambda: disable_adapter(model), model.disable_adapter):
        with context():
            with disable_adapter(model):
                assert torch.equal(zoo.logits(model), zoo.logits(base))
            assert torch.equal(zoo.logits(model), zoo.logits(base))
        torch.testing.assert_close(zoo.logits(model), tuned)
        assert not torch.equal(zoo.logits(model), zoo.logits(base))
    with pytest.raises(ZeroDivisionError), disable_adapter(model):
        1 / 0  # noqa: B018
    assert not any(layer.disabled for layer in fused_layers(model).values())
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        torch.testing.assert_close(zoo.logits(model), tuned)


def test_what_trains_in_full_is_named():
    model = injected("roberta")
    with pytest.warns(UserWarning, match="classifier trains in full"), model.disable_adapter():
        zoo.logits(model)
    with (
        pytest.raises(ValueError, match="has no LoRA layer of add_lora"),
        disable_adapter(zoo.build("roberta")),
    ):
        pass


def groups_of(optimizer, model) -> dict[str, tuple[float, float]]:
    names = {id(p): name.replace("base_model.model.", "") for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.filterwarnings("ignore")
def test_lora_plus_has_pefts_groups():
    from peft.optimizers import create_loraplus_optimizer

    model = peft_model(target_modules=["query", "word_embeddings"], bias="lora_only")
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    ours = torch.optim.AdamW(lora_plus(model, 1e-3, ratio=8, weight_decay=0.1))
    assert groups_of(ours, model) == groups_of(theirs, model)
    injected_model = zoo.build("roberta")
    add_lora(injected_model, LoRAConfig(targets="query", train="classifier"))
    found = groups_of(torch.optim.AdamW(lora_plus(injected_model, 1e-3)), injected_model)
    trained = {n for n, p in injected_model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert all(math.isclose(found[n][0], 0.016) == ("lora_B" in n or "bias" in n) for n in trained)


def test_lora_fa_trains_lora_B_alone_and_saves_no_x():
    for model in (injected(train=()), peft_model(task_type=None)):
        assert lora_fa(model) is model
        model(**zoo.batch()).logits.sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all("lora_B" in name for name in trained)
    layer = next(iter(fused_layers(lora_fa(injected(train=()))).values()))
    x = torch.randn(FEW_ELEMENTS // layer.in_features + 1, layer.in_features)
    y = layer(x)  # whose tensors are freed with it
    saved = y.grad_fn.saved_tensors
    assert all(t is None or t.data_ptr() != x.data_ptr() for t in saved)


def test_a_model_without_lora_is_refused():
    for refused, words in ((lora_plus, "no lora_B that trains"), (lora_fa, "has no lora_A")):
        with pytest.raises(ValueError, match=words):
            refused(zoo.build("roberta"), *([1e-3] if refused is lora_plus else []))
    with pytest.raises(ValueError, match="ratio must be a finite number"):
        lora_plus(injected(), 1e-3, ratio=math.inf)
    assert peft.__version__
