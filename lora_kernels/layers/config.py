"""LoRAConfig: what `add_lora` does to a model, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..strategies.table import check_strategy


def _check(rank: int, alpha: float, dropout: float, strategy: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1: got {rank!r}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number: got {alpha!r}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1): got {dropout!r}")
    check_strategy(strategy)


def _names(field: str, value: str | Iterable[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} must be a name or several: got {value!r}")
    return tuple(names)


@dataclass(frozen=True)
class LoRAConfig:
    """What `add_lora` does to a model.

    The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`). `targets` names the
    layers: path suffixes of whole components ("query", "attention.self.query"), regular expressions
    ("re:..."), or "all-linear"; None takes the model family's default. `train` names what is
    trained besides LoRA, such as a task head. `group` lets siblings that read the same input run as
    one problem. Raises ValueError for values out of range.

    >>> LoRAConfig(rank=8, alpha=16, dropout=0.1, targets=("query", "value"), train=("classifier",))
    """

    __module__ = "lora_kernels"  # where pickles find it, wherever the file lies
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] | None = None
    train: tuple[str, ...] = ()
    group: bool = True
    strategy: str = "auto"

    def __post_init__(self) -> None:
        _check(self.rank, self.alpha, self.dropout, self.strategy)
        if self.targets is not None:
            object.__setattr__(self, "targets", _names("targets", self.targets))
            if not self.targets:
                raise ValueError(
                    "targets is empty: name at least one layer, or None for the default"
                )
            if "all-linear" in self.targets and len(self.targets) > 1:
                raise ValueError(f"'all-linear' takes every layer, alone: got {self.targets}")
        object.__setattr__(self, "train", _names("train", self.train))
