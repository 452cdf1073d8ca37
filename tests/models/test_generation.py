"""Generation: the target alone is learnt, what is written is scored, and references are whole."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import types
from typing import Any

import pytest
import torch
import transformers

datasets = pytest.importorskip("datasets", reason="the models read their data by it")
pytest.importorskip("sacrebleu", reason="it scores what is written")
pytest.importorskip("rouge_score", reason="it scores what is written")
from models.arguments import Arguments, check
from models.data import prompts, sentences, tasks
from models.sweeping.together import run_together
from models.train import train
from models.training.generation import write
from tests.support.tiny_run import drawn, read_csv, write_csv

NAMES = [f"name{i}" for i in range(12)]
FOODS = [f"food{i}" for i in range(6)]
WORDS = ["name", "food", "the", "place", "serves", "there", "you", "eat", *NAMES, *FOODS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    made = transformers.BertTokenizerFast.from_pretrained(folder)
    made.eos_token = "[SEP]"
    return made


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=3, eos_token_id=3, initializer_range=0.2,
    )  # fmt: skip
    return drawn(transformers.GPT2LMHeadModel, config, tokenizer, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Prompts of a name and a food; each has two targets, which stand apart in the file."""
    folder = tmp_path_factory.mktemp("e2e")
    pairs = [(name, food) for name in NAMES for food in FOODS]
    held = {"validation": pairs[::9], "test": pairs[4::9]}
    held["train"] = [pair for pair in pairs if pair not in held["validation"] + held["test"]]
    for split, part in held.items():
        rows = [[f"name {a} food {b}", f"the place serves {b}"] for a, b in part]
        rows += [[f"name {a} food {b}", f"there you eat {b}"] for a, b in part]
        write_csv(folder / f"{split}.csv", ["mr", "ref"], rows)
    return str(folder)


