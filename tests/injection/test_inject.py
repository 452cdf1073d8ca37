"""add_lora and merge on tiny models of every family: values, gradients, freezing, messages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, LoRAConfig, add_lora, merge
from lora_kernels.injection.families import FAMILIES, family_of, heads_of
from lora_kernels.injection.inject import fused_layers
from tests.support import zoo

every_model = pytest.mark.parametrize("name", zoo.MODELS)


def injected(name: str, **changes) -> nn.Module:
    """A model of the zoo with LoRA on its family's targets, all heads trained, lora_B not zero."""
    model = zoo.build(name)
    add_lora(model, LoRAConfig(**{"rank": 3, "alpha": 5, "train": heads_of(model), **changes}))
    zoo.randomise(model, "lora_B")
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def state(model: nn.Module) -> dict:
    """All that add_lora may change: classes, flags and values."""
    classes = {name: type(module) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"classes": classes, "flags": flags, "config": hasattr(model, "lora_config")}


class WavLMAttention(nn.Module):
    """Transformers' computes with `q_proj.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.q_proj.weight, self.q_proj.bias)


class Custom(nn.Module):
    """No family: two blocks of linear layers, one read by torch's attention directly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "seq": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(8, 2)
        self.wavlm = WavLMAttention()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["seq"](torch.tanh(block["q"](x)))
        return self.score(self.norm(x))


@every_model
def test_injecting_changes_no_logit_until_lora_B_moves(name):
    model = zoo.build(name)
    before = zoo.logits(model)
    report = add_lora(model, LoRAConfig(rank=3, alpha=5))
    assert len(report.fused) == len(fused_layers(model)) >= 2
    assert torch.equal(zoo.logits(model), before)
    zoo.randomise(model, "lora_B")
    assert (zoo.logits(model) - before).abs().max() > 1e-4


@every_model
def test_logits_and_every_gradient_match_the_plain_formula(name):
    model = injected(name)
    zoo.judge_models(model, zoo.plain_copy(model))


@every_model
def test_exactly_lora_and_the_head_train(name):
    model = injected(name)
    heads = tuple(f"{head}." for head in heads_of(model))
    expected = {
        key
        for key, _ in model.named_parameters()
        if key.endswith((".lora_A", ".lora_B")) or key.startswith(heads)
    }
    assert trainable(model) == expected
    assert len(expected) == 2 * len(fused_layers(model)) + sum(
        len(list(model.get_submodule(head).parameters())) for head in heads_of(model)
    )


@every_model
def test_merge_gives_plain_layers_and_the_same_logits(name):
    model, plain = injected(name), zoo.build(name)
    unmerged, base = zoo.logits(copy.deepcopy(model).double()), zoo.logits(plain)
    assert merge(model.double()) is model
    # In double, where merging rounds far below what single precision resolves.
    torch.testing.assert_close(zoo.logits(model), unmerged)
    assert (unmerged - base).abs().max() > 1e-4
    assert state(model)["classes"] == state(plain)["classes"]
    assert model.state_dict().keys() == plain.state_dict().keys()
    add_lora(model, LoRAConfig())


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_has_a_model_in_the_zoo(row):
    models = [zoo.build(name) for name in zoo.MODELS]
    assert any(family_of(model) is row and heads_of(model) for model in models)


