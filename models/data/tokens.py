"""From texts to padded batches: tokenizer, rows, token ids with their labels, collation."""

from __future__ import annotations

from typing import Any

import datasets
from transformers import AutoTokenizer, DataCollatorWithPadding

from models.arguments import Arguments

TRAIN_SCORED = 1000  # rows of train that the final scores are taken on, at most


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model, with a pad token whatever it was trained with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"--model {source}: no such directory, and not fetched: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and Llama were trained without padding
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has neither a pad nor an end-of-text token")
    tokenizer.padding_side = "right"  # where decoder heads look for the last real token
    return tokenizer


def sample(
    splits: dict[str, datasets.Dataset], arguments: Arguments
) -> dict[str, datasets.Dataset]:
    """Keep the rows asked for. They do not depend on the seed, so that seeds can be compared."""
    limits: dict[str, int | None] = dict.fromkeys(splits, arguments.max_eval_samples)
    limits["train"] = arguments.max_train_samples
    return {
        name: split.shuffle(seed=0).select(range(limit))
        if (limit := limits[name]) is not None and limit < len(split)
        else split
        for name, split in splits.items()
    }


def tokenise(split: datasets.Dataset, tokenizer: Any, arguments: Arguments) -> datasets.Dataset:
    """Replace the texts by token ids; ``labels`` and ``length`` stay beside them."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=arguments.max_length))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    texts = [name for name in ("text", "text_pair") if name in split.column_names]
    return split.map(encode, batched=True, remove_columns=texts)


def scored(name: str, tokens: datasets.Dataset) -> datasets.Dataset:
    """Sort by length: scores do not depend on the order, padding does. Sample train."""
    if name == "train" and len(tokens) > TRAIN_SCORED:
        tokens = tokens.shuffle(seed=0).select(range(TRAIN_SCORED))
    lengths = tokens["length"][:]
    ordered = tokens.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return ordered.remove_columns("length")


def collator(tokenizer: Any, arguments: Arguments) -> DataCollatorWithPadding:
    """Pad to the batch's longest row, rounded up to 8 for matrix units, or to a fixed length."""
    if arguments.pad_to_max:
        return DataCollatorWithPadding(tokenizer, "max_length", max_length=arguments.max_length)
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
