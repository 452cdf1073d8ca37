"""The linear layers of known models, by size: the problems that `tune` measures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..strategies.problem import Problem


class Shape(NamedTuple):
    """One linear layer of a model, or so many that read the same x: y [M, N] from x [M, K].

    With `sliced`, one layer with LoRA on so many thirds of its columns.
    """

    N: int
    K: int
    layers: int = 1
    sliced: bool = False


def _encoder(hidden: int, intermediate: int) -> tuple[Shape, ...]:
    alone = Shape(hidden, hidden), Shape(intermediate, hidden), Shape(hidden, intermediate)
    return *alone, Shape(hidden, hidden, 3), Shape(hidden, hidden, 2)


def _gpt2(hidden: int) -> tuple[Shape, ...]:
    up, down = Shape(4 * hidden, hidden), Shape(hidden, 4 * hidden)
    c_attn = (Shape(3 * hidden, hidden), Shape(3 * hidden, hidden, 2, sliced=True))
    return *c_attn, Shape(hidden, hidden), up, down


MODELS: Mapping[str, tuple[Shape, ...]] = {
    "roberta-base": _encoder(768, 3072),
    "roberta-large": _encoder(1024, 4096),
    "deberta-v3-base": _encoder(768, 3072),
    "deberta-v2-xlarge": _encoder(1536, 6144),
    "gpt2": _gpt2(768),
    "gpt2-medium": _gpt2(1024),
    "gpt2-large": _gpt2(1280),
    "gpt2-xl": _gpt2(1600),
    "llama-8b": (
        Shape(4096, 4096), Shape(1024, 4096), Shape(4096, 4096, 3),
        Shape(14336, 4096), Shape(14336, 4096, 2), Shape(4096, 14336),
    ),
}  # fmt: skip


def problems_of(
    model: str, M: int, R: int, dtypes: Iterable[torch.dtype], device: torch.device
) -> list[Problem]:
    """The problems of a model's layers: by a name in MODELS, or by a directory with a config.json.

    Raises ValueError for a name that is neither.
    """
    shapes = MODELS[model] if model in MODELS else _shapes_of_config(model)
    return [
        Problem.on(device, M, N, K, R, dtype, dropout=dropout, segments=layers, columns=sliced)
        for dropout in (True, False)  # as most train first: a run may be cut
        for dtype in dtypes
        for N, K, layers, sliced in shapes
    ]


def _shapes_of_config(model: str) -> tuple[Shape, ...]:
    path = Path(model, "config.json")
    if not path.is_file():
        raise ValueError(f"unknown model {model!r}: a directory, or one of {', '.join(MODELS)}")
    config = json.loads(path.read_text(encoding="utf-8"))
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not hidden:
        raise ValueError(f"{path} has neither hidden_size nor n_embd")
    if config.get("model_type") == "gpt2":
        return _gpt2(hidden)
    return _encoder(hidden, config.get("intermediate_size") or 4 * hidden)