def test_report_counts_every_parameter_once_and_shows_an_unfrozen_head():
    model = zoo.build("roberta")
    head = sum(p.numel() for p in model.classifier.parameters())
    lora = 4 * 2 * 3 * 32
    report = add_lora(model, LoRAConfig(rank=3, train=("classifier",)))
    assert report.counts["lora"] == (lora, lora)
    assert report.counts["classifier"] == (head, head)
    assert report.counts["embeddings"][0] == report.counts["frozen"][0] == 0
    assert report.total == sum(p.numel() for p in model.parameters())
    assert (
        report.trainable
        == lora + head
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    text = str(report)
    assert f"{head:,}" in text and f"{(lora + head) / report.total:.3%}" in text
    assert "fused 4 layers" in text and "library" in text


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q"], ["blocks.0.q", "blocks.1.q"]),
        ("1.seq", ["blocks.1.seq"]),
        (r"re:blocks\.0\..*", ["blocks.0.q", "blocks.0.seq"]),
        (["q", "re:.*1.seq"], ["blocks.0.q", "blocks.1.q", "blocks.1.seq"]),
        ("all-linear", ["blocks.0.q", "blocks.0.seq", "blocks.1.q", "blocks.1.seq"]),
    ],
    ids=["name", "suffix", "regex", "mixed", "all-linear"],
)
def test_targets_match_whole_components(targets, expected):
    model = Custom()
    report = add_lora(model, LoRAConfig(targets=targets))
    assert [row.name for row in report.fused] == expected == list(fused_layers(model))


def test_all_linear_says_what_it_leaves_alone():
    reasons = {
        r.name: r.reason for r in add_lora(Custom(), LoRAConfig(targets="all-linear")).skipped
    }
    assert "MultiheadAttention reads this weight" in reasons["attention.out_proj"]
    assert "WavLMAttention reads this weight" in reasons["wavlm.q_proj"]
    assert "TransformerEncoderLayer reads this weight" in reasons["encoder.linear1"]
    assert reasons["score"] == "task head"
    gpt2 = add_lora(zoo.build("gpt2-lm"), LoRAConfig(targets="all-linear"))
    assert [(row.name, row.reason) for row in gpt2.skipped] == [("lm_head", "output embedding")]
    assert len(gpt2.fused) == 2 * 4


def test_a_target_inside_the_head_is_skipped_in_favour_of_the_others():
    model = zoo.build("roberta")
    report = add_lora(model, LoRAConfig(targets="dense", train="classifier"))
    assert [(row.name, "classifier" in row.reason) for row in report.skipped] == [
        ("classifier.dense", True)
    ]
    assert type(model.classifier.dense) is nn.Linear
    assert model.classifier.dense.weight.requires_grad


def test_a_layer_with_hooks_or_a_patched_forward_is_skipped():
    model = Custom()
    model.blocks[0]["q"].register_forward_hook(lambda *_: None)
    model.blocks[1]["q"].forward = model.blocks[1]["q"].forward
    report = add_lora(model, LoRAConfig(targets=("q", "0.seq")))
    assert [row.name for row in report.fused] == ["blocks.0.seq"]
    assert [row.reason.split()[-1] for row in report.skipped] == ["lost", "undo"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": "qury"}, r"target 'qury' matches no layer; near misses: 'query'"),
        (
            {"targets": ("query", "zzzz")},
            r"target 'zzzz' matches no layer; there are: .*dense.*query",
        ),
        ({"targets": "re:("}, r"'re:\(' is not a regular expression"),
        ({"targets": "LayerNorm"}, r"nothing can be fused \(.*LayerNorm"),
        ({"targets": "classifier.dense", "train": "classifier"}, r"inside train='classifier'"),
        (
            {"targets": ("query", "out_proj"), "train": "classifier"},
            r"has LoRA or is trained in full",
        ),
        ({"targets": "query", "train": "query"}, r"inside train='query'"),
        ({"train": "clasifier"}, r"train='clasifier' matches no module; near misses: 'classifier'"),
        ({"train": "dropout"}, r"train='dropout' matches no module"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_names_get_one_message_and_leave_the_model_alone(changes, message):
    model = zoo.build("roberta")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**changes))
    assert state(model) == before


def test_an_unknown_family_asks_for_targets():
    with pytest.raises(
        ValueError, match=r"model_type None .Custom.: pass targets=; .*q, q_proj, score, seq"
    ):
        add_lora(Custom(), LoRAConfig())
    add_lora(Custom(), LoRAConfig(targets="q", train="score"))
    with pytest.raises(TypeError, match=r"config must be a LoRAConfig: got a builtins\.dict"):
        add_lora(Custom(), {"rank": 8})


