"""The main job on a tiny random BERT: labels, curves, resume, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback

from models import train as module
from models.methods import METHODS
from models.train import Arguments, main, model_source, train
from models.trainer import LengthGroupedSampler, last_checkpoint

WORDS = [f"word{i}" for i in range(40)]
ROWS = {"train": 44, "validation": 12, "test": 12}


class KilledError(Exception):
    """Raised by a callback in the middle of training."""


class KillAt(TrainerCallback):
    """Cut the run off once ``step`` steps are done; count the steps made here."""

    def __init__(self, step: int | None = None, scoring: bool = False) -> None:
        self.step, self.scoring, self.steps = step, scoring, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.scoring:
            raise KilledError

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.scoring:
            raise KilledError


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    digits = [f"row{i}" for i in range(sum(ROWS.values()))]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *digits]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return transformers.BertTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer) -> str:
    """A directory with a random BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def label_of(row: int) -> int:
    """A label that no shift or sort of the rows leaves in place."""
    return random.Random(row * 7919 + 1).randrange(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """SST-2 files. Each text holds its row's number; the label also shows in the first word."""
    folder = tmp_path_factory.mktemp("data")
    row = 0
    for split, count in ROWS.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            for _ in range(count):
                words = random.Random(row).choices(WORDS[2:], k=3 + row * 5 % 23)
                writer.writerow(
                    [" ".join([WORDS[label_of(row)], f"row{row}", *words]), label_of(row)]
                )
                row += 1
    return str(folder)


@pytest.fixture
def arguments(bert, data, tmp_path):
    def build(name: str = "run", **changes: Any) -> Arguments:
        default = {
            "model": bert,
            "task": "sst2",
            "data_dir": data,
            "output_dir": str(tmp_path / name),
            "epochs": 2,
            "batch_size": 8,
            "max_length": 48,
            "rank": 4,
            "learning_rate": 5e-3,
        }
        return Arguments(**{**default, **changes})

    return build


def read_csv(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


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
    original = module.tokens.tokenise

    def shifted(split, *rest):
        tokens = original(split, *rest)
        labels = tokens["labels"][:]
        return tokens.remove_columns("labels").add_column("labels", labels[1:] + labels[:1])

    monkeypatch.setattr(module.tokens, "tokenise", shifted)
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
                parameter, before[name.removeprefix("bert.")], rtol=0, atol=0
            )


@pytest.mark.parametrize("targets", [["query", "value"], ["all-linear"]], ids=["qv", "all"])
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


# --- the same run again ---------------------------------------------------------------------------


def leftovers(arguments: Arguments) -> dict[str, Any]:
    """What must be the same in two runs, to the last digit."""
    directory = arguments.directory()
    return {
        "steps": (directory / "steps.csv").read_text().splitlines(),
        "history": (directory / "history.csv").read_text().splitlines(),
        "metrics": json.loads((directory / "result.json").read_text())["metrics"],
        "weights": {
            name: tensor.tolist()
            for name, tensor in load_file(directory / "adapter/adapter_model.safetensors").items()
        },
    }


@pytest.fixture
def whole(arguments):
    made = arguments("whole", dropout=0.1, save_steps=2, epochs=3)
    train(made)
    return leftovers(made)


def test_resumed_runs_end_as_the_uninterrupted_one(arguments, whole):
    assert len(whole["steps"]) == 1 + 18 and len(whole["history"]) == 1 + 3
    # Killed twice each: within an epoch and within the next, at the ends of epochs, and both.
    for first, second, left in ((3, 9, 10), (6, 12, 6), (12, 17, 2)):
        made = arguments(f"killed-{first}", dropout=0.1, save_steps=2, epochs=3)
        for step in (first, second):
            with pytest.raises(KilledError):
                train(made, callbacks=(KillAt(step),))
            assert not (made.directory() / "result.json").exists()
        counter = KillAt()
        train(made, callbacks=(counter,))
        assert counter.steps == left, "it did not go on from the last checkpoint"
        assert leftovers(made) == whole


def test_run_killed_while_an_epoch_is_scored_scores_it_again(arguments, whole):
    made = arguments("scoring", dropout=0.1, save_steps=2, epochs=3)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(6, scoring=True),))
    train(made)
    assert leftovers(made) == whole


def test_same_seed_same_run_other_seed_other_run(arguments, whole):
    again = arguments("again", dropout=0.1, save_steps=2, epochs=3)
    other = arguments("other", dropout=0.1, save_steps=2, epochs=3, seed=1)
    train(again), train(other)
    assert leftovers(again) == whole
    assert leftovers(other)["steps"] != whole["steps"]


