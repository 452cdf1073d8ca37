"""Values besides LoRA: kept, trained without a name, tied, resized, or in whole checkpoints."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge, save_adapter
from lora_kernels.injection.inject import fused_layers, trained_paths
from tests.adapters.test_load_save import CONFIG, WEIGHTS, injected
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")


class Tower(nn.Module):
    """Layers whose names end as the head's does, and a norm with running statistics."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.last = head
        self.inp, self.bn, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.0)
        self.blocks = nn.ModuleDict({f"c_{head}": nn.Linear(8, 8), "layout": nn.Linear(8, 8)})
        self.add_module(head, nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.bn(self.inp(x)))
        for block in self.blocks.values():
            x = block(x)
        return self.get_submodule(self.last)(x)


def tower(head: str) -> Tower:
    torch.manual_seed(0)
    return Tower(head)


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 3 + 2


def train(model: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()(X).detach()


@pytest.mark.parametrize("head", ["out", "fc", "inp2", "layout2"])
@pytest.mark.parametrize("targets", ["inp", "all-linear"])
def test_a_head_whose_name_is_the_end_of_others_reaches_peft_and_us(head, targets, tmp_path):
    model = tower(head)
    report = add_lora(model, LoRAConfig(rank=2, targets=targets, train=f"re:{head}"))
    expected = train(model)
    save_adapter(model, tmp_path)
    again = tower(head)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(X), expected)
    assert trained_paths(again) == [head]
    theirs = peft.PeftModel.from_pretrained(tower(head), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(X), expected)
    told = [note for note in report.notes if "cannot name exactly" in note]
    named = json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]
    assert bool(told) == (named is None)
    assert told or head != "out"


def test_containers_and_shared_modules_are_trained_though_peft_cannot(tmp_path):
    def build() -> nn.Module:
        model = tower("out")
        model.tail = nn.ModuleList([model.out])
        return model

    for name in ("blocks", "out"):
        model = build()
        notes = add_lora(model, LoRAConfig(rank=2, targets="inp", train=f"re:{name}")).notes
        assert any("cannot name exactly" in note for note in notes)
        expected = train(model)
        save_adapter(model, tmp_path / name)
        again = build()
        load_adapter(again, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / name)).eval()
        torch.testing.assert_close(again.eval()(X), expected)
        torch.testing.assert_close(theirs(X), expected)


def test_running_statistics_go_with_the_adapter_and_are_in_the_report(tmp_path):
    model = tower("head")
    with pytest.warns(UserWarning, match="bn is frozen, but its running statistics move"):
        report = add_lora(model, LoRAConfig(rank=2, targets="inp", train="head"))
    assert "note: bn is frozen" in str(report)
    expected = train(model)
    save_adapter(model, tmp_path)
    again = tower("head")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(X), expected)
    theirs = peft.PeftModel.from_pretrained(tower("head"), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(X), expected)
    named = tower("head")
    notes = add_lora(named, LoRAConfig(rank=2, targets="inp", train=("re:head", "bn"))).notes
    assert not any("running statistics" in note for note in notes)


