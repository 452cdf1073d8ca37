"""Prompts and the targets that follow them, as token ids; only the target is learnt.

    ids     prompt  end  target  end
    labels  -100 ...     target  end

`end` is the tokenizer's end-of-text token. The loss leaves out the label -100, as the LoRA paper
leaves out the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq

from .tokens import VOCABULARY_SAMPLE, check_vocabulary, chosen

IGNORED = -100


def encode(
    splits: dict[str, datasets.Dataset], tokenizer: Any, max_length: int
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset], dict[str, list[int]]]:
    """As `tokens.encode`, for splits with the columns `text` and `target`.

    A target is cut where the row has `max_length` tokens. Raises ValueError for a prompt that
    leaves no room for a target, and for a tokenizer without an end-of-text token.
    """
    check_vocabulary(splits["train"]["text"][:VOCABULARY_SAMPLE], tokenizer)

    def tokens_of(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        prompts = prompt_ids(batch["text"], tokenizer, max_length)
        targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        ends = [[*ids, tokenizer.eos_token_id] for ids in targets]
        pairs = [(p, t[: max_length - len(p)]) for p, t in zip(prompts, ends, strict=True)]
        return {
            "input_ids": [p + t for p, t in pairs],
            "attention_mask": [[1] * len(p + t) for p, t in pairs],
            "labels": [[IGNORED] * len(p) + t for p, t in pairs],
            "length": [len(p + t) for p, t in pairs],
        }

    encoded = {
        name: split.map(tokens_of, batched=True, remove_columns=["text", "target"])
        for name, split in splits.items()
    }
    return chosen(encoded)


def prompt_ids(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """The ids of each prompt, with the end-of-text token behind it. Raises as `encode` does."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token")
    found = [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(map(len, found))
    if longest >= max_length:
        raise ValueError(
            f"--max-length {max_length} leaves no room for a target: a prompt takes {longest}"
        )
    return found


def collator(
    tokenizer: Any, max_length: int, pad_to_max: bool, multiple: int = 8
) -> DataCollatorForSeq2Seq:
    """Pads ids and labels as `tokens.collator` does; the label of padding is -100."""
    if pad_to_max:
        return DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=max_length)
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
