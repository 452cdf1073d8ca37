"""RoBERTa and DeBERTa on sentences: items 1 to 4, which four reports reproduced."""

from __future__ import annotations

from typing import Any

from .recipe import Claim, Flags, Published, Recipe
from .shared import (
    ATTENTION,
    LORA_OR_FULL,
    MATRICES,
    MINILM,
    QUERY_KEY,
    QUERY_VALUE,
    TINY,
    keep,
    ranks,
    scores,
    targets,
)

# --- 1. RoBERTa-large, STS-B ----------------------------------------------------------------------

STSB_LARGE: Flags = {
    "model": "roberta-large", "task": "stsb", "learning_rate": 1e-4, "batch_size": 16, "epochs": 5,
    "rank": 3, "alpha": 16.0, "targets": ATTENTION, "reduction": 341,
}  # fmt: skip


def matrix(task: str, published: tuple[Published, ...] = (), **changes: Any) -> Recipe:
    """The row that asks which attention matrices to adapt, for one task."""
    return Recipe(
        f"{task.replace('_', '-')}-matrix",
        item=1,
        title=f"Which matrix: RoBERTa-large, {task}",
        base={**STSB_LARGE, "task": task},
        axes={
            "head": {"trained": {}, "frozen": {"train_head": False}},
            "matrix": targets(*MATRICES),
            "rank": ranks(1, 2, 4, 8, 32),
        },
        seeds=5,
        published=published,
        heat=("matrix", "rank"),
        note="The report names no rank and no head, so ours beside them are means over both.",
        small=MINILM,
        small_axes={
            "head": keep("trained"),
            "matrix": keep("Q", "K", "V", "O", "V+O"),
            "rank": keep("1", "8"),
        },
        **changes,
    )


_STSB = (
    Recipe(
        "stsb",
        item=1,
        title="LoRA, adapters and full fine-tuning: RoBERTa-large, STS-B",
        base=STSB_LARGE,
        axes={
            "method": {
                "lora": {},
                "full": {"method": "full", "learning_rate": 1e-5},
                "full, 20 x rate": {"method": "full", "learning_rate": 2e-4},
                "adapter": {"method": "adapter"},
            }
        },
        seeds=5,
        metric="pearson",
        published=(
            Published({"method": "lora"}, 0.91, 0.008),
            Published({"method": "adapter"}, 0.82, 0.014),
            Published({"method": "lora"}, 0.981, ratio_to={"method": "full"}),
            Published({"method": "adapter"}, 0.889, ratio_to={"method": "full"}),
            Published({"method": "lora"}, 172, quantity="seconds an epoch"),
            Published({"method": "adapter"}, 148, quantity="seconds an epoch"),
            Published({"method": "full"}, 325, quantity="seconds an epoch"),
            Published({"method": "lora"}, 0.0624, quantity="variation, first epoch"),
            Published({"method": "adapter"}, 0.5001, quantity="variation, first epoch"),
            Published({"method": "lora"}, 0.0051, quantity="variation, last epoch"),
            Published({"method": "adapter"}, 0.0222, quantity="variation, last epoch"),
            Published({"method": "lora"}, 290_000, quantity="method's parameters"),
            Published({"method": "adapter"}, 200_000, quantity="method's parameters"),
            Published({"method": "lora"}, 589_824, quantity="method's parameters", by="formula"),
            Published({"method": "adapter"}, 344_208, quantity="method's parameters", by="formula"),
        ),
        claims=(Claim("method", "lora", "adapter"), Claim("method", "full", "lora")),
        note="Full fine-tuning at 20 times the rate (2e-4) is there to show its divergence. By "
        "formula, LoRA of rank 3 on two of the four matrices has 294,912 parameters, which is the "
        "published 0.29 M; on four it has 589,824.",
        small={**MINILM, "reduction": 64},
        small_axes={
            "method": {
                "lora": {},
                "full": {"learning_rate": 1e-4},
                "full, 20 x rate": {"learning_rate": 2e-3},
                "adapter": {},
            }
        },
    ),
    matrix(
        "stsb",
        (
            Published({"matrix": "V"}, 0.912, 0.001),
            Published({"matrix": "O"}, 0.912, 0.001),
            Published({"matrix": "Q"}, 0.86),
            Published({"matrix": "K"}, 0.86),
            Published({"matrix": "V+O"}, 0.917),
        ),
        claims=(Claim("matrix", "V", "Q"), Claim("matrix", "O", "K")),
    ),
    matrix("snli"),
    matrix("ag_news", split="test"),
)

# --- 2. RoBERTa-base, GLUE ------------------------------------------------------------------------

GLUE_BASE: Flags = {
    "model": "roberta-base", "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8,
    "scheduler": "linear", "warmup_ratio": 0.06, "epochs": 3, "batch_size": 16, "max_length": 128,
    "rank": 8, "alpha": 16.0, "targets": QUERY_VALUE,
}  # fmt: skip
_MNLI_RANKS = {
    "Q": (72.74, 77.50, 79.57, 81.50, 83.23),
    "Q+V": (85.03, 85.45, 86.42, 86.53, 87.28),
    "Q+K+V+O": (85.50, 85.89, 86.54, 86.86, 87.29),
}

