"""transformers' Trainer and its like over our models: checkpoints, resuming, the best model."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.version import parse
from torch import nn

from lora_kernels import FusedLoRACallback, LoRAConfig, add_lora, load_adapter, merge
from lora_kernels.injection.inject import trained_paths
from tests.adapters.test_load_save import CONFIG, WEIGHTS, from_peft, injected
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = LoRAConfig(rank=3, alpha=5, dropout=0.1, targets=("query", "value"), train="classifier")


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, 60, (count, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.sum() % 3} for row in ids]


def trainer(model: nn.Module, folder: Path, callbacks=None, **changes) -> transformers.Trainer:
    options = {
        "num_train_epochs": 2, "per_device_train_batch_size": 6, "learning_rate": 0.02,
        "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 1, "seed": 3,
        "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(folder, **options | changes)
    return transformers.Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(12), callbacks=callbacks
    )


def base(folder: Path) -> nn.Module:
    """A pretrained RoBERTa on disk, loaded, so that an adapter can name it."""
    if not folder.exists():
        zoo.build("roberta").save_pretrained(folder)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, num_labels=3).eval()


def with_lora(folder: Path) -> nn.Module:
    model = base(folder)
    torch.manual_seed(5)
    add_lora(model, OURS)
    return model


def losses(run: transformers.Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def test_a_checkpoint_is_an_adapter_that_peft_and_we_load(tmp_path):
    model = with_lora(tmp_path / "base")
    trainer(model, tmp_path / "run").train()
    folder = tmp_path / "run/checkpoint-8"
    assert {f.name for f in folder.iterdir()} >= {CONFIG, WEIGHTS, "model.safetensors"}
    assert not (folder / "config.json").exists()
    whole = (tmp_path / "base/model.safetensors").stat().st_size
    assert (folder / "model.safetensors").stat().st_size < whole / 3
    expected = zoo.logits(model.eval())
    ours = base(tmp_path / "base")
    load_adapter(ours, folder)
    assert torch.equal(zoo.logits(ours), expected)
    found = [peft.PeftModel.from_pretrained(base(tmp_path / "base"), folder)]
    if parse(transformers.__version__) >= parse("5.20"):  # 5.17 loses the head of PEFT's own files
        kind = transformers.AutoModelForSequenceClassification
        found.append(kind.from_pretrained(folder, num_labels=3))
    for theirs in found:
        torch.testing.assert_close(zoo.logits(theirs.eval()), expected)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, cut = (trainer(with_lora(tmp_path / "base"), tmp_path / name) for name in ("a", "b"))
    whole.train()
    cut.args.num_train_epochs = 1
    cut.train()
    again = trainer(with_lora(tmp_path / "base"), tmp_path / "b")
    zoo.randomise(again.model, "lora_", "classifier")  # the checkpoint's values take their place
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert losses(again) == losses(whole)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        with_lora(tmp_path / "base"), tmp_path / "run", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, num_train_epochs=3,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    scores = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    assert best.name == f"checkpoint-{max(scores, key=scores.get)}"
    ours = base(tmp_path / "base")
    load_adapter(ours, best)
    assert torch.equal(zoo.logits(run.model.eval()), zoo.logits(ours))
    assert run.evaluate()["eval_loss"] == pytest.approx(max(scores.values()))


def test_save_pretrained_of_a_copy_saves_the_copy(tmp_path):
    model = injected(targets=("query", "value"))
    for name, duplicate in (
        ("copy", copy.deepcopy(model)),
        ("pickle", pickle.loads(pickle.dumps(model))),
    ):
        zoo.randomise(duplicate, "lora_A")
        zoo.randomise(duplicate, "classifier")
        duplicate.save_pretrained(tmp_path / name)
        torch.testing.assert_close(
            zoo.logits(from_peft(tmp_path / name, "roberta")), zoo.logits(duplicate)
        )
    merge(model).save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / CONFIG).exists()


def test_what_is_pushed_to_the_hub_is_the_adapter(tmp_path, monkeypatch):
    model = injected()
    pushed = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, *a, **k: pushed.append((a, k)))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", max_shard_size="1GB")
    assert pushed == [(("mine",), {"token": "t"})] and (tmp_path / "mine" / CONFIG).exists()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_a_part_of_a_model_saves_its_own_adapter(tmp_path):
    """As sentence-transformers does with the transformers model inside its modules."""
    tower = nn.Sequential(nn.ModuleDict({"model": zoo.build("roberta")}), nn.Linear(3, 3))
    add_lora(tower, LoRAConfig(targets=("query",), train=("classifier", "re:1")))
    inner = tower[0]["model"]
    zoo.randomise(inner, "lora_", "classifier")
    assert trained_paths(inner) == ["classifier"]
    inner.save_pretrained(tmp_path)
    theirs = from_peft(tmp_path, "roberta")
    torch.testing.assert_close(zoo.logits(theirs), zoo.logits(inner))


def test_sentence_transformers_save_and_load(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "test", "of", "words", "one"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(**{**zoo.BERT, "vocab_size": len(words)})
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    add_lora(model, LoRAConfig(targets=("query", "value")))
    zoo.randomise(model, "lora_")
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["a test of words", "one more"]
    found, expected = (m.encode(texts, convert_to_tensor=True) for m in (again, model))
    torch.testing.assert_close(found, expected)
    assert (tmp_path / "saved" / WEIGHTS).exists()


# ---------------------------------------------------------------- FusedLoRACallback


def peft_run(folder: Path, *callbacks) -> transformers.Trainer:
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, task_type="SEQ_CLS", target_modules=["query", "value"]
    )
    model = peft.get_peft_model(base(folder.parent / "base"), config)
    # Adam would divide gradients that are rounding errors by their own size.
    run = trainer(model, folder, list(callbacks), optim="sgd", learning_rate=0.3)
    run.train()
    return run


@pytest.mark.parametrize("callback", [FusedLoRACallback, FusedLoRACallback()], ids=["class", "it"])
def test_the_callback_fuses_what_a_trainer_trains(callback, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lora_kernels"):
        fused = peft_run(tmp_path / "fused", callback)
    assert "fused 4 layers" in caplog.text
    plain = peft_run(tmp_path / "plain")
    (used,) = [c for c in fused.callback_handler.callbacks if isinstance(c, FusedLoRACallback)]
    assert len(used.report.fused) == 4
    assert losses(fused) == pytest.approx(losses(plain), abs=1e-6)
    assert losses(fused)[0] != losses(fused)[-1]
    names = [
        {f.name for f in (tmp_path / name / "checkpoint-8").iterdir()}
        for name in ("fused", "plain")
    ]
    assert names[0] == names[1]
    again = peft.PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "fused/checkpoint-8")
    torch.testing.assert_close(zoo.logits(again.eval()), zoo.logits(fused.model.eval()))


def test_the_callback_says_what_runs_unfused_and_refuses_a_model_without_lora(tmp_path, caplog):
    model = peft.get_peft_model(
        base(tmp_path / "base"), peft.LoraConfig(target_modules=["query", "word_embeddings"])
    )
    callback = FusedLoRACallback(strategy="library", group=False)
    callback.on_train_begin(None, None, None, model=model)
    assert "word_embeddings runs unfused" in caplog.text
    ours = with_lora(tmp_path / "base")
    callback.on_train_begin(None, None, None, model=ours)
    assert len(callback.report.fused) == 4
    with pytest.raises(ValueError, match="has no PEFT LoRA layer: use add_lora"):
        callback.on_train_begin(None, None, None, model=base(tmp_path / "base"))
    with pytest.raises(ValueError, match="unknown strategy"):
        FusedLoRACallback("spilt")
    with pytest.raises(AttributeError, match="no attribute 'un_known'"):
        callback.un_known  # noqa: B018