def test_a_file_without_running_statistics_says_that_they_are_the_bases(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["inp"], modules_to_save=["head"])
    theirs = peft.get_peft_model(tower("head"), config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds no values of bn: the model's own stay"):
        load_adapter(tower("head"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_is_named(dtype):
    model = zoo.build("roberta").to(dtype)
    with pytest.warns(UserWarning, match=rf"classifier is trained in {dtype}"):
        report = add_lora(model, LoRAConfig(train="classifier"))
    assert "classifier is trained in" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not add_lora(zoo.build("roberta").to(dtype), LoRAConfig()).notes


def test_a_pooler_that_the_checkpoint_lacks_goes_with_the_adapter(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60}
    config = transformers.BertConfig(intermediate_size=48, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    x = torch.arange(4, 24).view(2, 10)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        cls = transformers.BertForSequenceClassification
        return cls.from_pretrained(tmp_path / "base", num_labels=3).eval()

    model = build(1)
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense is drawn at random"):
        add_lora(model, LoRAConfig(rank=2, train="classifier"))
    save_adapter(model, tmp_path / "adapter")
    expected = model(x).logits
    assert (build(2)(x).logits - expected).abs().max() > 1e-3
    again = build(2)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(x).logits, expected)
    assert not again.bert.pooler.dense.weight.requires_grad
    save_adapter(again, tmp_path / "second")
    theirs = peft.PeftModel.from_pretrained(build(3), str(tmp_path / "second")).eval()
    torch.testing.assert_close(theirs(x).logits, expected)
    assert not add_lora(build(1), LoRAConfig(train=("classifier", "pooler"))).notes


def test_the_random_weight_of_a_head_with_lora_reaches_peft_and_us(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 60}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    x = torch.arange(4, 24).view(2, 10)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        cls = transformers.GPT2ForSequenceClassification
        return cls.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0).eval()

    model = build(1)
    assert not add_lora(model, LoRAConfig(rank=2, targets=("c_attn.q", "score"))).notes
    zoo.randomise(model, "lora_")
    save_adapter(model, tmp_path / "adapter")
    again = build(2)
    load_adapter(again, tmp_path / "adapter")
    expected = model(x).logits
    torch.testing.assert_close(again(x).logits, expected)
    theirs = peft.PeftModel.from_pretrained(build(3), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(x).logits, expected)


def llama(tied: bool, vocabulary: int = 40) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=vocabulary, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_weights_that_peft_parted_are_refused_by_name(saved, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    theirs = peft.get_peft_model(llama(True), config).eval()
    zoo.randomise(theirs, "lora_", "modules_to_save")
    theirs.save_pretrained(tmp_path)
    model = llama(True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight and lm_head\.weight are one weig"):
        load_adapter(model, tmp_path)
    assert not fused_layers(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    load_adapter(model, tmp_path)
    x = torch.arange(1, 19).view(2, 9)
    torch.testing.assert_close(model(x).logits, theirs(x).logits)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
def test_embeddings_that_peft_saved_unasked_are_loaded_and_saved_again(targets, tmp_path):
    theirs = peft.get_peft_model(llama(False, 44), peft.LoraConfig(r=2, target_modules=targets))
    zoo.randomise(theirs, "lora_", "lm_head" if "lm_head" in targets else "embed_tokens")
    theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    x = torch.tensor([[3, 41, 7, 43, 9]])
    for name in ("theirs", "ours"):
        model = llama(False, 44)
        load_adapter(model, tmp_path / name)
        torch.testing.assert_close(model(x).logits, theirs(x).logits)
        assert not model.get_input_embeddings().weight.requires_grad
        save_adapter(model, tmp_path / "ours")
    with pytest.raises(
        ValueError, match=r"(embed_tokens|lm_head)\.weight is \[44, 32\] in the file and"
    ):
        load_adapter(llama(False, 40), tmp_path / "theirs")


CHECKPOINTS = {
    "roberta": {"train": "classifier", "dropout": 0.1, "rslora": True},
    "gpt2-lm": {"train": ("lm_head", "ln_f"), "targets": ("c_attn.q", "c_attn.v")},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_save_pretrained_writes_is_loaded_after_from_pretrained(name, tmp_path):
    model = injected(name, **CHECKPOINTS[name])
    type(model).save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert (zoo.logits(again) - zoo.logits(model)).abs().max() > 1e-3
    load_adapter(again, tmp_path)
    assert torch.equal(zoo.logits(again), zoo.logits(model))
    flags = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (again, model)]
    assert flags[0] == flags[1]
    layer, other = (next(iter(fused_layers(m).values())) for m in (again, model))
    assert (layer.dropout, layer.rslora, layer.scale) == (other.dropout, other.rslora, other.scale)
    base = zoo.build(name)
    if name == "roberta":
        load_adapter(base, tmp_path / "model.safetensors")
        assert torch.equal(zoo.logits(base), zoo.logits(model))
    merge(again).save_pretrained(tmp_path / "merged")
    assert "lora_kernels" not in (tmp_path / "merged" / "config.json").read_text()


def test_a_whole_checkpoint_is_not_taken_for_an_adapter(tmp_path):
    model = injected(rank=2)
    type(model).save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="alpha and enable_lora are not its"):
        load_adapter(zoo.build("roberta"), file, alpha=5)
    base = zoo.build("roberta")
    base.roberta.encoder.layer[0].output.dense.bias.data += 1
    with pytest.raises(ValueError, match=r"output\.dense\.bias is frozen, and has other values"):
        load_adapter(base, file)
    (tmp_path / "config.json").unlink()
    plain = zoo.build("roberta")
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match="nothing says what of it was trained"):
            load_adapter(plain, path)
    assert not fused_layers(plain) and all(p.requires_grad for p in plain.parameters())
    other = injected(rank=2, train="classifier")
    zoo.randomise(other, "lora_B", "classifier")
    load_adapter(other, tmp_path)
    assert torch.equal(zoo.logits(other), zoo.logits(model))


def test_values_that_load_adapter_would_refuse_are_told_when_saved(tmp_path):
    model = injected()
    next(iter(fused_layers(model).values())).lora_B.data[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"1 tensors hold values that are not finite.*lora_B"):
        save_adapter(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)


def test_peft_calls_a_model_that_hears_as_it_is_called(tmp_path):
    """PEFT's class for text to text would pass input_ids besides."""
    common = {"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    for side in ("encoder", "decoder"):
        common |= {f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    ends = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sound = transformers.WhisperConfig(num_mel_bins=4, max_source_positions=8, **ends, **common)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return transformers.WhisperForConditionalGeneration(sound).eval()

    heard = {"input_features": torch.randn(1, 4, 16), "decoder_input_ids": torch.tensor([[1, 5]])}
    model = build()
    reads = transformers.BartForConditionalGeneration(transformers.BartConfig(**common))
    tasks = []
    for each, directory in ((model, tmp_path / "sound"), (reads, tmp_path / "text")):
        add_lora(each, LoRAConfig(rank=2, targets=("q_proj",)))
        zoo.randomise(each, "lora_")
        save_adapter(each, directory)
        tasks.append(json.loads((directory / CONFIG).read_text())["task_type"])
    assert tasks == [None, "SEQ_2_SEQ_LM"]
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "sound")).eval()
    torch.testing.assert_close(theirs(**heard).logits, model(**heard).logits)
