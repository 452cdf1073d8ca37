"""A tiny random BERT, made-up rows whose labels can be checked, and a run of `train` on them."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("datasets", reason="the models read their data by it")
from models.train import Arguments

WORDS = [f"word{i}" for i in range(40)]
ROWS = {"train": 44, "validation": 12, "test": 12}


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