def test_checkpoints_hold_what_trains(arguments):
    made = arguments(save_steps=2)
    with pytest.raises(KilledError):
        train(made, callbacks=(KillAt(5),))
    checkpoint = last_checkpoint(made.directory() / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    saved = load_file(checkpoint / "trained.safetensors")
    assert len(saved) == 2 * 2 * 2 + 2
    assert all("lora_" in name or name.startswith("classifier.") for name in saved)
    assert not (checkpoint / "model.safetensors").exists()


def test_incomplete_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, '{"cut'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_finished_run_is_read_back_and_another_is_not_overwritten(arguments):
    made = arguments(epochs=1)
    result = train(made)
    counter = KillAt()
    assert json.loads(json.dumps(result)) == train(made, callbacks=(counter,))
    assert counter.steps == 0
    with pytest.raises(ValueError, match=r"rank 4 -> 5.*--overwrite"):
        train(arguments(epochs=1, rank=5))
    with pytest.raises(ValueError, match="holds a run already"):
        train(arguments(epochs=1, resume=False))
    assert train(arguments(epochs=1, rank=5, overwrite=True))["arguments"]["rank"] == 5


# --- what a run leaves behind ---------------------------------------------------------------------


def test_run_directory_is_whole(arguments):
    made = arguments()
    result = train(made)
    directory = made.directory()
    assert {path.name for path in directory.iterdir()} == {
        "adapter", "arguments.json", "history.csv", "plot.png", "result.json", "steps.csv",
    }  # fmt: skip
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["metrics"]) == set(ROWS)
    assert set(result["metrics"]["test"]) == {"loss", "accuracy"}
    assert result["rows"] == result["scored"] == ROWS
    assert result["seconds"] > 0 and result["samples_per_second"] > 0
    assert result["peak_memory"]["bytes"] > 2**20
    assert len(result["fused"]) == 4 and {"torch", "transformers"} <= set(result["versions"])
    assert (directory / "plot.png").read_bytes()[:4] == b"\x89PNG"
    history, steps = read_csv(directory / "history.csv"), read_csv(directory / "steps.csv")
    assert [row["epoch"] for row in history] == [1, 2]
    assert [row["step"] for row in steps] == list(range(1, 13))
    for epoch, row in enumerate(history, start=1):
        own = [step["loss"] for step in steps if step["epoch"] == epoch]
        assert row["train_loss"] == pytest.approx(sum(own) / len(own), rel=1e-12)
    assert history[-1]["validation_accuracy"] == result["metrics"]["validation"]["accuracy"]
    # The command in the result is the run.
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        result["command"].split()[3:]
    )
    assert parsed == made


def test_adapter_gives_the_scores_again(arguments, bert, data, tokenizer):
    from lora_kernels import load_adapter

    made = arguments(epochs=20, learning_rate=2e-2)
    result = train(made)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    load_adapter(model, made.directory() / "adapter")
    with (Path(data) / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([int(row["label"]) for row in rows])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-5)
    assert abs(loss - 0.693) > 0.01, "an untrained model would give this"


def test_full_fine_tuning_saves_a_plain_model(arguments):
    made = arguments(method="full", epochs=1)
    train(made)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        made.directory() / "model"
    )
    assert model.config.id2label == {0: "negative", 1: "positive"}


# --- other models, tasks and switches -------------------------------------------------------------


def test_regression_has_float_labels_and_correlations(arguments, tmp_path):
    for split, count in ROWS.items():
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence1", "sentence2", "label"])
            writer.writerows(
                [f"row{i} {WORDS[i % 9]}", WORDS[i % 5], f"{i % 5 + 0.25:.3f}"]
                for i in range(count)
            )
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


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"learning_rate": -1.0}, "learning-rate"),
        ({"warmup_ratio": 2.0}, "warmup-ratio"),
        ({"scheduler": "linaer"}, "linear"),
        ({"strategy": "fastest"}, "strategy"),
        ({"task": "sst3"}, "did you mean sst2"),
        ({"data_dir": "/nowhere"}, "/nowhere is not a directory"),
        ({"model": "/nowhere/model"}, "/nowhere/model is not a directory"),
        ({"targets": ["querry"]}, "querry.*query"),
        ({"max_length": 65}, "64 positions"),
        ({"method": "full", "targets": ["query"]}, "leave out --targets"),
        ({"method": "full", "train_head": False}, "no-train-head"),
        ({"method": "peft", "strategy": "library"}, "--strategy belongs to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_is_written(arguments, changes, message):
    made = arguments(**changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(made)
    assert not made.directory().exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does fp16")
def test_half_precision_needs_a_gpu(arguments):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(arguments(precision="fp16"))


def test_overwrite_does_not_delete_a_strangers_folder(arguments):
    made = arguments(overwrite=True)
    made.directory().mkdir()
    (made.directory() / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a run directory"):
        train(made)
    assert (made.directory() / "thesis.tex").exists()


def test_default_model_is_found_without_importing_its_package(monkeypatch):
    monkeypatch.setattr(module, "DEFAULT_MODEL_PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install"):
        model_source(None)
    monkeypatch.setattr(module, "DEFAULT_MODEL_PACKAGE", "json")
    with pytest.raises(FileNotFoundError, match=r"json/model is not a directory"):
        model_source(None)


def test_command_line_prints_tables_and_errors(bert, data, tmp_path, capsys):
    words = ["--model", bert, "--task", "sst2", "--data-dir", data, "--epochs", "1"]
    words += [
        "--targets",
        "query",
        "value",
        "--no-train-head",
        "--max-length",
        "48",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--rank", "0"]) == 2
    assert "error: --rank 0" in capsys.readouterr().err
    assert main(words) == 0
    output = capsys.readouterr().out
    for expected in ("parameters", "head", "test", "majority class", "plot.png"):
        assert expected in output


def test_every_method_is_a_choice_on_the_command_line():
    assert get_args(get_type_hints(Arguments)["method"]) == tuple(METHODS)
