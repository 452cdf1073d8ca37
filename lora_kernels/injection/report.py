"""What `add_lora`, `fuse_peft` and `load_adapter` did to a model, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..layers.embedding import FusedLoRAEmbedding

TYPICAL_TOKENS = 2048  # the batch that a report names the strategy for: 16 sequences of 128


@dataclass(frozen=True)
class FusedRow:
    """A layer that runs fused: the strategy `choose` gives it for a typical batch, and why."""

    name: str
    strategy: str
    reason: str


@dataclass(frozen=True)
class SkippedRow:
    """A layer that was asked for and left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Layers fused, layers skipped, group -> (trainable, total) parameters, and notes: what to know
    before training, a sentence each. Prints as a table.
    """

    fused: tuple[FusedRow, ...]
    skipped: tuple[SkippedRow, ...]
    counts: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """The number of parameters with requires_grad."""
        return sum(trainable for trainable, _ in self.counts.values())

    @property
    def total(self) -> int:
        """The number of parameters; one that is shared counts once."""
        return sum(total for _, total in self.counts.values())

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} layers"]
        lines += by_reason((row.name, f"{row.strategy}: {row.reason}") for row in self.fused)
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)}")
            lines += by_reason((row.name, row.reason) for row in self.skipped)
        width = max(map(len, self.counts), default=5)
        lines.append(f"{'parameters':<{width + 2}} {'trainable':>13} {'total':>13} {'share':>8}")
        rows = [*self.counts.items(), ("all", (self.trainable, self.total))]
        for group, (trainable, total) in rows:
            share = f"{trainable / total:8.3%}" if total else f"{'-':>8}"
            lines.append(f"  {group:<{width}} {trainable:>13,} {total:>13,} {share}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def by_reason(rows: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason, with the names it holds for, shortened."""
    names: dict[str, list[str]] = {}
    for name, reason in rows:
        names.setdefault(reason, []).append(name)
    return [
        f"  {len(found):>4}  {reason}  ({', '.join(found[:2])}{', ...' if len(found) > 2 else ''})"
        for reason, found in names.items()
    ]


def count_parameters(
    model: nn.Module, groups: Mapping[str, Iterable[nn.Parameter]]
) -> dict[str, tuple[int, int]]:
    """Group -> (trainable, total): the groups given, then "embeddings", then "frozen" for the rest.

    Every parameter counts once, in the first group that has it. What trains outside the groups
    given shows as the trainable number of "embeddings" or "frozen", which is 0 after `add_lora`.
    """
    kinds = (nn.Embedding, FusedLoRAEmbedding)
    embeddings = [m for m in model.modules() if isinstance(m, kinds)]
    wanted: dict[str, Iterable[nn.Parameter]] = {
        **groups,
        "embeddings": [p for module in embeddings for p in module.parameters(recurse=False)],
        "frozen": model.parameters(),
    }
    seen: set[int] = set()
    counts: dict[str, tuple[int, int]] = {}
    for group, parameters in wanted.items():
        trainable = total = 0
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel()
                trainable += parameter.numel() * parameter.requires_grad
        counts[group] = trainable, total
    return counts
