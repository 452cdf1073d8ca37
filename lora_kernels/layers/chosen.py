"""Which strategy a layer of ours gets for so many tokens, whatever kind it is, and why."""

from __future__ import annotations

from typing import Any

import torch

from ..strategies.choose import Choice, choose
from ..strategies.problem import Problem
from .base import features_of
from .embedding import FusedLoRAEmbedding
from .group import problem_of
from .quantised import quantiser, why_not_nf4


def chosen(layer: Any, tokens: int, dtype: torch.dtype | None = None) -> tuple[Problem, Choice]:
    """What a layer that runs fused asks of `choose` for so many tokens, and gets."""
    if isinstance(layer, FusedLoRAEmbedding):
        K, N = features_of(layer)
        device, dtype = layer.weight.device, dtype or layer.weight.dtype
        problem = Problem.on(device, tokens, N, K, layer.rank, dtype, dropout=False)
        reason = "an embedding: two lookups, and one product added to the rows; no dropout"
        return problem, Choice("library", None, reason)
    base = getattr(layer, "base_layer", None)  # of PEFT's layers, and of quantised ones
    if base is None or (whose := quantiser(base)) is None:
        problem = problem_of(layer, tokens, dtype)
        return problem, choose(problem, layer.strategy)
    refusal, strategy = why_not_nf4(base, dtype), layer.strategy
    (K, N), computes = features_of(base), getattr(base, "compute_dtype", None)
    problem = Problem.on(
        base.weight.device, tokens, N, K, layer.rank,
        dtype or computes or torch.get_default_dtype(), dropout=False, nf4=refusal is None,
    )  # fmt: skip
    if refusal is None:
        return problem, choose(problem, strategy)
    asked = strategy not in ("auto", "library")
    asked_for = f"{strategy} was asked for, but: {refusal}; " if asked else ""
    reason = f"{asked_for}its frozen product is {whose}; LoRA is added to it"
    return problem, Choice("library", None, reason)
