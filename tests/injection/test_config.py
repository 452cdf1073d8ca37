"""LoRAConfig against PEFT's LoraConfig: patterns, exclusions, layers by index, named starts."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, LoRAConfig, add_lora, load_adapter, merge, save_adapter
from lora_kernels.injection.inject import fused_layers
from tests.adapters.test_load_save import from_peft, injected
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def scales_of_peft(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {
        path.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }


NARROWED = {
    "ranks": (
        {"rank_pattern": {"value": 2, "layer.1.attention.self.query": 6}, "rslora": True},
        {"rank_pattern": {"value": 2, "layer.1.attention.self.query": 6}, "use_rslora": True},
    ),
    "the-first-pattern-counts": (
        {"alpha_pattern": {r"^roberta.encoder.layer.0.*": 3, "query": 7, "value": 9}},
        {"alpha_pattern": {r"^roberta.encoder.layer.0.*": 3, "query": 7, "value": 9}},
    ),
    "exclude": (
        {"exclude": ("layer.0.attention.self.query", r"re:.*layer\.1.*value")},
        {"exclude_modules": ["layer.0.attention.self.query", "layer.1.attention.self.value"]},
    ),
    "layers": ({"layers": (1,)}, {"layers_to_transform": [1]}),
    "all-linear": (
        {"targets": "all-linear", "layers": 0, "exclude": "output.dense"},
        {"target_modules": ["query", "key", "value", "dense"], "layers_to_transform": 0,
         "exclude_modules": ["output.dense"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("ours, theirs", NARROWED.values(), ids=NARROWED)
def test_the_same_layers_get_the_same_rank_and_scale_as_by_peft(ours, theirs):
    model = zoo.build("roberta")
    add_lora(model, LoRAConfig(**{"rank": 4, "alpha": 5, "targets": ("query", "value")} | ours))
    config = {"r": 4, "lora_alpha": 5, "target_modules": ["query", "value"]} | theirs
    reference = peft.get_peft_model(
        zoo.build("roberta"), peft.LoraConfig(task_type="SEQ_CLS", **config)
    )
    found = {path: (layer.rank, layer.scale) for path, layer in fused_layers(model).items()}
    assert found == scales_of_peft(reference)


REFUSED = {
    "unused-exclude": ({"exclude": "valeu"}, r"exclude='valeu' means no target; near misses:"),
    "unused-layer": ({"layers": (1, 7)}, r"layers=\(1, 7\): no target in \[7\], only in \[0, 1\]"),
    "unused-pattern": ({"rank_pattern": {"quary": 3}}, "pattern 'quary' matches no target; near"),
    "broken-pattern": ({"alpha_pattern": {"(": 3}}, "is not a regular expression"),
    "rank": ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be an integer of"),
    "alpha": ({"alpha_pattern": {"query": math.nan}}, r"alpha_pattern\['query'\] must be a finite"),
    "layers": ({"layers": ()}, "layers must be an integer or several"),
    "init": ({"init": "eva"}, "init must be one of kaiming, gaussian, .*: got 'eva'"),
    "odd": ({"init": "orthogonal", "rank": 3}, "'orthogonal' needs an even rank: got 3"),
    "odd-by-pattern": (
        {"init": "orthogonal", "rank_pattern": {"query": 3}}, "needs an even rank: got 3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_is_refused(changes, words):
    model = zoo.build("roberta")
    with pytest.raises(ValueError, match=words):
        add_lora(model, LoRAConfig(**{"targets": ("query", "value")} | changes))
    assert not fused_layers(model)
    assert hash(LoRAConfig()) == hash(LoRAConfig())


STARTS = [
    (name, init)
    for name in ("roberta", "gpt2", "llama")
    for init in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")
    if (name, init) != ("gpt2", "olora")  # PEFT's QR takes the weight of a Conv1D for its transpose
]
TARGETS = {"roberta": ("query", "value"), "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}


def started(name: str, init: str) -> nn.Module:
    model = zoo.build(name)
    torch.manual_seed(7)
    add_lora(model, LoRAConfig(rank=4, alpha=6, targets=TARGETS[name], init=init))
    return model


@pytest.mark.parametrize("name, init", STARTS)
def test_a_start_is_pefts_to_the_bit_and_is_the_base_model(name, init):
    ours, base, wrapped = started(name, init), zoo.build(name), zoo.build(name)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(TARGETS[name]), init_lora_weights=init,
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    torch.manual_seed(7)
    theirs = peft.get_peft_model(wrapped, config).base_model.model.state_dict()
    for path, layer in fused_layers(ours).items():
        assert torch.equal(layer.weight, theirs[f"{path}.base_layer.weight"])
        assert torch.equal(layer.lora_A, theirs[f"{path}.lora_A.default.weight"])
        assert torch.equal(layer.lora_B, theirs[f"{path}.lora_B.default.weight"])
        assert (layer.taken is not None) == init.startswith(("pissa", "olora"))
    torch.testing.assert_close(zoo.logits(ours), zoo.logits(base))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_start_that_took_from_the_weight_is_saved_for_the_base_model(name, init, tmp_path):
    ours = started(name, init)
    zoo.randomise(ours, "lora_A")
    expected = zoo.logits(ours)
    save_adapter(ours, tmp_path)
    again = zoo.build(name)
    load_adapter(again, tmp_path)
    for other in (from_peft(tmp_path, name), again):
        torch.testing.assert_close(zoo.logits(other), expected)
    with ours.disable_adapter():
        torch.testing.assert_close(zoo.logits(ours), zoo.logits(zoo.build(name)))
    torch.testing.assert_close(zoo.logits(merge(ours)), expected)


def test_a_trainers_checkpoint_of_a_random_start_can_be_resumed(tmp_path):
    from safetensors.torch import load_file

    ours = started("roberta", "pissa_niter_4")
    zoo.randomise(ours, "lora_A")
    ours.save_pretrained(tmp_path)
    other = zoo.build("roberta")
    add_lora(other, LoRAConfig(rank=4, alpha=6, targets=TARGETS["roberta"], init="pissa_niter_4"))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(zoo.logits(other), zoo.logits(ours))
    with other.disable_adapter(), ours.disable_adapter():
        assert torch.equal(zoo.logits(other), zoo.logits(ours))


def test_a_start_never_changes_a_weight_that_others_read():
    model = zoo.build("gemma-lm")
    with pytest.raises(ValueError, match=r"would change the weight of 'lm_head', which is tied"):
        add_lora(model, LoRAConfig(targets="lm_head", init="pissa"))
    with pytest.raises(ValueError, match="is for whole layers: this one has columns"):
        add_lora(zoo.build("gpt2"), LoRAConfig(targets=("c_attn.q",), init="olora"))
    base = nn.Linear(8, 6)
    before = base.weight.detach().clone()
    FusedLoRALinear.from_linear(base, rank=2, init="pissa")
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("name", ["gpt2-lm", "gemma-lm"])
def test_lm_head_is_a_target_that_loads_and_saves(name, tmp_path):
    ours = injected(name, targets=("lm_head",), train=())
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(zoo.logits(from_peft(tmp_path / "ours", name)), zoo.logits(ours))
    theirs = peft.get_peft_model(
        zoo.build(name), peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=5)
    ).eval()
    zoo.randomise(theirs, "lora_B")
    theirs.save_pretrained(tmp_path / "theirs")  # which holds lm_head's own weight too
    for model in (ours, zoo.build(name)):
        load_adapter(model, tmp_path / "theirs")
        torch.testing.assert_close(zoo.logits(model), zoo.logits(theirs))