def test_a_second_add_lora_is_refused():
    model = injected("bert")
    before = state(model)
    with pytest.raises(ValueError, match=r"4 LoRA layers already .*merge\(model\) first"):
        add_lora(model, LoRAConfig())
    assert state(model) == before
    with pytest.raises(ValueError, match="no LoRA layer to merge"):
        merge(zoo.build("bert"))


def test_a_part_of_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    wrapped = peft.get_peft_model(zoo.build("bert"), config)
    part = wrapped.base_model.model.bert.encoder
    before = state(part)
    with pytest.raises(ValueError, match=r"query' is a layer of PEFT's: call fuse_peft"):
        add_lora(part, LoRAConfig(targets=("value",)))
    assert state(part) == before


def test_a_failure_while_building_layers_leaves_the_model_alone(monkeypatch):
    model, made = zoo.build("bert"), []
    before, original = state(model), FusedLoRALinear.from_linear

    def fail_at_the_third(layer, **options):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError
        return original(layer, **options)

    monkeypatch.setattr(FusedLoRALinear, "from_linear", fail_at_the_third)
    with pytest.raises(MemoryError):
        add_lora(model, LoRAConfig())
    assert state(model) == before


def test_tied_weights_stay_tied_and_are_not_merged_apart():
    model = zoo.build("gpt2-lm")
    add_lora(model, LoRAConfig(targets=("c_attn", "lm_head")))
    assert model.lm_head.weight is model.transformer.wte.weight
    zoo.randomise(model, "lora_B")
    zoo.judge_models(model, zoo.plain_copy(model))
    with pytest.raises(ValueError, match=r"'lm_head': its weight is tied to 'transformer\.wte'"):
        merge(model)
    assert len(fused_layers(model)) == 3


def test_a_weight_tied_to_a_trained_one_is_not_a_target():
    model = zoo.build("gpt2-lm")
    report = add_lora(model, LoRAConfig(targets=("c_attn", "lm_head"), train="wte"))
    assert [(row.name, "tied" in row.reason) for row in report.skipped] == [("lm_head", True)]
    zoo.randomise(model, "lora_B")
    assert zoo.run(model, 0)["transformer.wte.weight"].abs().max() > 0


def test_a_layer_that_hangs_twice_is_replaced_twice():
    model = Custom()
    model.blocks[1] = model.blocks[0]
    add_lora(model, LoRAConfig(targets="q"))
    assert model.blocks[1]["q"] is model.blocks[0]["q"]
    assert isinstance(model.blocks[0]["q"], FusedLoRALinear)


def test_mode_device_and_dtype_of_the_layers_are_kept():
    model = zoo.build("bert").to(torch.bfloat16).train()
    model.bert.encoder.layer[0].eval()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    add_lora(model, LoRAConfig(dropout=0.1))
    first, *_, last = fused_layers(model).values()
    assert first.weight is weight and not first.training and last.training
    assert (first.weight.dtype, first.lora_A.dtype) == (torch.bfloat16, torch.float32)


def test_dropout_is_drawn_in_training_alone_and_follows_the_seed():
    model = injected("bert", dropout=0.5)
    quiet = zoo.logits(model)
    for layer in fused_layers(model).values():
        layer.train()

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return zoo.logits(model)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2)) and not torch.equal(draw(1), quiet)


@pytest.mark.usefixtures("many_tokens")
def test_deberta_computes_its_content_projections_as_one_until_it_is_merged():
    """Each layer: query, key and value of the hidden states, then query and key of positions."""
    model = injected("deberta-v3", targets=("query_proj", "key_proj", "value_proj"))
    zoo.judge_models(model, zoo.plain_copy(model))
    expected, hooks = zoo.logits(model), [len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 2
    assert zoo.nodes(model) == [1, 1, 1, 1, 3, 3]
    merge(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(zoo.logits(model), expected)
