"""LoRA on embeddings against PEFT: values, gradients, ties, merging, files, what is refused."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    add_loras,
    disable_adapter,
    explain,
    load_adapter,
    lora_fa,
    lora_plus,
    save_adapter,
)
from lora_kernels import merge as merged
from lora_kernels.injection.inject import fused_layers
from lora_kernels.layers.embedding import FusedLoRAEmbedding
from tests.adapters.test_load_save import CONFIG, WEIGHTS
from tests.support import zoo
from tests.support.oracle import DEVICE, judge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
K, N, R, PAD = 40, 24, 3, 2
# The options of nn.Embedding and the dtype of its weight.
KINDS = {
    "plain": ({}, torch.float32),
    "padding": ({"padding_idx": PAD}, torch.float32),
    "by-count": ({"scale_grad_by_freq": True}, torch.float32),
    "bfloat16": ({"padding_idx": PAD}, torch.bfloat16),
    "float16": ({}, torch.float16),
}
# The embedding that reads token ids, in models of the zoo; of gpt2-lm the output layer is tied.
EMBEDDINGS = {
    "roberta": "word_embeddings",
    "deberta-v2": "word_embeddings",
    "llama": "embed_tokens",
    "gpt2-lm": "wte",
    "t5": "embed_tokens",
}


def token_ids(seed: int) -> Tensor:
    """Ids [5, 9] with repetitions and padding."""
    drawn = torch.randint(0, K // 2, (5, 9), generator=torch.Generator().manual_seed(seed))
    drawn[:, -2:] = PAD
    return drawn.to(DEVICE)


def adapted(**options) -> FusedLoRAEmbedding:
    torch.manual_seed(0)
    layer = FusedLoRAEmbedding.from_linear(nn.Embedding(K, N, **options), rank=R, alpha=5)
    zoo.randomise(layer, "lora_")
    return layer.to(DEVICE)


def test_a_layer_of_its_own_is_one_made_of_torchs():
    torch.manual_seed(0)
    base = nn.Embedding(K, N, PAD, scale_grad_by_freq=True, dtype=torch.bfloat16)
    expected = FusedLoRAEmbedding.from_linear(base, rank=R, alpha=5, rslora=True)
    torch.manual_seed(0)
    layer = FusedLoRAEmbedding(
        K, N, rank=R, alpha=5, rslora=True, padding_idx=PAD, scale_grad_by_freq=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    settings = (
        "conv1d",
        "padding_idx",
        "scale_grad_by_freq",
        "scale",
        "in_features",
        "out_features",
    )
    for name in settings:
        assert getattr(layer, name) == getattr(expected, name), name
    assert torch.equal(layer(token_ids(0)), expected(token_ids(0)))
    assert not layer.weight.requires_grad and layer.lora_A.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_embeddings must be an integer of at least 1: got 0"):
        FusedLoRAEmbedding(0, N)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("options, dtype", KINDS.values(), ids=KINDS)
def test_outputs_and_gradients_are_as_good_as_pefts(options, dtype, autocast):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(K, N, **options)).to(DEVICE, dtype)
    config = peft.LoraConfig(r=R, lora_alpha=5, lora_dropout=0.3, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    zoo.randomise(theirs, "lora_")
    own = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    layer = FusedLoRAEmbedding.from_linear(base[0], rank=R, alpha=5, dropout=0.3)
    with torch.no_grad():
        for mine, value in zip((layer.lora_A, layer.lora_B), own.values(), strict=True):
            mine.copy_(value)
    exact = copy.deepcopy(theirs).double()
    models = {"ours": layer, "eager": theirs, "exact": exact}
    found = {label: {"y": [], "lora_A": [], "lora_B": []} for label in models}
    for seed in range(8):
        dy = torch.randn(5, 9, N, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for label, model in models.items():
            model.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, autocast and label != "exact"):
                y = model(token_ids(seed))
            assert label == "exact" or y.dtype is dtype
            y.backward(dy.to(y))
            gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
            for each, value in zip(found[label], (y.detach(), *gradients), strict=True):
                found[label][each].append(value)
    for name in found["ours"]:
        ours, eager, truth = (torch.stack(found[label][name]) for label in models)
        assert truth.abs().max() > 0
        judge(name, ours, eager, truth, independent=8 * R)


def test_padding_and_other_ids_get_no_gradient():
    layer = adapted(padding_idx=PAD)
    layer(token_ids(0)).square().sum().backward()
    touched = layer.lora_A.grad.abs().sum(0) > 0
    expected = torch.zeros(K, dtype=torch.bool, device=DEVICE)
    expected[token_ids(0).unique()] = True
    expected[PAD] = False
    assert torch.equal(touched, expected) and layer.weight.grad is None


def test_ids_of_any_shape_and_none_at_all():
    layer = adapted()
    y = layer(token_ids(0))
    torch.testing.assert_close(layer(token_ids(0)[0, 0]), y[0, 0])
    torch.testing.assert_close(layer(token_ids(0).T), y.transpose(0, 1))
    assert layer(token_ids(0)[:0]).shape == (0, 9, N)
    assert torch.equal(layer(token_ids(0).int()), y)


@pytest.mark.parametrize("name, target", EMBEDDINGS.items(), ids=EMBEDDINGS)
def test_a_model_trains_as_pefts_and_files_go_both_ways(name, target, tmp_path):
    ours = zoo.build(name)
    report = add_lora(ours, LoRAConfig(rank=R, alpha=5, dropout=0.1, targets=(target,)))
    assert [row.name.split(".")[-1] for row in report.fused] == [target]
    assert "an embedding: two lookups" in str(report) and "an embedding" in str(explain(ours))
    weight = next(iter(fused_layers(ours).values())).weight
    assert report.counts["lora"][0] == R * sum(weight.shape) == report.trainable
    assert report.counts["embeddings"][1] >= weight.numel()
    assert torch.equal(zoo.logits(ours), zoo.logits(zoo.build(name))), "it starts at the base"
    zoo.randomise(ours, "lora_")
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(
        zoo.build(name), str(tmp_path / "ours"), is_trainable=True
    ).eval()
    assert (zoo.logits(theirs) - zoo.logits(zoo.build(name))).abs().max() > 1e-3
    torch.testing.assert_close(zoo.logits(ours), zoo.logits(theirs))
    for model in (ours, theirs):  # a step of plain gradients
        trained = [p for n, p in model.named_parameters() if "lora_" in n]
        assert len(trained) == 2 and all(p.requires_grad for p in trained)
        model(**zoo.batch()).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in trained:
                parameter.sub_(0.1 * parameter.grad)
    torch.testing.assert_close(zoo.logits(ours), zoo.logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    for model in (zoo.build(name), ours):
        load_adapter(model, tmp_path / "theirs")
        torch.testing.assert_close(zoo.logits(model), zoo.logits(theirs))
    save_adapter(ours, tmp_path / "again")
    saved = load_file(tmp_path / "again" / WEIGHTS)
    assert {key.rpartition(".")[2] for key in saved} >= {"lora_embedding_A", "lora_embedding_B"}
    read = load_file(tmp_path / "theirs" / WEIGHTS)
    assert all(torch.equal(saved[key], value) for key, value in read.items())


def test_beside_linear_layers_the_config_of_the_file_is_theirs(tmp_path):
    model = zoo.build("llama")
    add_lora(model, LoRAConfig(rank=R, dropout=0.1, targets=("q_proj", "embed_tokens")))
    save_adapter(model, tmp_path)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (config.fan_in_fan_out, config.lora_dropout, config.r) == (False, 0.1, R)
    assert set(config.target_modules) == {"q_proj", "embed_tokens"}
    again = zoo.build("llama")
    load_adapter(again, tmp_path)
    assert {layer.dropout for layer in fused_layers(again).values()} == {0.1}


def test_an_embedding_that_another_reads_for_it_is_named():
    """T5 calls `encoder.embed_tokens`, whose weight is that of `shared`."""
    model = zoo.build("t5")
    add_lora(model, LoRAConfig(rank=R, targets=("shared", "q")))
    with pytest.warns(UserWarning, match=r"no effect on 1 layers \(transformer.shared\)"):
        model(**zoo.batch())
    for name in ("t5", "gpt2-lm"):
        model = zoo.build(name)
        add_lora(model, LoRAConfig(rank=R, targets=(EMBEDDINGS[name],)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**zoo.batch())


def test_a_tied_output_layer_keeps_the_frozen_weight():
    model, base = zoo.build("gpt2-lm"), zoo.build("gpt2-lm")
    add_lora(model, LoRAConfig(rank=R, targets=("wte",)))
    zoo.randomise(model, "lora_")
    wte = model.transformer.wte
    assert model.lm_head.weight is wte.weight
    expected, frozen = zoo.logits(model), wte.weight.clone()
    embedded = wte(zoo.batch()["input_ids"])
    torch.testing.assert_close(base(inputs_embeds=embedded).logits, expected)
    with pytest.raises(ValueError, match=r"cannot merge 'transformer.wte': .* tied to 'lm_head'"):
        merged(model)
    wte.merge()  # by itself a layer may: its weight then is one of its own
    torch.testing.assert_close(zoo.logits(model), expected)
    assert torch.equal(model.lm_head.weight, frozen)
    wte.unmerge()
    assert model.lm_head.weight is wte.weight and torch.equal(zoo.logits(model), expected)


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_merging_gives_a_plain_embedding_and_disabling_the_base(name):
    model, base = zoo.build(name), zoo.build(name)
    target = EMBEDDINGS[name]
    path = next(p for p, _ in base.named_modules() if p.split(".")[-1] == target)
    add_lora(model, LoRAConfig(rank=R, targets=(target,)))
    zoo.randomise(model, "lora_")
    expected, layer = zoo.logits(model), model.get_submodule(path)
    with disable_adapter(model):
        assert torch.equal(zoo.logits(model), zoo.logits(base))
    layer.merge()
    torch.testing.assert_close(zoo.logits(model), expected)
    with disable_adapter(model):
        assert torch.equal(zoo.logits(model), zoo.logits(base))
    layer.unmerge()
    assert torch.equal(zoo.logits(model), expected)
    plain, was = merged(model).get_submodule(path), base.get_submodule(path)
    torch.testing.assert_close(zoo.logits(model), expected)
    assert type(plain) is nn.Embedding and repr(plain) == repr(was)
    assert not fused_layers(model) and not torch.equal(plain.weight, was.weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_parameters_of_their_own(duplicate):
    layer = adapted(padding_idx=PAD)
    y, twin = layer(token_ids(0)), duplicate(layer)
    zoo.randomise(layer.double(), "lora_B")
    assert torch.equal(twin(token_ids(0)), y)


def test_compiled_and_checkpointed_and_under_autocast_it_is_the_same():
    layer = adapted()
    expected = layer(token_ids(0))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(layer(token_ids(0)), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(token_ids(0)), expected)
    (gradient,) = torch.autograd.grad(expected.square().sum(), layer.lora_A)
    compiled(token_ids(0)).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, gradient)
    found = zoo.build("llama")
    add_lora(found, LoRAConfig(rank=R, targets=("embed_tokens",)))
    found.gradient_checkpointing_enable()
    found.enable_input_require_grads()
    found.train()(**zoo.batch()).logits.sum().backward()
    assert fused_layers(found)["model.embed_tokens"].lora_B.grad is not None


def test_a_loralib_file_of_an_embedding_is_read(tmp_path):
    model = zoo.build("gpt2-lm")
    add_lora(model, LoRAConfig(rank=R, alpha=5, targets=("wte",)))
    zoo.randomise(model, "lora_")
    layer = model.transformer.wte
    values = {f"transformer.wte.{name}": getattr(layer, name) for name in ("lora_A", "lora_B")}
    torch.save(values, tmp_path / "lora.pt")
    again = zoo.build("gpt2-lm")
    load_adapter(again, tmp_path / "lora.pt", alpha=5)
    assert torch.equal(zoo.logits(again), zoo.logits(model))


def test_the_rules_of_optimizers_are_pefts():
    model = zoo.build("roberta")
    add_lora(model, LoRAConfig(rank=R, targets=("query", "word_embeddings")))
    layer = next(iter(fused_layers(model).values()))
    (group,) = [g for g in lora_plus(model, 1e-3) if g["lr"] == 1e-6]
    assert {id(p) for p in group["params"]} == {id(layer.lora_A), id(layer.lora_B)}
    lora_fa(model)
    trains = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"query", "word_embeddings"}
    assert layer.lora_A.requires_grad, "it starts at zero: frozen, the layer would stay the base"


REFUSED = {
    "max-norm": ({"max_norm": 1.0}, r"rescales its weight in every call \(max_norm=1.0\)"),
    "sparse": ({"sparse": True}, r"its gradients are sparse"),
    "subclass": (None, r"Positions is not a plain Embedding"),
}


class Positions(nn.Embedding):
    """A subclass, which may compute something else."""


class Reader(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.table, self.head = embedding, nn.Linear(N, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_another_embedding_is_left_alone_with_the_reason(options, words):
    embedding = Positions(K, N) if options is None else nn.Embedding(K, N, **options)
    report = add_lora(Reader(embedding), LoRAConfig(rank=R, targets=("head", "table")))
    assert [row.name for row in report.fused] == ["head"]
    (row,) = report.skipped
    assert row.name == "table" and re.search(words, row.reason)
    with pytest.raises(TypeError, match=words):
        FusedLoRAEmbedding.from_linear(embedding)


def test_what_embeddings_cannot_have_is_refused_and_changes_nothing():
    linear = ({"dora": True}, {"lora_bias": True}, {"init": "pissa"}, {"init": "gaussian"})
    for changes in linear:
        model = Reader(nn.Embedding(K, N))
        with pytest.raises(ValueError, match="is for linear layers, not embeddings"):
            add_lora(model, LoRAConfig(rank=2, targets=("table",), **changes))
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="columns is for linear layers"):
        FusedLoRAEmbedding.from_linear(nn.Embedding(K, N), columns=[(0, 8)])
    with pytest.raises(ValueError, match="'table' is an embedding: several adapters need linear"):
        add_loras(Reader(nn.Embedding(K, N)), {"a": LoRAConfig(targets=("table", "head"))})


def test_an_embedding_that_is_wrapped_alone_is_left_alone():
    model = Reader(nn.Embedding(K, N))
    model.table = torch.compile(model.table, backend="eager")
    report = add_lora(model, LoRAConfig(rank=R, targets=("head", "table")))
    assert [(row.name, row.reason) for row in report.skipped] == [
        ("table", "it is wrapped alone (_orig_mod): wrap it after add_lora")
    ]


def test_files_that_do_not_fit_are_refused(tmp_path):
    config = peft.LoraConfig(r=R, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    with_dora = peft.get_peft_model(zoo.build("llama"), config)
    with_dora.save_pretrained(tmp_path / "dora")
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="embed"):
        load_adapter(model, tmp_path / "dora")
    assert not fused_layers(model) and all(p.requires_grad for p in model.parameters())
    ours = zoo.build("llama")
    add_lora(ours, LoRAConfig(rank=R, targets=("q_proj", "embed_tokens")))
    save_adapter(ours, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    left = {k: v for k, v in tensors.items() if "embedding" not in k}
    save_file(left, tmp_path / "ours" / WEIGHTS)
    with pytest.raises(ValueError, match=r"has no values for target layers of the model: .*embed"):
        load_adapter(model, tmp_path / "ours")
    moved = {k.replace("q_proj.lora_", "q_proj.lora_embedding_"): v for k, v in tensors.items()}
    moved = {k.removesuffix(".weight") if "q_proj" in k else k: v for k, v in moved.items()}
    save_file(moved, tmp_path / "ours" / WEIGHTS)
    with pytest.raises(ValueError, match=r"q_proj.lora_embedding_A: plain LoRA layers cannot repr"):
        load_adapter(model, tmp_path / "ours")
    assert (tmp_path / "ours" / CONFIG).exists() and not fused_layers(model)
