"""What the kernel suite measures: layers of real models, and the axes M, R, dropout and dtype.

The layers are rows of `lora_kernels.tools.shapes`. One row stands for all layers of its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, zip_longest

import torch

from lora_kernels.strategies.problem import Problem
from lora_kernels.tools import shapes
from lora_kernels.tools.shapes import Layer

# Not measured: pairs of siblings; LoRA on columns of a weight, which no peer has; deberta-v3-base,
# whose layers have RoBERTa-base's sizes; DeBERTa's siblings, which also read positions.
LEFT_OUT = re.compile(r"\.qv$|\.gate_up$|^deberta-v3-base|^deberta-.*\.qkv$")
LAYERS = {name: layer for name, layer in shapes.LAYERS.items() if not LEFT_OUT.search(name)}

TOKENS = (512, 2048, 4096, 8192)
RANKS = (1, 3, 8, 16, 64)
DROPOUTS = (0.0, 0.1)
# Name in the rows of results -> torch's dtype; "tf32" is float32 with tensor cores allowed.
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
DIRECTIONS = ("forward", "forward_backward")
MODES = ("graph", "eager")


@dataclass(frozen=True)
class Case:
    """One layer at one size: M tokens, rank R, dropout on the LoRA branch, a key of DTYPES."""

    layer: Layer
    M: int
    R: int = 16
    dropout: float = 0.1
    dtype: str = "bfloat16"
    directions: tuple[str, ...] = DIRECTIONS
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return f"{self.layer.name} M={self.M} R={self.R} p={self.dropout} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x and of the frozen weight."""
        return DTYPES[self.dtype]

    def problem(self, device: torch.device) -> Problem:
        """What the layer, or the group, asks of `choose`."""
        return self.layer.problem(
            device, self.M, self.R, self.torch_dtype, dropout=self.dropout > 0
        )


@dataclass(frozen=True)
class Goal:
    """A target for some layers at bf16, dropout 0.1, R = 16: forward + backward, CUDA-graph replay.

    `floor` is the largest allowed ratio of our time to the frozen layer's. `peft` and `compiled`
    are the smallest allowed speed-ups over eager PEFT and over PEFT under torch.compile.
    """

    title: str
    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    floor: float
    peft: float
    compiled: float


_LARGE = ("roberta-large.query", "roberta-large.up", "roberta-large.down")
_MEDIUM = ("gpt2-medium.c_attn", "gpt2-medium.attn.c_proj", "gpt2-medium.c_fc")
GOALS = (
    Goal(
        "4096x4096, 4096x14336, M = 4096-8192",
        ("llama-8b.q_proj", "llama-8b.up_proj"),
        (4096, 8192),
        floor=1.12,
        peft=1.3,
        compiled=1.1,
    ),
    Goal(
        "RoBERTa-large / GPT-2 medium layers, M = 4096",
        (*_LARGE, *_MEDIUM, "gpt2-medium.mlp.c_proj"),
        (4096,),
        floor=1.35,
        peft=1.8,
        compiled=1.2,
    ),
    Goal(
        "RoBERTa-base q+k+v group, M = 2048-4096",
        ("roberta-base.qkv",),
        (2048, 4096),
        floor=1.6,
        peft=2.5,
        compiled=1.3,
    ),
)


def quick() -> tuple[Case, ...]:
    """The layers of GOALS, one measurement each, and RoBERTa-base as users run it.

    The goals take turns, so that a run that is cut short has measured something of each.
    """
    goals = [
        [
            Case(LAYERS[name], M, directions=("forward_backward",), modes=("graph",))
            for name in goal.layers
            for M in goal.tokens
        ]
        for goal in reversed(GOALS)
    ]
    goals.insert(1, [Case(LAYERS["roberta-base.query"], 2048, 8, directions=("forward_backward",))])
    return tuple(case for turn in zip_longest(*goals) for case in turn if case)


def full() -> tuple[Case, ...]:
    """Every layer at every size; those of `quick` come first, in case the run is cut short."""
    sizes = product(LAYERS.values(), TOKENS, RANKS, DROPOUTS, ("bfloat16", "float16", "float32"))
    rows = [Case(*size) for size in sizes]
    first = {str(case) for case in quick()}
    return tuple(sorted(rows, key=lambda case: str(case) not in first))


def small() -> tuple[Case, ...]:
    """Cases for a CPU: RoBERTa-base, 512 tokens, eager."""
    names = ("roberta-base.query", "roberta-base.up", "roberta-base.down", "roberta-base.qkv")
    sizes = product(names, ("float32", "bfloat16"), DROPOUTS)
    return tuple(
        Case(LAYERS[name], 512, 8, dropout, dtype, ("forward_backward",), ("eager",))
        for name, dtype, dropout in sizes
    )


def tiny() -> tuple[Case, ...]:
    """Small ragged layers that test the suite itself; their times mean nothing."""
    alone = Layer("tiny.query", 24, (16,), ("query",))
    conv1d = Layer("tiny.c_attn", 16, (48,), ("c_attn",), conv1d=True)
    group = Layer("tiny.qkv", 24, (16, 16, 16), ("query", "key", "value"))
    return (
        Case(alone, 33, 3, 0.1, "float32", modes=("eager",)),
        Case(conv1d, 33, 8, 0.0, "float32", modes=("eager",)),
        Case(group, 33, 3, 0.1, "bfloat16", modes=("eager",)),
    )


def part_of(cases: tuple[Case, ...], part: str | None) -> tuple[Case, ...]:
    """Part "2/5" of the cases is every fifth, from the second on. ValueError for another form."""
    if part is None:
        return cases
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part {part!r} is not like 2/5")
    return cases[int(index) - 1 :: int(count)]


def measurements(case: Case) -> Iterator[tuple[str, str]]:
    """Every (direction, mode) to time in a case."""
    return product(case.directions, case.modes)