_GLUE = (
    Recipe(
        "glue",
        item=2,
        title="LoRA on three GLUE tasks: RoBERTa-base",
        base=GLUE_BASE,
        axes={
            "task": {
                "sst2": {"task": "sst2", "learning_rate": 5e-4},
                "qqp": {"task": "qqp", "learning_rate": 5e-4},
                "mrpc": {"task": "mrpc", "learning_rate": 4e-4},
            }
        },
        seeds=5,
        metric="accuracy",
        pick="best",
        statistic="median",
        published=(
            *scores("task", {"sst2": (93.8, 0.2), "qqp": (88.7, 0.2), "mrpc": 88.0}),
            *scores("task", {"sst2": (95.1, 0.2), "qqp": (90.8, 0.1), "mrpc": (89.7, 0.7)},
                    by="paper"),
        ),
        small=MINILM,
        small_axes={
            "task": {task: {"learning_rate": 1e-3} for task in ("sst2", "qqp", "mrpc")},
        },
    ),
    Recipe(
        "mnli-rank",
        item=2,
        title="Rank and weights: RoBERTa-base, MNLI",
        base={**GLUE_BASE, "task": "mnli", "learning_rate": 5e-4},
        axes={"weights": targets(*_MNLI_RANKS), "rank": ranks(1, 2, 4, 8, 64)},
        seeds=1,
        published=tuple(
            Published({"weights": weights, "rank": rank}, score / 100)
            for weights, row in _MNLI_RANKS.items()
            for rank, score in zip(("1", "2", "4", "8", "64"), row, strict=True)
        ),
        heat=("weights", "rank"),
        small=MINILM,
        small_axes={"rank": keep("1", "8")},
    ),
)  # fmt: skip

# --- 3. MRPC, RTE, DeBERTa ------------------------------------------------------------------------

_CURVES = (
    Recipe(
        "mrpc-rte",
        item=3,
        title="LoRA of three ranks against full fine-tuning: RoBERTa-base, MRPC and RTE",
        base={"model": "roberta-base", "epochs": 10, "batch_size": 16, "alpha": 16.0,
              "learning_rate": 5e-4, "targets": QUERY_KEY},
        axes={
            "task": {"mrpc": {"task": "mrpc"}, "rte": {"task": "rte"}},
            "method": {
                "r=4": {"rank": 4},
                "r=8": {"rank": 8},
                "r=16": {"rank": 16},
                "full": {"method": "full", "learning_rate": 2e-5},
            },
        },
        seeds=3,
        metric="accuracy",
        claims=(Claim("method", "full", "r=16"),),
        note="The report names neither learning rates nor seeds; these are the paper's and ours.",
        small={**MINILM, "epochs": 3},
        small_axes={"method": {**keep("r=4", "r=16"), "full": {"learning_rate": 1e-4}}},
    ),
    Recipe(
        "deberta-sst2",
        item=3,
        title="LoRA against full fine-tuning: DeBERTa-v2-xlarge, SST-2",
        base={"model": "microsoft/deberta-v2-xlarge", "task": "sst2", "epochs": 3,
              "batch_size": 16, "rank": 8, "alpha": 16.0, "learning_rate": 1e-4},
        axes={"method": {"lora": {}, "full": {"method": "full", "learning_rate": 3e-6}}},
        seeds=1,
        small={**TINY, "model": "tiny-deberta-v2"},
        small_axes={"method": {"lora": {}, "full": {"learning_rate": 1e-3}}},
    ),
    Recipe(
        "sst2",
        item=3,
        title="SST-2 by LoRA: RoBERTa-base",
        base={**GLUE_BASE, "task": "sst2", "learning_rate": 5e-4},
        axes={"method": {"lora": {}}},
        seeds=1,
        published=(
            *scores("method", {"lora": 91.8}),
            *scores("method", {"lora": (95.1, 0.2)}, by="paper"),
        ),
        small=MINILM,
    ),
)  # fmt: skip

# --- 4. LoRA against full fine-tuning, six GLUE tasks ---------------------------------------------

SIX_TASKS = ("mnli", "qqp", "qnli", "sst2", "mrpc", "rte")
_AGAINST_FULL = (
    Recipe(
        "lora-full",
        item=4,
        title="LoRA against full fine-tuning on six GLUE tasks: RoBERTa-base",
        base={"model": "roberta-base", "batch_size": 16, "epochs": 3, "rank": 8, "alpha": 16.0,
              "targets": QUERY_VALUE, "learning_rate": 5e-4},
        axes={
            "task": {name: {"task": name} for name in SIX_TASKS},
            "method": {"lora": {}, "full": {"method": "full", "learning_rate": 2e-5}},
        },
        seeds=1,
        metric="accuracy",
        published=(
            Published({"task": "mnli", "method": "lora"}, 0.8311),
            Published({"task": "mnli", "method": "full"}, 0.8611),
            Published({"task": "qqp", "method": "lora"}, 0.8561),
            Published({"task": "qqp", "method": "full"}, 0.8883),
            Published({"task": "sst2", "method": "lora"}, 0.0046,
                      minus={"task": "sst2", "method": "full"}),
            Published({"task": "qnli", "method": "full"}, 6010, quantity="memory, MiB"),
            Published({"task": "qnli", "method": "lora"}, 4334, quantity="memory, MiB"),
            Published({"method": "full"}, 2, high=3, quantity="memory, MiB",
                      ratio_to={"method": "lora"}),
            Published({"task": "sst2", "method": "lora"}, 7.869, quantity="steps a second"),
            Published({"task": "sst2", "method": "full"}, 5.740, quantity="steps a second"),
            Published({"method": "lora"}, 1.3, high=1.4, quantity="steps a second",
                      ratio_to={"method": "full"}),
        ),
        claims=(Claim("method", "full", "lora"),),
        note="The report names no unit of its rate (7.869 and 5.740); it is taken for steps.",
        small=MINILM,
        small_axes={"method": LORA_OR_FULL},
    ),
)  # fmt: skip


ROWS = (*_STSB, *_GLUE, *_CURVES, *_AGAINST_FULL)
