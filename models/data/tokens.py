"""From texts to padded batches: which rows, their token ids with the labels, and padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
from transformers import DataCollatorWithPadding

TRAIN_SCORED = 1000  # the final scores of train are taken on this many rows at most
VOCABULARY_SAMPLE = 1000  # rows whose words are looked up in the vocabulary


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
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset], dict[str, list[int]]]:
    """The rows to train on, with their `length`; split -> the rows to score; and their numbers.

    The numbers say which row of the split each one is that is scored.

    Raises ValueError where the tokenizer knows less than half of what is in train.
    """
    check_vocabulary(splits["train"]["text"][:VOCABULARY_SAMPLE], tokenizer)
    return chosen({name: tokenise(split, tokenizer, max_length) for name, split in splits.items()})


def chosen(
    encoded: dict[str, datasets.Dataset],
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset], dict[str, list[int]]]:
    """What `encode` returns, of splits whose rows have a `length`."""
    numbers = {name: order(name, split) for name, split in encoded.items()}
    rows = {
        name: split.select(numbers[name]).remove_columns("length")
        for name, split in encoded.items()
    }
    return encoded["train"], rows, numbers


def check_vocabulary(texts: Sequence[str], tokenizer: Any) -> None:
    """Raises ValueError where the tokenizer knows less than half of the tokens of `texts`."""
    known = known_share(texts, tokenizer)
    if known < 0.5:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} knows {known:.0%} of the tokens of train: "
            "its vocabulary is missing, or of another language"
        )


def known_share(texts: Sequence[str], tokenizer: Any) -> float:
    """The share of the tokens of `texts` that are in the vocabulary; 1 where there is no text."""
    texts = [text for text in texts if text.strip()]
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    unknown = tokenizer.unk_token_id
    # A vocabulary without any word may make nothing of a text: one unknown token.
    known = [token != unknown for ids in tokens for token in ids or [unknown]]
    return sum(known) / len(known) if known else 1.0


def tokenise(split: datasets.Dataset, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """The split with token ids in place of the texts, and their `length`, at most `max_length`.

    A text without a token, such as an empty one for GPT-2, becomes one end-of-text token.
    """
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    lone = {"input_ids": [end], "attention_mask": [1], "token_type_ids": [0]}

    def tokens_of(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        for row, ids in enumerate(encoded["input_ids"]):
            if not ids:
                for name in encoded:
                    encoded[name][row] = lone[name]
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    texts = [name for name in ("text", "text_pair") if name in split.column_names]
    return split.map(tokens_of, batched=True, remove_columns=texts)


def check_ids(splits: Iterable[datasets.Dataset], vocabulary: int | None) -> None:
    """Raises ValueError for a token id that a model of so large a vocabulary does not have."""
    largest = max(max(ids) for split in splits for ids in split["input_ids"])
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"the tokenizer makes the id {largest}, and the model has {vocabulary} tokens: "
            "they are not of the same model"
        )


def order(name: str, tokens: datasets.Dataset) -> list[int]:
    """The numbers of the rows of a split that are scored: all of them, or a sample of train.

    They are sorted by length. Scores do not depend on the order, and there is less padding.
    """
    rows = list(range(len(tokens)))
    if name == "train" and len(tokens) > TRAIN_SCORED:
        numbers = datasets.Dataset.from_dict({"row": rows})
        rows = numbers.shuffle(seed=0).select(range(TRAIN_SCORED))["row"][:]
    lengths = tokens["length"][:]
    return sorted(rows, key=lengths.__getitem__)


def collator(
    tokenizer: Any, max_length: int, pad_to_max: bool, multiple: int = 8
) -> DataCollatorWithPadding:
    """Pads a batch to `max_length`, or to its longest row rounded up to a `multiple`.

    8 is what matrix units like; a larger one makes fewer shapes.
    """
    if pad_to_max:
        return DataCollatorWithPadding(tokenizer, "max_length", max_length=max_length)
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
