"""The linear layers of known models, by size: what `tune`, `doctor` and the benchmarks measure.

A new model is a row of MODELS; a new kind of block is a function that gives its layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..strategies.problem import Problem


class Model(NamedTuple):
    """A model's kind of block and its widths; `key` is that of keys where heads share them."""

    block: Callable[[Model], tuple[Layer, ...]]
    hidden: int
    intermediate: int
    key: int = 0


class Layer(NamedTuple):
    """A frozen linear layer, y [M, N] from x [M, K], or siblings that read one x (an N for each).

    `children` are their names in the model, and `also` other layers of the same size. With
    `columns` there is one weight, and `children` are ranges of a third of its columns. With `nf4`
    the weight is bitsandbytes' NF4.
    """

    name: str
    K: int
    N: tuple[int, ...]
    children: tuple[str, ...]
    conv1d: bool = False
    bias: bool = True
    also: str = ""
    columns: bool = False
    nf4: bool = False

    def problem(
        self, device: torch.device, M: int, R: int, dtype: torch.dtype, *, dropout: bool
    ) -> Problem:
        """One call of the layer with LoRA, as `choose` is asked."""
        return Problem.on(
            device, M, max(self.N), self.K, R, dtype,
            dropout=dropout, segments=len(self.children), columns=self.columns,
        )  # fmt: skip


def _encoder(model: Model, suffix: str = "") -> tuple[Layer, ...]:
    """A block as in BERT."""
    hidden, wide = model.hidden, model.intermediate
    q, k, v = (f"{child}{suffix}" for child in ("query", "key", "value"))
    return (
        Layer(q, hidden, (hidden,), (q,), also=f"{k}, {v}, attention.output.dense"),
        Layer("up", hidden, (wide,), ("dense",), also="intermediate.dense"),
        Layer("down", wide, (hidden,), ("dense",), also="output.dense"),
        Layer("qkv", hidden, (hidden,) * 3, (q, k, v)),
        Layer("qv", hidden, (hidden,) * 2, (q, v)),
    )


def _gpt2(model: Model) -> tuple[Layer, ...]:
    """A block of transformers' Conv1D, whose weight is [K, N]."""
    hidden, wide = model.hidden, model.intermediate
    qkv, ranges = (3 * hidden,), ("c_attn.q", "c_attn.v")
    return (
        Layer("c_attn", hidden, qkv, ("c_attn",), conv1d=True),
        Layer("c_attn.qv", hidden, qkv, ranges, conv1d=True, columns=True),
        Layer("attn.c_proj", hidden, (hidden,), ("c_proj",), conv1d=True),
        Layer("c_fc", hidden, (wide,), ("c_fc",), conv1d=True),
        Layer("mlp.c_proj", wide, (hidden,), ("c_proj",), conv1d=True),
    )


def _llama(model: Model) -> tuple[Layer, ...]:
    """A block without biases, with fewer heads for keys and values."""
    hidden, wide, key = model.hidden, model.intermediate, model.key
    q, k, v = "q_proj", "k_proj", "v_proj"
    return (
        Layer(q, hidden, (hidden,), (q,), bias=False, also="o_proj"),
        Layer(k, hidden, (key,), (k,), bias=False, also=v),
        Layer("up_proj", hidden, (wide,), ("up_proj",), bias=False, also="gate_proj"),
        Layer("down_proj", wide, (hidden,), ("down_proj",), bias=False),
        Layer("qkv", hidden, (hidden, key, key), (q, k, v), bias=False),
        Layer("gate_up", hidden, (wide, wide), ("gate_proj", "up_proj"), bias=False),
    )


_deberta = partial(_encoder, suffix="_proj")

MODELS: Mapping[str, Model] = {
    "roberta-base": Model(_encoder, 768, 3072),
    "roberta-large": Model(_encoder, 1024, 4096),
    "gpt2": Model(_gpt2, 768, 3072),
    "gpt2-medium": Model(_gpt2, 1024, 4096),
    "gpt2-large": Model(_gpt2, 1280, 5120),
    "gpt2-xl": Model(_gpt2, 1600, 6400),
    "deberta-v3-base": Model(_deberta, 768, 3072),
    "deberta-v2-xlarge": Model(_deberta, 1536, 6144),
    "llama-8b": Model(_llama, 4096, 14336, key=1024),
}
# Every layer by its full name, "roberta-base.query" for one.
LAYERS: Mapping[str, Layer] = {
    f"{name}.{layer.name}": layer._replace(name=f"{name}.{layer.name}")
    for name, model in MODELS.items()
    for layer in model.block(model)
}


def problems_of(
    model: str, M: int, R: int, dtypes: Iterable[torch.dtype], device: torch.device
) -> list[Problem]:
    """The problems of a model's layers: by a name in MODELS, or by a directory with a config.json.

    Raises ValueError for a name that is neither.
    """
    row = MODELS[model] if model in MODELS else _model_of_config(model)
    return [
        layer.problem(device, M, R, dtype, dropout=dropout)
        for dropout in (True, False)  # as most train first: a run may be cut
        for dtype in dtypes
        for layer in row.block(row)
    ]


def _model_of_config(model: str) -> Model:
    path = Path(model, "config.json")
    if not path.is_file():
        raise ValueError(f"unknown model {model!r}: a directory, or one of {', '.join(MODELS)}")
    config = json.loads(path.read_text(encoding="utf-8"))
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not hidden:
        raise ValueError(f"{path} has neither hidden_size nor n_embd")
    if config.get("model_type") == "gpt2":
        return Model(_gpt2, hidden, 4 * hidden)
    return Model(_encoder, hidden, config.get("intermediate_size") or 4 * hidden)
