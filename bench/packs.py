"""Several adapters on one base, packed against one after another.

A pack takes one step with the rows of all adapters; the others take a step for each. All have the
parameters of one frozen model. PEFT under torch.compile makes the steps of all adapters with one
model, since to compile sixteen takes minutes. Providers take turns sample by sample, so a drift of
the machine's speed hits all alike. A row's time is that of one step of every adapter, forward and
backward. Ratios are medians of the ratios within a turn: above 1 the pack is faster. On a GPU each
way also runs from a CUDA graph, and is compared with the pack's graph.
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
from lora_kernels.hardware.capture import captured
from lora_kernels.injection.packs import alone

from . import timing
from .kernels import explain_error
from .providers import ALPHA_PER_RANK, attach_peft
from .records import RESULTS, Results, Row, folder_of

RANK, BATCHES = 8, (1, 4, 16)
TARGETS = ("query", "key", "value", "output.dense", "intermediate.dense")
# Provider -> the column that has its time over the pack's, in the pack's row.
RATIOS = {
    "one by one": "solo_ratio",
    "peft one by one": "peft_ratio",
    "peft-compile one by one": "compile_ratio",
}
COMPILED, GRAPH = "peft-compile one by one", ", graph"


class Case(NamedTuple):
    """An encoder of these sizes, the tokens of an example, and how many adapters it gets."""

    name: str
    layers: int
    hidden: int
    wide: int
    tokens: int = 32
    adapters: int = 16
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0  # LoRA's


CASES = {
    "cpu": (
        Case("tiny", layers=2, hidden=64, wide=128),
        Case("roberta-base, one block", layers=1, hidden=768, wide=3072),
    ),
    "cuda": (
        Case(
            "roberta-base", layers=12, hidden=768, wide=3072, tokens=128,
            dtype=torch.bfloat16, dropout=0.1,
        ),
    ),
}  # fmt: skip
TOY = Case("toy", layers=1, hidden=32, wide=64, tokens=8, adapters=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench packs`."""
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tests the suite")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of an adapter")
    parser.add_argument("--no-compile", action="store_true", help="leave out PEFT + torch.compile")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a provider computes other outputs, or a capture fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results("packs", device, folder_of(arguments))
    bad = False
    for case in (TOY,) if arguments.tiny else CASES[device.type]:
        for batch in arguments.batches:
            rows = measure(case, batch, arguments.samples, device, not arguments.no_compile)
            results.add(rows)
            bad |= any(row["status"] != "timed" for row in rows)
            print(_lines(rows), flush=True)
    print(f"rows in {results.path}")
    return int(bad)


def measure(
    case: Case, batch: int, samples: int, device: torch.device, compiling: bool = True
) -> list[Row]:
    """The rows of one case, with `batch` examples of each adapter in a step."""
    torch.manual_seed(0)
    base = _encoder(case).to(device, case.dtype)
    names = [f"a{i}" for i in range(case.adapters)]
    packed = _sharing(base)
    config = LoRAConfig(RANK, ALPHA_PER_RANK * RANK, dropout=case.dropout, targets=TARGETS)
    add_loras(packed, dict.fromkeys(names, config))
    for name, parameter in packed.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    solo = [alone(packed, name) for name in names]
    peft = [attach_peft(_sharing(base), TARGETS, RANK, case.dropout) for _ in names]
    ids = torch.randint(5, 100, (case.adapters * batch, case.tokens), device=device)
    blocks = ids.split(batch)
    key = {"case": case.name, "batch": batch, "adapters": case.adapters, "tokens": case.tokens}
    key |= {"R": RANK, "dtype": str(case.dtype).removeprefix("torch."), "dropout": case.dropout}

    runs: dict[str, timing.Run] = {
        "packed": lambda: _step(packed, ids),
        "one by one": lambda: list(map(_step, solo, blocks)),
        "peft one by one": lambda: list(map(_step, peft, blocks)),
    }
    everyone = (packed, *solo, *peft)
    for model in everyone:
        model.train(not case.dropout)  # with dropout each draws other masks
    # Name -> two ways to the same logits: what runs, and what each adapter is.
    alike = {"packed": (_logits(packed, ids), torch.cat(list(map(_logits, solo, blocks))))}
    if compiling:
        torch._dynamo.reset()  # forgets earlier cases, whose shapes would make this one dynamic
        compiled: nn.Module = torch.compile(peft[0], dynamic=False)  # type: ignore[assignment]
        runs[COMPILED] = lambda: list(map(partial(_step, compiled), blocks))
        alike[COMPILED] = (_logits(compiled, blocks[0]), _logits(peft[0], blocks[0]))
    allowed = 100 * torch.finfo(case.dtype).eps
    for name, (found, wanted) in alike.items():
        error = (found - wanted).abs().max() / wanted.abs().max()
        if not error < allowed:
            reason = f"its logits differ by {error:.1e} of the largest"
            return [{**key, "provider": name, "status": "wrong", "reason": reason}]
    for model in everyone:
        model.train()
    alike.clear()
    failed = _add_graphs(runs, key) if device.type == "cuda" else []
    taken = timing.take_turns(runs, device, samples)
    rows = []
    for name in runs:
        median, p20, p80 = (round(value, 1) for value in timing.spread(taken[name]))
        row = {**key, "provider": name, "status": "timed", "median_us": median}
        row |= {"p20_us": p20, "p80_us": p80, "samples": samples}
        if name.removesuffix(GRAPH) == "packed":
            graph = name.removeprefix("packed")
            row |= {
                ratio: timing.paired_ratio(taken[other + graph], taken[name])
                for other, ratio in RATIOS.items()
                if other + graph in taken
            }
        rows.append(row)
    return rows + failed


def _add_graphs(runs: dict[str, timing.Run], key: Row) -> list[Row]:
    """Add the CUDA graph of each run but the compiled one; the rows of those that failed."""
    failed = []
    for name in [name for name in runs if name != COMPILED]:
        try:
            runs[name + GRAPH] = captured(runs[name])
        except RuntimeError as error:
            row = {**key, "provider": name + GRAPH, "status": "failed", "median_us": None}
            failed.append({**row, "reason": explain_error(error)})
    return failed


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
    return logits.detach()


def _step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward; no gradient is left."""
    model(input_ids=ids).logits.square().sum().backward()
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
            ratios = ", ".join(
                f"{other} {row[ratio]:.2f}" for other, ratio in RATIOS.items() if ratio in row
            )
            line += f"  over this: {ratios}"
        lines.append(line)
    return "\n".join(lines)
