"""A tiny random BERT, rows for it to learn, and the arguments of a run of `train` on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support.tiny_run import ROWS, SIZES, WORDS, drawn, label_of, text_of, write_csv


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    numbers = [f"row{i}" for i in range(sum(ROWS.values()))]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *numbers]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return transformers.BertTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer) -> str:
    """A directory with a random BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    return drawn(transformers.BertModel, config, tokenizer, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A directory with SST-2 files; the rows of the splits are numbered one after another."""
    folder: Path = tmp_path_factory.mktemp("data")
    first = 0
    for split, count in ROWS.items():
        rows = [[text_of(row), label_of(row)] for row in range(first, first + count)]
        write_csv(folder / f"{split}.csv", ["sentence", "label"], rows)
        first += count
    return str(folder)


@pytest.fixture
def arguments(bert, data, tmp_path) -> Callable[..., Any]:
    """Makes the `Arguments` of a short run into `tmp_path / name`, with what a test changes."""
    from models.methods import METHODS
    from models.train import Arguments  # needs `datasets`, without which the tests are skipped

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
        if "rank" in METHODS.get(changes.get("method", "lora"), METHODS["lora"]).unread:
            del default["rank"]
        return Arguments(**{**default, **changes})

    return build
