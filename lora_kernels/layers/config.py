"""LoRAConfig: what `add_lora` does to a model, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from .. import arguments
from ..strategies.table import check_strategy


def check_settings(rank: int, alpha: float, dropout: float, rslora: bool, strategy: str) -> None:
    """ValueError, with the name and the value, for what no LoRA layer can have."""
    arguments.integer("rank", rank, least=1)
    arguments.finite("alpha", alpha)
    arguments.probability("dropout", dropout)
    arguments.flag("rslora", rslora)
    check_strategy(strategy)


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
        check_settings(self.rank, self.alpha, self.dropout, self.rslora, self.strategy)
        arguments.flag("group", self.group)
        if self.targets is not None:
            object.__setattr__(self, "targets", arguments.names("targets", self.targets))
            if not self.targets:
                raise ValueError(
                    "targets is empty: got (); name at least one layer, or None for the default"
                )
            if "all-linear" in self.targets and len(self.targets) > 1:
                raise ValueError(f"'all-linear' takes every layer, alone: got {self.targets}")
        object.__setattr__(self, "train", arguments.names("train", self.train))
