"""What a checkpoint lacks for a task: its head, other modules, its tokenizer's vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

pytest.importorskip("datasets", reason="the models read their data by it")
from lora_kernels import load_adapter
from models.train import train
from tests.models.test_train import Spy
from tests.support.tiny_run import SIZES, WORDS, write_csv

SNLI = ("entailment", "neutral", "contradiction")


@pytest.fixture
def nli(tmp_path, tokenizer):
    """Makes a directory of a classifier with these classes, whose answer is always the first."""

    def build(classes: tuple[str, ...], kind: str = "bert") -> str:
        folder = tmp_path / "-".join(["nli", kind, *classes]).replace(" ", "")
        names = dict(enumerate(classes))
        config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind](
            **SIZES,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        output = model.classifier if kind == "bert" else model.classifier.out_proj
        with torch.no_grad():
            output.weight.zero_(), output.bias.zero_()
            output.bias[0] = 5.0
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return build


@pytest.fixture
def pairs(tmp_path) -> str:
    """A directory of SNLI files whose rows are all of one class."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 16), ("validation", 8)):
        rows = [[WORDS[i % 7], WORDS[i % 5], "contradiction"] for i in range(count)]
        write_csv(folder / f"{split}.csv", ["premise", "hypothesis", "label"], rows)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("classes", "accuracy", "note"),
    [
        (("contradiction", "neutral", "entailment"), 1.0, "put in the order entailment, neutral"),
        (("CONTRADICTION", "Entailment", "Neutral"), 1.0, "put in the order entailment, neutral"),
        (SNLI, 0.0, "the checkpoint's (entailment, neutral, contradiction)"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), 0.0, "nameless classes are taken for entailment"),
        (("red", "green", "blue"), None, "since the classes of the checkpoint are red, green"),
        (("yes", "no"), None, "new (entailment, neutral, contradiction)"),
    ],
    ids=["permuted", "spelled", "same", "nameless", "other", "fewer"],
)
def test_the_head_of_a_checkpoint_follows_the_classes_by_name(
    arguments, nli, pairs, kind, classes, accuracy, note
):
    source = nli(classes, kind)
    made = arguments(
        model=source, task="snli", data_dir=pairs, epochs=1, learning_rate=1e-9, train_head=False
    )
    spy = Spy()
    result = train(made, callbacks=(spy,))
    assert any(note in line for line in result["notes"]), result["notes"]
    if accuracy is not None:
        assert result["metrics"]["validation"]["accuracy"] == accuracy
    # What changed is saved: base and adapter together answer as the run did.
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=3, ignore_mismatched_sizes=True
    )
    if "since the classes" in note:  # it is drawn anew indeed
        path = "classifier" if kind == "bert" else "classifier.out_proj"
        theirs, ours = (m.get_submodule(path).weight for m in (again, spy.model))
        assert (theirs - ours.cpu()).abs().max() > 1e-3
    load_adapter(again, made.directory() / "adapter")
    batch = {key: value for key, value in spy.batches[False][0].items() if key != "labels"}
    with torch.no_grad():
        want, got = spy.model.eval()(**batch).logits, again.eval()(**batch).logits
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("method", ["lora", "peft"])
@pytest.mark.parametrize("train_head", [True, False])
def test_what_is_new_is_saved_trained_or_not(arguments, tmp_path, tokenizer, method, train_head):
    if method == "peft":
        peft = pytest.importorskip("peft")
    folder = tmp_path / "masked"
    config = transformers.BertConfig(vocab_size=len(tokenizer), **SIZES)
    transformers.BertForMaskedLM(config).save_pretrained(folder)  # it has no pooler
    tokenizer.save_pretrained(folder)
    made = arguments(model=str(folder), epochs=1, train_head=train_head, method=method)
    spy = Spy()
    result = train(made, callbacks=(spy,))
    assert result["new"] == ["bert.pooler.dense", "classifier"]
    assert any("drawn anew: bert.pooler.dense" in note for note in result["notes"])
    for path in result["new"]:
        named = [p for n, p in spy.model.named_parameters() if path in n and "original" not in n]
        assert len(named) == 2 and all(p.requires_grad == train_head for p in named)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    adapter = made.directory() / "adapter"
    if method == "peft":
        again = peft.PeftModel.from_pretrained(again, adapter)
    else:
        load_adapter(again, adapter)
    batch = {key: value for key, value in spy.batches[False][0].items() if key != "labels"}
    with torch.no_grad():
        want, got = spy.model.eval()(**batch).logits, again.eval()(**batch).logits
    torch.testing.assert_close(got, want)


def test_weights_of_another_architecture_are_refused(arguments, bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    weights = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "layer.1.attention" not in name}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model cannot be loaded: its weights lack bert.encoder"):
        train(arguments(model=str(folder)))
    key = "embeddings.word_embeddings.weight"
    save_file({**weights, key: weights[key][:9]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} has another shape than config.json says"):
        train(arguments(model=str(folder)))


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta", "t5"])
def test_a_model_without_a_tokenizer_is_refused(arguments, tmp_path, kind):
    config = transformers.AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path / "model")
    made = arguments(model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"model has no tokenizer: none of .*tokenizer.json"):
        train(made)
    assert not made.directory().exists()


def test_a_vocabulary_that_knows_no_word_is_refused(arguments, bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    with pytest.raises(ValueError, match="knows 0% of the tokens of train"):
        train(arguments(model=str(folder)))


def test_a_tokenizer_of_a_larger_model_is_refused(arguments, tmp_path, tokenizer):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"makes the id \d+, and the model has 20 tokens"):
        train(arguments(model=str(tmp_path / "model")))


def test_empty_texts_of_a_tokenizer_without_special_tokens(arguments, tokenizer, tmp_path):
    folder: Path = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64
    )
    transformers.GPT2Model(config).save_pretrained(folder)
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]"
    )
    bare.backend_tokenizer.post_processor = None
    bare.save_pretrained(folder)
    for split in ("train", "validation"):
        rows = [["" if i < 12 else WORDS[i % 7], i % 2] for i in range(16)]
        write_csv(tmp_path / f"{split}.csv", ["sentence", "label"], rows)
    spy = Spy()
    result = train(arguments(model=str(folder), data_dir=str(tmp_path), epochs=1), callbacks=(spy,))
    assert result["metrics"]["validation"]["loss"] > 0 and not result["diverged"]
    lengths = [mask.sum().item() for b in spy.batches[True] for mask in b["attention_mask"]]
    assert sorted(lengths) == [1] * 16