@pytest.fixture
def arguments(gpt2, data, tmp_path):
    def build(**changes: Any) -> Arguments:
        default = {
            "model": gpt2, "task": "e2e_nlg", "data_dir": data, "max_length": 24, "epochs": 1,
            "batch_size": 8, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        return Arguments(**{**default, **changes})

    return build


# --- ids and loss ---------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_target_alone(tokenizer, gpt2):
    rows = {"text": ["name name0 food food1"], "target": ["the place serves food1"]}
    encoded, _, _ = prompts.encode({"train": datasets.Dataset.from_dict(rows)}, tokenizer, 24)
    row = encoded[0]
    assert row["labels"] == [-100] * 5 + row["input_ids"][5:] and row["length"] == 10
    assert tokenizer.decode(row["input_ids"]) == (
        "name name0 food food1 [SEP] the place serves food1 [SEP]"
    )
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    batch = prompts.collator(tokenizer, 24, False)([dict(row), dict(row)])
    assert batch["input_ids"].shape == (2, 16) and (batch["labels"][:, 10:] == -100).all()
    del batch["length"]
    logits = model(batch["input_ids"][:1, :10]).logits[0]
    wanted = torch.tensor(row["input_ids"][5:])
    expected = torch.nn.functional.cross_entropy(logits[4:9], wanted)
    torch.testing.assert_close(model(**batch).loss, expected)


def test_a_long_target_is_cut_and_a_long_prompt_refused(tokenizer):
    rows = {"text": ["name name0"], "target": ["the place serves food1"]}
    splits = {"train": datasets.Dataset.from_dict(rows)}
    encoded, _, _ = prompts.encode(splits, tokenizer, 5)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "name name0 [SEP] the place"
    with pytest.raises(ValueError, match=r"--max-length 3 leaves no room .* prompt takes 3"):
        prompts.encode(splits, tokenizer, 3)


def test_rows_without_a_target_are_dropped_and_counted(tmp_path):
    rows = [["name a", "a"], ["name b", " "], ["name c", "c"]]
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", ["mr", "ref"], rows)
    found = tasks.load(tasks.task_of("e2e_nlg"), tmp_path)
    assert found.splits["train"]["target"][:] == ["a", "c"] and found.dropped["train"] == 1
    write_csv(tmp_path / "test.csv", ["mr", "sentence"], rows)
    with pytest.raises(ValueError, match=r"needs the columns mr\+ref or .*; found mr, sentence"):
        tasks.load(tasks.task_of("e2e_nlg"), tmp_path)


# --- runs -----------------------------------------------------------------------------------------


def test_a_language_model_learns_to_write_the_target(arguments, tmp_path):
    result = train(arguments(method="full", epochs=20, learning_rate=5e-3, label_smoothing=0.1))
    test, history = result["metrics"]["test"], result["history"]
    assert result["primary_metric"] == "bleu" and test["bleu"] > 0.9 and test["rouge_l"] > 0.9
    assert "bleu" not in result["metrics"]["train"]
    # The smoothed loss of two equally good targets, each of about four tokens.
    assert history[-1]["validation_loss"] < 0.4 * history[0]["train_loss"]
    assert result["baseline"] == {"name": "none", "splits": {}}
    with (tmp_path / "run/predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert [int(row["row"]) for row in rows] == list(range(8))  # a prompt is written for once
    assert {row["prediction"] == row["label"] for row in rows} >= {True}


@pytest.mark.parametrize("method", ["lora", "peft", "bitfit"])
def test_every_method_that_has_something_to_train_writes(arguments, method, tmp_path):
    if method == "peft":
        pytest.importorskip("peft")
    result = train(arguments(method=method, max_steps=2, max_eval_samples=4))
    assert 0 <= result["metrics"]["validation"]["bleu"] <= 1
    # LoRA of rank 8 on the 32 columns in and 96 out of two c_attn.
    expected = {"lora": 2 * 8 * 128, "peft": 2 * 8 * 128}.get(method)
    if expected:
        assert result["parameters"]["all"]["trainable"] == expected
    if method == "lora":
        saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert saved["modules_to_save"] is None
    # Two splits are scored, and told of once.
    assert sum("meteor and cider are not computed" in note for note in result["notes"]) == 1


def test_what_cannot_write_is_refused(arguments, bert):
    with pytest.raises(ValueError, match="it writes no text: its weights lack cls"):
        train(arguments(model=bert, max_length=24))
    with pytest.raises(ValueError, match="--method last_layer trains nothing of GPT2LMHeadModel"):
        train(arguments(method="last_layer"))


def test_labels_that_are_numbers_are_not_smoothed(arguments):
    with pytest.raises(ValueError, match="the labels of task stsb are no classes"):
        check(arguments(task="stsb", label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"--label-smoothing 1.0 must be at least 0"):
        check(arguments(label_smoothing=1.0))


def test_a_prompt_is_written_for_alike_beside_longer_ones(gpt2, tokenizer):
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    texts = ["name name1 food food2 in the place", "name name3", "food food4", "name name8"]
    task, limits = tasks.task_of("e2e_nlg"), (24, 64)
    together = write(task, model, tokenizer, texts, limits)
    assert together == [write(task, model, tokenizer, [text], limits)[0] for text in texts]
    assert all(together) and len(set(together)) == 4


def test_language_models_train_together(arguments, data, tmp_path):
    folder = tmp_path / "unlike"  # lengths, so that the pack pads one batch to the other's
    shutil.copytree(data, folder)
    rows = [[f"name {a}" + f" food {FOODS[0]}" * (n % 2), f"you eat {FOODS[n % 6]}"]
            for n, a in enumerate(NAMES)]  # fmt: skip
    write_csv(folder / "train.csv", ["mr", "ref"], rows)
    changes = {"model_dropout": 0.0, "epochs": 5, "max_eval_samples": 2, "batch_size": 1}
    changes["data_dir"] = str(folder)
    names = ("a", "b")
    solo = [
        arguments(output_dir=str(tmp_path / f"solo-{n}"), seed=int(n == "b"), **changes)
        for n in names
    ]
    pack = [
        arguments(output_dir=str(tmp_path / f"pack-{n}"), seed=int(n == "b"), **changes)
        for n in names
    ]
    run_together(pack, lambda *_: None)
    for one, other in zip(solo, pack, strict=True):
        train(one)
        losses = [
            [row["loss"] for row in read_csv(made.directory() / "steps.csv")]
            for made in (one, other)
        ]
        # On an Intel Xeon MKL adds up in another order for two rows than for one: 3 of the 60
        # losses differ by up to 2.2e-6, after 39 steps.
        assert len(losses[0]) == 60 and losses[1] == pytest.approx(losses[0], rel=5e-6)
        texts = [(made.directory() / "predictions.csv").read_text() for made in (one, other)]
        assert texts[0] == texts[1]


def test_references_are_those_of_the_whole_split(arguments, monkeypatch):
    seen = []

    def scores(written, references):
        seen.append(references)
        return {"bleu": 0.5}, None

    monkeypatch.setattr(sentences, "scores", scores)
    result = train(arguments(max_steps=1, max_eval_samples=3))
    assert result["scored"]["test"] == 3 and result["metrics"]["test"]["bleu"] == 0.5
    for references in seen:
        assert all(len(row) == 2 for row in references)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_of_equal_and_of_unlike_sentences():
    references = [["The cat sat on the mat .", "A cat sits."], ["Dogs bark at night , loudly"]]
    same, note = sentences.scores(
        ["the CAT sat on the mat.", "dogs bark at night, loudly"], references
    )
    assert same["bleu"] == pytest.approx(1) and same["rouge_l"] == 1 and "meteor" in note
    other, _ = sentences.scores(["x y z w", "q"], references)
    assert other["bleu"] < 0.1 and other["rouge_l"] == other["nist"] == 0


def test_nist_follows_its_formula():
    # Six words in the references, a and b twice each. Every bigram is as frequent as its first
    # word, but for "a b" and "b c", which follow in one of two.
    written, references = ["a", "b"], [["a", "b", "c"], ["b", "a", "d"]]
    one = (math.log2(6 / 2) + math.log2(6 / 2)) / 2
    two = math.log2(2 / 1)
    penalty = math.exp(math.log(0.5) * (math.log(2 / 3) / math.log(1.5)) ** 2)
    assert penalty == pytest.approx(0.5)
    assert sentences.nist([written], [references]) == pytest.approx(penalty * (one + two))
    assert sentences.nist([[]], [references]) == 0


def test_nist_is_that_of_the_challenge_s_script():
    # By metrics/pymteval.py of the E2E challenge.
    written = ["The Eagle is a cheap pub near Burger King.", "Cotto serves Thai food"]
    references = [
        ["The Eagle is a pub near Burger King, and cheap.", "Near Burger King is The Eagle."],
        ["Cotto serves good Thai food by the river.", "You can eat Thai at Cotto."],
    ]
    found, _ = sentences.scores(written, references)
    assert found["nist"] == pytest.approx(3.9358766, abs=1e-6)
    assert found["bleu"] == pytest.approx(0.3555265, abs=1e-6)


def test_meteor_and_cider_come_from_pycocoevalcap(monkeypatch):
    class Words:
        def tokenize(self, texts):
            return {row: [each["caption"].lower() for each in part] for row, part in texts.items()}

    class Scorer:
        def compute_score(self, theirs, ours):
            assert theirs == {0: ["a b", "a c"]} and ours == {0: ["a"]}
            return 0.25, [0.25]

    for name, value in {
        "tokenizer.ptbtokenizer": {"PTBTokenizer": Words},
        "meteor.meteor": {"Meteor": Scorer},
        "cider.cider": {"Cider": Scorer},
    }.items():
        module = types.ModuleType(f"pycocoevalcap.{name}")
        vars(module).update(value)
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}", module)
        monkeypatch.setitem(
            sys.modules, f"pycocoevalcap.{name.split('.')[0]}", types.ModuleType("package")
        )
    package = types.ModuleType("pycocoevalcap")
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "pycocoevalcap", package)
    monkeypatch.setattr(sentences.shutil, "which", lambda name: "/usr/bin/java")
    found, note = sentences.scores(["a"], [["A b", "a C"]])
    assert note is None and found["meteor"] == found["cider"] == 0.25
    monkeypatch.setattr(Scorer, "compute_score", lambda *given: 1 / float(""))
    found, note = sentences.scores(["a"], [["A b", "a C"]])
    assert "meteor" not in found and "not computed: could not convert string" in note
    monkeypatch.setattr(sentences.shutil, "which", lambda name: None)
    assert "needs Java" in sentences.scores(["a"], [["a"]])[1]
