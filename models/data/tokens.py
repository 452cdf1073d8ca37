"""From texts to padded batches: which rows, their token ids with the labels, and padding."""

from __future__ import annotations

from typing import Any

import datasets
from transformers import DataCollatorWithPadding

TRAIN_SCORED = 1000  # the final scores of train are taken on this many rows at most


def sample(
    splits: dict[str, datasets.Dataset], train_rows: int | None, eval_rows: int | None
) -> dict[str, datasets.Dataset]:
    """At most `train_rows` of train and `eval_rows` of each other split; None keeps all.

    The draw does not depend on the run's seed, so that runs with other seeds can be compared.
    """
    limits: dict[str, int | None] = dict.fromkeys(splits, eval_rows)
    limits["train"] = train_rows
    return {
        name: split.shuffle(seed=0).select(range(limit))
        if (limit := limits[name]) is not None and limit < len(split)
        else split
        for name, split in splits.items()
    }


def encode(
    splits: dict[str, datasets.Dataset], tokenizer: Any, max_length: int
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """The rows to train on, with their `length`, and split -> the rows to score."""
    encoded = {name: tokenise(split, tokenizer, max_length) for name, split in splits.items()}
    return encoded["train"], {name: scored(name, split) for name, split in encoded.items()}


def tokenise(split: datasets.Dataset, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """The split with token ids in place of the texts, and their `length`, at most `max_length`."""

    def tokens_of(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    texts = [name for name in ("text", "text_pair") if name in split.column_names]
    return split.map(tokens_of, batched=True, remove_columns=texts)


def scored(name: str, tokens: datasets.Dataset) -> datasets.Dataset:
    """The rows of a split that are scored: all of them, or a sample of train.

    They are sorted by length. Scores do not depend on the order, and there is less padding.
    """
    if name == "train" and len(tokens) > TRAIN_SCORED:
        tokens = tokens.shuffle(seed=0).select(range(TRAIN_SCORED))
    lengths = tokens["length"][:]
    ordered = tokens.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return ordered.remove_columns("length")


def collator(tokenizer: Any, max_length: int, pad_to_max: bool) -> DataCollatorWithPadding:
    """Pads a batch to `max_length`, or to its longest row rounded up to 8, for matrix units."""
    if pad_to_max:
        return DataCollatorWithPadding(tokenizer, "max_length", max_length=max_length)
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
