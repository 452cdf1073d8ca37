"""Training a tiny random BERT: labels reach the model with their texts, and it learns from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

pytest.importorskip("datasets", reason="the models read their data by it")
from models.data import tokens
from models.train import Arguments, train
from models.training.trainer import LengthGroupedSampler
from tests.support.tiny_run import ROWS, WORDS, label_of, read_csv, write_csv


class Spy(TrainerCallback):
    """Keep the model and every batch that really reaches it."""

    def __init__(self) -> None:
        self.batches: dict[bool, list[dict[str, torch.Tensor]]] = {True: [], False: []}
        self.model: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def look(module, positional, inputs):
            self.batches[module.training].append({k: v.clone() for k, v in inputs.items()})

        self.model = model
        model.register_forward_pre_hook(look, with_kwargs=True)


def losses(arguments: Arguments) -> list[float]:
    return [row["loss"] for row in read_csv(arguments.directory() / "steps.csv")]


# --- labels ---------------------------------------------------------------------------------------


def check_labels(spy: Spy, tokenizer: Any) -> None:
    """Every row of every batch carries the label of the row number in its text, once an epoch."""
    seen: dict[bool, list[int]] = {True: [], False: []}
    for training, batches in spy.batches.items():
        for batch in batches:
            assert batch["input_ids"].shape[1] % 8 == 0
            for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
                row = int(tokenizer.convert_ids_to_tokens(ids.tolist())[2].removeprefix("row"))
                assert label == label_of(row), f"row {row} came with the label of another"
                seen[training].append(row)
    train_rows, rest = range(ROWS["train"]), range(ROWS["train"], sum(ROWS.values()))
    assert sorted(seen[True]) == sorted([*train_rows, *train_rows])
    assert set(seen[False]) == {*train_rows, *rest}
    assert seen[True][: ROWS["train"]] != seen[True][ROWS["train"] :], "epochs in the same order"


def test_labels_stay_with_their_texts_up_to_the_model(arguments, tokenizer):
    spy = Spy()
    train(arguments(), callbacks=(spy,))
    check_labels(spy, tokenizer)


def test_the_label_check_sees_permuted_labels(arguments, tokenizer, monkeypatch):
    original = tokens.tokenise

    def shifted(split, *rest):
        encoded = original(split, *rest)
        labels = encoded["labels"][:]
        return encoded.remove_columns("labels").add_column("labels", labels[1:] + labels[:1])

    monkeypatch.setattr(tokens, "tokenise", shifted)
    spy = Spy()
    train(arguments(epochs=1), callbacks=(spy,))
    with pytest.raises(AssertionError, match="label of another"):
        check_labels(spy, tokenizer)


def test_sampler_is_a_permutation_that_groups_lengths_and_changes_with_the_epoch():
    lengths = [random.Random(row).randrange(5, 100) for row in range(1003)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(1003))

    def padding(order):
        batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.2 * padding(range(1003))
    longest = [max(lengths[row] for row in first[i : i + 8]) for i in range(0, 400, 8)]
    assert longest != sorted(longest, reverse=True), "lengths drift over the epoch"


# --- learning -------------------------------------------------------------------------------------


def test_lora_alone_learns_and_everything_else_stays(arguments, bert):
    made = arguments(train_head=False, epochs=30, learning_rate=2e-2)
    spy = Spy()
    result = train(made, callbacks=(spy,))
    curve = losses(made)
    assert sum(curve[-6:]) < 0.5 * sum(curve[:6])
    assert result["metrics"]["train"]["accuracy"] > 0.9
    before = load_file(Path(bert) / "model.safetensors")
    for name, parameter in spy.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if "lora_B" in name:
            assert parameter.abs().max() > 1e-3, f"{name} did not move"
        elif name.startswith("bert.") and "lora_" not in name:
            torch.testing.assert_close(
                parameter.cpu(), before[name.removeprefix("bert.")], rtol=0, atol=0
            )


@pytest.mark.parametrize(
    "targets", [["query", "value"], ["all-linear"], ["query", "word_embeddings"]],
    ids=["qv", "all", "embedding"],
)  # fmt: skip
def test_curve_is_pefts_curve(arguments, targets):
    pytest.importorskip("peft")
    common = {"targets": targets, "epochs": 3}
    runs = {
        "lora": arguments("lora", **common),
        "peft": arguments("peft", method="peft", **common),
        "without": arguments("without", alpha=0.0, **common),
    }
    results = {name: train(made) for name, made in runs.items()}
    ours, theirs, without = (torch.tensor(losses(made)) for made in runs.values())
    assert len(ours) == 18
    # Both round differently by one ulp of the loss a step at most; Adam carries that on.
    bound = len(ours) * torch.finfo(torch.float32).eps * 16
    difference = (ours - theirs).abs().max()
    assert difference <= bound
    assert (without - theirs).abs().max() > 100 * bound, "the LoRA term would not be missed"
    assert results["lora"]["parameters"] == results["peft"]["parameters"]
    fused = {name: {row["name"] for row in results[name]["fused"]} for name in ("lora", "peft")}
    assert fused["lora"] == fused["peft"] != set()


def test_counts_show_what_trains(arguments):
    frozen = train(arguments("frozen", train_head=False, epochs=1))["parameters"]
    headed = train(arguments("headed", epochs=1))["parameters"]
    full = train(arguments("full", method="full", epochs=1))["parameters"]
    lora = 2 * 2 * (4 * 32 + 32 * 4)
    assert frozen["lora"] == {"trainable": lora, "total": lora}
    assert frozen["head"] == {"trainable": 0, "total": 66}
    assert headed["head"] == {"trainable": 66, "total": 66}
    assert headed["all"]["trainable"] == lora + 66
    assert full["all"]["trainable"] == full["all"]["total"] == headed["all"]["total"] - lora
    assert frozen["backbone"]["trainable"] == headed["embeddings"]["trainable"] == 0


# --- other models, tasks and switches -------------------------------------------------------------


def test_regression_has_float_labels_and_correlations(arguments, tmp_path):
    for split, count in ROWS.items():
        rows = [
            [f"row{i} {WORDS[i % 9]}", WORDS[i % 5], f"{i % 5 + 0.25:.3f}"] for i in range(count)
        ]
        write_csv(tmp_path / f"{split}.csv", ["sentence1", "sentence2", "label"], rows)
    spy = Spy()
    result = train(arguments(task="stsb", data_dir=str(tmp_path)), callbacks=(spy,))
    assert set(result["metrics"]["test"]) == {"loss", "pearson", "spearman", "mse"}
    assert result["metrics"]["test"]["loss"] == pytest.approx(
        result["metrics"]["test"]["mse"], rel=1e-4
    )
    labels = torch.cat([batch["labels"] for batch in spy.batches[True]])
    assert labels.dtype is torch.float32 and (labels % 1 == 0.25).all()
    assert any((batch["token_type_ids"] == 1).any() for batch in spy.batches[True])


def test_decoder_without_a_pad_token(arguments, tokenizer, tmp_path):
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64
    )
    transformers.GPT2Model(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]"
    ).save_pretrained(folder)
    result = train(arguments(model=str(folder), epochs=1))
    assert [row["name"].split(".")[-1] for row in result["fused"]] == ["c_attn", "c_attn"]
    assert result["parameters"]["head"]["trainable"] == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"precision": "bf16"},
        {"pad_to_max": True, "max_length": 40},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_switches_leave_the_curve_in_place(arguments, changes):
    plain, switched = arguments("plain", epochs=1), arguments("switched", epochs=1, **changes)
    spy = Spy()
    train(plain), train(switched, callbacks=(spy,))
    close = torch.finfo(torch.bfloat16).eps * 8 if "precision" in changes else 1e-5
    if "pad_to_max" in changes:
        assert {b["input_ids"].shape[1] for b in spy.batches[True]} == {40}
    else:
        assert losses(switched) == pytest.approx(losses(plain), rel=close)


def test_samples_are_limited_and_the_same_for_every_seed(arguments):
    spies = [Spy(), Spy()]
    for seed, spy in enumerate(spies):
        made = arguments(f"{seed}", seed=seed, epochs=1, max_train_samples=16, max_eval_samples=5)
        result = train(made, callbacks=(spy,))
        assert result["rows"] == {"train": 16, "validation": 5, "test": 5}
    rows = [sorted(ids[2].item() for b in s.batches[True] for ids in b["input_ids"]) for s in spies]
    assert rows[0] == rows[1] and len(rows[0]) == 16
