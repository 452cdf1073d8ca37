"""What several recipes share: axes, published rows, small bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .recipe import Flags, Published

QUERY_VALUE = ["query", "value"]
QUERY_KEY = ["query", "key"]
ATTENTION = ["query", "key", "value", "attention.output.dense"]
MATRICES: Mapping[str, list[str]] = {
    "Q": ["query"],
    "K": ["key"],
    "V": ["value"],
    "O": ["attention.output.dense"],
    "Q+K": QUERY_KEY,
    "Q+V": QUERY_VALUE,
    "V+O": ["value", "attention.output.dense"],
    "Q+K+V": ["query", "key", "value"],
    "Q+K+V+O": ATTENTION,
}
# Every linear layer of a block of GPT-2, with query, key and value apart; and of BERT.
GPT2_LINEAR = ["c_attn.q", "c_attn.k", "c_attn.v", "c_proj", "c_fc"]
BERT_LINEAR = ["query", "key", "value", "intermediate.dense", "output.dense"]

# MiniLM stands in for a larger encoder. Its pooler was never trained, so it trains.
MINILM: Flags = {
    "model": None, "train": ["pooler"], "max_length": 64, "learning_rate": 1e-3, "epochs": 2,
    "max_train_samples": 800, "max_eval_samples": 400,
}  # fmt: skip
LORA_OR_FULL: Mapping[str, Flags] = {"lora": {}, "full": {"learning_rate": 1e-4}}
# A random base shows that a command works; its accuracy says nothing.
TINY: Flags = {
    "max_length": 32, "learning_rate": 1e-3, "epochs": 2, "max_train_samples": 128,
    "max_eval_samples": 64,
}  # fmt: skip


def ranks(*values: int) -> dict[str, Flags]:
    """An axis of ranks: label -> flags."""
    return {str(value): {"rank": value} for value in values}


def targets(*labels: str) -> dict[str, Flags]:
    """An axis of attention matrices: label -> flags."""
    return {label: {"targets": MATRICES[label]} for label in labels}


def keep(*labels: str) -> dict[str, Flags]:
    """The labels of an axis that a small form has, as they are."""
    return {label: {} for label in labels}


def scores(axis: str, values: Mapping[str, Any], by: str = "report", **where: str) -> tuple:
    """Published scores in percent along `axis`: label -> value, or (value, spread)."""
    pairs = ((k, v if isinstance(v, tuple) else (v, None)) for k, v in values.items())
    return tuple(
        Published(
            {**where, axis: label}, value / 100, None if spread is None else spread / 100, by=by
        )
        for label, (value, spread) in pairs
    )
