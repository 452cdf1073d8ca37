"""Several adapters on one base, packed against one after another, on a CPU.

A pack takes one step with the rows of all adapters; the others take a step for each. All have the
parameters of one frozen model. PEFT under torch.compile makes the steps of all adapters with one
model, since to compile sixteen takes minutes. Providers take turns sample by sample, so a drift of
the machine's speed hits all alike. A row's time is that of one step of every adapter, forward and
backward. Ratios are medians of the ratios within a turn: above 1 the pack is faster.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora_kernels import LoRAConfig, add_loras
from lora_kernels.injection.packs import alone

from . import timing
from .providers import ALPHA_PER_RANK, attach_peft
from .records import RESULTS, Results, Row, folder_of

CPU = torch.device("cpu")
RANK, BATCHES = 8, (1, 4, 16)
TARGETS = ("query", "key", "value", "output.dense", "intermediate.dense")
# Provider -> the column that has its time over the pack's, in the pack's row.
RATIOS = {
    "one by one": "solo_ratio",
    "peft one by one": "peft_ratio",
    "peft-compile one by one": "compile_ratio",
}


class Case(NamedTuple):
    """An encoder of these sizes, the tokens of an example, and how many adapters it gets."""

    name: str
    layers: int
    hidden: int
    wide: int
    tokens: int = 32
    adapters: int = 16


CASES = (
    Case("tiny", layers=2, hidden=64, wide=128),
    Case("roberta-base, one block", layers=1, hidden=768, wide=3072),
)
TOY = Case("toy", layers=1, hidden=32, wide=64, tokens=8, adapters=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench packs`."""
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tests the suite")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a pack computes other outputs than its adapters alone."""
    results = Results("packs", CPU, folder_of(arguments))
    wrong = False
    for case in (TOY,) if arguments.tiny else CASES:
        for batch in BATCHES:
            rows = measure(case, batch, arguments.samples)
            results.add(rows)
            wrong |= any(row["status"] == "wrong" for row in rows)
            print(_lines(rows), flush=True)
    print(f"rows in {results.path}")
    return int(wrong)


def measure(case: Case, batch: int, samples: int) -> list[Row]:
    """The rows of one case, with `batch` examples of each adapter in a step."""
    torch.manual_seed(0)
    base = _encoder(case)
    names = [f"a{i}" for i in range(case.adapters)]
    packed = _sharing(base)
    config = LoRAConfig(RANK, ALPHA_PER_RANK * RANK, targets=TARGETS)
    add_loras(packed, dict.fromkeys(names, config))
    for name, parameter in packed.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    solo = [alone(packed, name) for name in names]
    peft = [attach_peft(_sharing(base), TARGETS, RANK, 0.0) for _ in names]
    torch._dynamo.reset()  # forgets earlier cases, whose shapes would make this one dynamic
    compiled: nn.Module = torch.compile(peft[0], dynamic=False)  # type: ignore[assignment]
    ids = torch.randint(5, 100, (case.adapters * batch, case.tokens))
    blocks = ids.split(batch)

    runs: dict[str, timing.Run] = {
        "packed": lambda: _step(packed, ids),
        "one by one": lambda: list(map(_step, solo, blocks)),
        "peft one by one": lambda: list(map(_step, peft, blocks)),
        "peft-compile one by one": lambda: list(map(partial(_step, compiled), blocks)),
    }
    key = {"case": case.name, "batch": batch, "adapters": case.adapters, "tokens": case.tokens}
    key |= {"R": RANK, "dtype": "float32", "dropout": 0.0}
    alike = {  # must be equal: what runs, and what each adapter is
        "packed": (_logits(packed, ids), torch.cat(list(map(_logits, solo, blocks)))),
        "peft-compile one by one": (_logits(compiled, blocks[0]), _logits(peft[0], blocks[0])),
    }
    for name, (found, wanted) in alike.items():
        error = (found - wanted).abs().max() / wanted.abs().max()
        if not error < 1e-5:
            reason = f"its logits differ by {error:.1e} of the largest"
            return [{**key, "provider": name, "status": "wrong", "reason": reason}]
    taken = timing.take_turns(runs, CPU, samples)
    rows = []
    for name in runs:
        median, p20, p80 = (round(value, 1) for value in timing.spread(taken[name]))
        row: Row = {**key, "provider": name, "status": "timed", "median_us": median}
        row |= {"p20_us": p20, "p80_us": p80, "samples": samples}
        if name == "packed":
            row |= {
                ratio: timing.paired_ratio(taken[other], taken[name])
                for other, ratio in RATIOS.items()
            }
        rows.append(row)
    return rows


def _encoder(case: Case) -> nn.Module:
    """A RoBERTa classifier without dropout, of the case's sizes."""
    config = RobertaConfig(
        vocab_size=128, hidden_size=case.hidden, intermediate_size=case.wide,
        num_hidden_layers=case.layers, num_attention_heads=case.hidden // 16,
        max_position_embeddings=case.tokens + 2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).requires_grad_(False).train()


def _sharing(base: nn.Module) -> nn.Module:
    """Modules of its own with the very parameters of `base`."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def _step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward; no gradient is left."""
    _logits(model, ids).square().sum().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def _lines(rows: list[Row]) -> str:
    first = rows[0]
    lines = [f"\n{first['case']}: {first['adapters']} adapters, batch {first['batch']}"]
    for row in rows:
        if row["status"] != "timed":
            lines.append(f"  {row['provider']:<25}{row['status']}: {row['reason']}")
            continue
        line = f"  {row['provider']:<25}{row['median_us'] / 1e3:>10.1f} ms"
        if "solo_ratio" in row:
            ratios = ", ".join(f"{other} {row[ratio]:.2f}" for other, ratio in RATIOS.items())
            line += f"  over this: {ratios}"
        lines.append(line)
    return "\n".join(lines)
