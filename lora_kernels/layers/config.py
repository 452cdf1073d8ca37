"""LoRAConfig: what `add_lora` does to a model, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import arguments
from ..strategies.table import check_strategy
from .start import START, check_start


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
    ("re:..."), or "all-linear"; None takes the model family's default. An embedding that is named
    gets LoRA too (see `layers.embedding`). `train` names what is trained besides LoRA, such as a
    task head. `group` lets siblings that read the same input run as one problem.

    As in PEFT: `exclude` takes layers out of the targets, by names like theirs. `layers` keeps
    those whose block, the first number in the path, is one of these. `rank_pattern` and
    `alpha_pattern` map an expression, for a path or the part of it behind a dot, to the rank or
    alpha of the layers that it matches; the first counts.

    `init` is the start of lora_A and lora_B, at the base model: "kaiming" (PEFT's default: lora_B
    is zero), "gaussian", "orthogonal", "pissa", "pissa_niter_<n>" or "olora". The last three take
    their start out of the frozen weights; `save_adapter` then writes a LoRA of twice the rank, for
    the unchanged base model.

    `dora` trains the length of each row of the adapted weight too (DoRA, see `layers.dora`), and
    `lora_bias` a bias beside lora_B; not both, and each for whole layers. Raises ValueError for
    values out of range.

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
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    init: str = START
    dora: bool = False
    lora_bias: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; a config of an older release gets the defaults of the fields it lacks."""
        vars(self).update(vars(LoRAConfig()) | state)

    def __post_init__(self) -> None:
        check_settings(self.rank, self.alpha, self.dropout, self.rslora, self.strategy)
        object.__setattr__(self, "exclude", arguments.names("exclude", self.exclude))
        if self.layers is not None:
            object.__setattr__(self, "layers", arguments.indices("layers", self.layers))
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = dict(arguments.mapping(name, getattr(self, name)))
            arguments.names(name, patterns)
            object.__setattr__(self, name, patterns)
        for pattern, rank in self.rank_pattern.items():
            check_start(self.init, arguments.integer(f"rank_pattern[{pattern!r}]", rank, least=1))
        for pattern, alpha in self.alpha_pattern.items():
            arguments.finite(f"alpha_pattern[{pattern!r}]", alpha)
        check_start(self.init, self.rank)
        arguments.flag("dora", self.dora)
        if arguments.flag("lora_bias", self.lora_bias) and (self.dora or self.init != START):
            raise ValueError("lora_bias goes with neither dora nor another init, as in PEFT")
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
