"""The made-up rows that a tiny run trains on, and reading back what it wrote."""

from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path
from typing import Any

import torch

WORDS = [f"word{i}" for i in range(40)]
ROWS = {"train": 44, "validation": 12, "test": 12}
# Of a tiny transformer, in the words of transformers' configurations.
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip


def label_of(row: int) -> int:
    """A label that no shift or sort of the rows leaves in place."""
    return random.Random(row * 7919 + 1).randrange(2)


def text_of(row: int) -> str:
    """A text that holds its row's number; the first word is the label's."""
    words = random.Random(row).choices(WORDS[2:], k=3 + row * 5 % 23)
    return " ".join([WORDS[label_of(row)], f"row{row}", *words])


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    """A split in a file, compressed where its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a file of numbers."""
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def drawn(kind, config: Any, tokenizer: Any, folder: Path) -> str:
    """A directory with a random model of a class of transformers, and its tokenizer."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
