"""README's table of choices is what `choose` chooses."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lora_kernels import STRATEGIES, explain
from lora_kernels.hardware.cards import CARDS
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem
from lora_kernels.tools.shapes import LAYERS

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
FIRST_CELL = "layer, 4096 tokens, rank 16, dropout"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def chosen(layer: str, dtype: str, card: str) -> str:
    """What `auto` takes on a card without a tuned table."""
    row, sizes = CARDS[card], LAYERS[layer]
    problem = Problem(
        4096, max(sizes.N), sizes.K, 16, DTYPES[dtype], row.arch, dropout=True,
        segments=len(sizes.children), columns=sizes.columns, gpu=card,
    )  # fmt: skip
    return choose(problem).strategy


def test_the_table_says_what_choose_chooses(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {FIRST_CELL}"))
    cards = [cell.strip() for cell in lines[start].strip("|").split("|")[1:]]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        layer, dtype = re.fullmatch(r"`(\S+)`, (\w+)", first).groups()
        rows.append((first, cells, [f"`{chosen(layer, dtype, card)}`" for card in cards]))
    assert len(rows) >= 6 and len(cards) >= 5
    right = "\n".join(f"| {first} | {' | '.join(found)} |" for first, _, found in rows)
    assert all(cells == found for _, cells, found in rows), f"README should say:\n{right}"


def test_the_example_is_what_explain_prints():
    """The first lines of the example; the times are the cost model's."""
    example = re.search(r"M=4096 N=768 K=768 R=16 bfloat16 sm_86, dropout\n(.+)\n", README)
    problem = Problem(4096, 768, 768, 16, torch.bfloat16, "sm_86", dropout=True)
    printed = [line.strip() for line in str(explain(problem)).splitlines()]
    assert example is not None and example[1].strip() in printed, "\n".join(printed)


def test_every_strategy_has_its_row():
    for name in STRATEGIES:
        assert f"\n| `{name}` | " in README, name
