"""Model families, a row each: the usual LoRA targets, and the names of the task heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Family:
    """One row: the `model_type`s it covers, its usual LoRA targets, the names of its task heads.

    `columns` names the equal ranges of the columns of a layer that computes several projections in
    one: `c_attn.q` is a target like any other.
    """

    name: str
    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    head: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_ROBERTA = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl")
_LLAMA = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi",
    "olmo", "olmo2", "granite", "smollm3", "starcoder2", "stablelm", "cohere", "opt", "gptj",
    "gpt_neo",
)  # fmt: skip
_HEAD = ("classifier", "qa_outputs")


FAMILIES = (
    Family("roberta", _ROBERTA, ("query", "value"), _HEAD),
    Family("bert", ("bert",), ("query", "value"), _HEAD),
    Family("electra", ("electra",), ("query", "value"), _HEAD),
    Family("mpnet", ("mpnet",), ("attn.q", "attn.v"), _HEAD),
    # No DeBERTa checkpoint holds the pooler of its classifier, so it is part of the head.
    Family("deberta-v2", ("deberta-v2",), ("query_proj", "value_proj"), ("pooler", *_HEAD)),
    Family("modernbert", ("modernbert",), ("Wqkv",), _HEAD, {"Wqkv": ("q", "k", "v")}),
    Family("distilbert", ("distilbert",), ("q_lin", "v_lin"), ("pre_classifier", *_HEAD)),
    Family("gpt2", ("gpt2",), ("c_attn",), ("score", *_HEAD), {"c_attn": ("q", "k", "v")}),
    Family("neox", ("gpt_neox", "bloom"), ("query_key_value",), ("score", *_HEAD)),
    # Earlier versions of transformers call them query and value.
    Family("vit", ("vit",), (r"re:.*\.(query|value|q_proj|v_proj)",), _HEAD),
    Family("t5", ("t5", "mt5"), ("q", "v"), ("classification_head", *_HEAD)),
    Family("llama", _LLAMA, ("q_proj", "v_proj"), ("score", *_HEAD)),
)


def family_of(model: nn.Module) -> Family | None:
    """The row of `FAMILIES` for `model.config.model_type`, or None."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((row for row in FAMILIES if model_type in row.model_types), None)


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The task heads that `model` has, as names for `train=`.

    Example:
        >>> add_lora(model, LoRAConfig(train=heads_of(model)))
    """
    family = family_of(model)
    names = family.head if family else tuple(dict.fromkeys(n for row in FAMILIES for n in row.head))
    children = dict(model.named_children())
    return tuple(n for n in names if n in children and any(True for _ in children[n].parameters()))
