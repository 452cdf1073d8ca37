"""What needs no GPU: CPU time beside the rivals', the overhead of a call, import, launches.

CPU time is of the cases in SUBJECTS: the six linear layers of a block, of many tokens or few, and a
RoBERTa-base encoder cut to two blocks. Every linear layer has LoRA, or DoRA. The providers take
turns sample by sample, so a drift of the machine's speed hits all alike. `over_ours` is the median
over these rounds of a provider's time over that of `library`, our eager layers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.tools import shapes

from . import timing
from .launches import launch_cost
from .providers import attach_lora, attach_peft
from .records import RESULTS, ROOT, Results, Row, folder_of
from .subjects import MODELS

CPU = torch.device("cpu")
TOKENS, RANK = 512, 8
OURS = "library"
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16-autocast": torch.bfloat16}
DROPOUTS = (0.0, 0.1)
CALLS = 100  # of the tiny layer, in one sample
IMPORT_GOAL_MS = 50.0
# (precision, dropout) -> eager PEFT's time over ours.
GOALS = {("bf16-autocast", 0.0): 1.05, ("bf16-autocast", 0.1): 1.3}


class Provider(NamedTuple):
    """What trains: "frozen" (no LoRA), "full" (everything), "peft" or "ours"; compiled or eager."""

    trains: str
    compiled: bool = False


PROVIDERS: dict[str, Provider] = {
    "floor": Provider("frozen"),
    "full": Provider("full"),
    "peft": Provider("peft"),
    "peft-compile": Provider("peft", compiled=True),
    OURS: Provider("ours"),
    f"{OURS}-compile": Provider("ours", compiled=True),
}


class Linears(nn.Module):
    """The linear layers of one block: query, key and value read one x, the others one each."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, wide), nn.Linear(wide, hidden)

    def forward(self, x: Tensor, context: Tensor, normed: Tensor, wide: Tensor) -> list[Tensor]:
        """y of each."""
        attention = [self.query(x), self.key(x), self.value(x), self.output(context)]
        return [*attention, self.up(normed), self.down(wide)]


TARGETS = ("query", "key", "value", "output", "up", "down")
ENCODER_TARGETS = MODELS["roberta-base"].targets


Casting = Callable[[], contextlib.AbstractContextManager[Any]]  # torch.autocast, or nothing


class Subject(NamedTuple):
    """A model, its targets, and `step`: forward and backward, which returns what it computed.

    Forward runs in the context that `step` is given a maker of, backward outside of it: so Trainer
    and PyTorch's guide use autocast. A sample is of `calls` steps. `exact`: whether the outputs are
    compared with float64. `dora`: whether PEFT and we train DoRA.
    """

    model: nn.Module
    targets: Sequence[str]
    step: Callable[[nn.Module, Casting], list[Tensor]]
    calls: int = 1
    exact: bool = True
    dora: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench host`."""
    parser.add_argument("--quick", action="store_true", help="ten samples, without the encoder")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tests the suite")
    parser.add_argument("--samples", type=int, default=timing.SAMPLES)
    parser.add_argument("--cases", nargs="+", choices=SUBJECTS, help="default: all")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 1 if a provider is wrong."""
    samples = 10 if arguments.quick else arguments.samples
    results = Results("host", CPU, folder_of(arguments))
    found = []
    emulated = not (arguments.tiny or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if emulated:
        print("no bfloat16 instructions on this CPU: torch emulates it, so it is not timed")
    cases = arguments.cases or [c for c in SUBJECTS if not (arguments.quick and c == "encoder")]
    providers = arguments.providers or tuple(PROVIDERS)
    for case in cases:
        for precision, half in PRECISIONS.items():
            if half and emulated:
                continue
            for dropout in DROPOUTS:
                rows = measure(
                    case, precision, dropout, samples, tiny=arguments.tiny, providers=providers
                )
                results.add(rows)
                found += rows
                print(_lines(rows), flush=True)
    for rows in (
        overhead(samples), import_time(1 if arguments.tiny else 7), launch_cost(samples)
    ):  # fmt: skip
        results.add(rows)
        found += rows
        print(_lines(rows), flush=True)
    print(f"rows in {results.path}")
    return 1 if any(row["status"] == "wrong" for row in found) else 0


def linears(
    tiny: bool, hidden: int, wide: int, tokens: int, calls: int = 1, *, dora: bool = False
) -> Subject:
    """The six linear layers of a block of these widths."""
    if tiny:
        hidden, wide, tokens, calls = 32, 64, min(tokens, 24), 1
    model = Linears(hidden, wide)
    inputs = [torch.randn(tokens, width) for width in (hidden, hidden, hidden, wide)]
    directions = [torch.randn(tokens, N) for N in (*[hidden] * 4, wide, hidden)]

    @cache
    def given(held: torch.dtype, half: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs and the dy of each layer.

        Under autocast the outputs of LayerNorm are float32, those of attention and GELU half.
        """
        dtypes = (held, half, held, half)
        leaves = [x.to(d, copy=True) for x, d in zip(inputs, dtypes, strict=True)]
        return [x.requires_grad_() for x in leaves], [d.to(half) for d in directions]

    def step(model: nn.Module, casting: Casting) -> list[Tensor]:
        held = next(model.parameters()).dtype
        with casting():
            half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else held
            leaves, grads = given(held, half)
            ys = model(*leaves)
        torch.autograd.backward(ys, grads)
        found = [*(y.detach() for y in ys), *(x.grad for x in leaves)]
        for x in leaves:
            x.grad = None
        return found  # type: ignore[return-value]

    return Subject(model, TARGETS, step, calls, dora=dora)


def encoder(tiny: bool) -> Subject:
    """A RoBERTa-base classifier of two layers; TOKENS tokens in sequences of 128."""
    row = MODELS["roberta-base"]
    two = type(row)(**{**vars(row), "config": {**row.config, "num_hidden_layers": 2}})
    model = two.build(CPU, torch.float32, tiny=tiny)
    shape = (2, 16) if tiny else (TOKENS // 128, 128)
    ids, labels = torch.randint(5, 100, shape), torch.zeros(shape[0], dtype=torch.long)

    def step(model: nn.Module, casting: Casting) -> list[Tensor]:
        with casting():
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return [loss.detach()]

    return Subject(model, ENCODER_TARGETS, step, exact=False)


_BASE = shapes.MODELS["roberta-base"]
_of_base = partial(linears, hidden=_BASE.hidden, wide=_BASE.intermediate)
SUBJECTS: dict[str, Callable[[bool], Subject]] = {
    "linears": partial(_of_base, tokens=TOKENS),
    "16 rows": partial(_of_base, tokens=16),
    "one row": partial(_of_base, tokens=1),
    "tiny layers": partial(linears, hidden=16, wide=64, tokens=1, calls=20),
    "DoRA": partial(_of_base, tokens=TOKENS, dora=True),
    "DoRA, 16 rows": partial(_of_base, tokens=16, dora=True),
    "encoder": encoder,
}


def attach(provider: str, subject: Subject, dropout: float) -> nn.Module:
    """A copy of the subject's model as a provider trains it; lora_B is random, not zero."""
    trains, compiled = PROVIDERS[provider]
    model = copy.deepcopy(subject.model).requires_grad_(trains == "full").train()
    if trains == "peft":
        attach_peft(model, subject.targets, RANK, dropout, dora=subject.dora)
    elif trains == "ours":
        attach_lora(model, subject.targets, RANK, dropout, dora=subject.dora)
    draw = torch.Generator().manual_seed(1)
    named = sorted((n.replace(".default.weight", ""), p) for n, p in model.named_parameters())
    for name, parameter in named:
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5 / 2, generator=draw)
    if trains == "frozen":  # one trained parameter, or an encoder would have no backward
        for embedding in model.modules():
            if isinstance(embedding, nn.LayerNorm):
                embedding.requires_grad_(True)
                break
    return torch.compile(model, dynamic=False) if compiled else model  # type: ignore[return-value]


def measure(
    case: str, precision: str, dropout: float, samples: int, *, tiny: bool,
    providers: Sequence[str] = tuple(PROVIDERS),
) -> list[Row]:  # fmt: skip
    """The rows of one case in one precision with one dropout."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # forgets earlier cases, whose shapes would make these ones dynamic
    subject = SUBJECTS[case](tiny)
    models = {name: attach(name, subject, dropout) for name in providers}
    casting = _casting(PRECISIONS[precision])

    def runner(model: nn.Module) -> timing.Run:
        def once() -> None:
            for _ in range(subject.calls):
                subject.step(model, casting)
                model.zero_grad(set_to_none=True)

        return once

    rows = {
        name: {"case": case, "provider": name, "precision": precision, "dropout": dropout,
               "status": "timed", "reason": None, "R": RANK}
        for name in providers
    }  # fmt: skip
    if subject.exact and not dropout:  # masks differ: the kernel suite checks with dropout
        for name, reason in _wrong(subject, models, casting).items():
            rows[name] |= {"status": "wrong", "reason": reason}
            del models[name]
    runs = {name: runner(model) for name, model in models.items()}
    taken = timing.take_turns(runs, CPU, samples)
    for name, found in taken.items():
        rows[name] |= summary(found, subject.calls)
        rows[name] |= {"over_ours": timing.paired_ratio(found, taken.get(OURS))}
    return list(rows.values())


def _casting(dtype: torch.dtype | None) -> Casting:
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast("cpu", dtype)


def _wrong(subject: Subject, models: dict[str, nn.Module], casting: Casting) -> dict[str, str]:
    """Which of our models compute something wrong, and what.

    Their RMS error against PEFT in float64 may be 1.1 times that of PEFT in this precision, and
    more by what an RMS of n numbers varies by itself, three times 1 / sqrt(n). Where they are
    compiled, the larger error of PEFT's two counts: what Inductor fuses it rounds less.
    """
    ours = [name for name in models if PROVIDERS[name].trains == "ours"]
    judges = [name for name in models if PROVIDERS[name].trains == "peft"]
    if "peft" not in models or not ours:
        return {}
    exact = subject.step(copy.deepcopy(models["peft"]).double(), contextlib.nullcontext)
    errors = {}
    for name in (*judges, *ours):
        outputs = subject.step(models[name], casting)
        models[name].zero_grad(set_to_none=True)
        errors[name] = [
            (found.double() - truth).square().mean().sqrt().item()
            for found, truth in zip(outputs, exact, strict=True)
        ]
    wrong = {}
    for name in ours:
        compiled = "peft-compile" in errors and PROVIDERS[name].compiled
        judge = errors["peft"]
        if compiled:
            judge = list(map(max, judge, errors["peft-compile"]))
        rows = zip(errors[name], judge, exact, strict=True)
        for i, (error, peft, truth) in enumerate(rows):
            if not error <= 1.1 * (1 + 3 / truth.numel() ** 0.5) * peft + 1e-12:
                wrong[name] = f"output {i}: RMS error {error:.2e}, PEFT's {peft:.2e}"
                break
    return wrong


def summary(taken: list[float], calls: int = 1) -> Row:
    """The columns of a row, for one call; even samples against odd ones give the noise."""
    median, p20, p80 = (value / calls for value in timing.spread(taken))
    noise = timing.noise(taken[::2], taken[1::2]) if len(taken) > 1 else None
    return {
        "median_us": round(median, 3),
        "p20_us": round(p20, 3),
        "p80_us": round(p80, 3),
        "samples": len(taken),
        "noise": None if noise is None else round(noise, 4),
    }


def overhead(samples: int) -> list[Row]:
    """Forward and backward of a 16 x 16 layer on one token, which is overhead almost alone."""
    subject = Subject(nn.Sequential(), ("query",), lambda model, casting: [])
    subject.model.add_module("query", nn.Linear(16, 16))
    x = torch.randn(1, 16, requires_grad=True)
    direction = torch.randn(1, 16)

    def runner(model: nn.Module) -> timing.Run:
        wanted = [x, *(p for n, p in model.named_parameters() if "lora_" in n)]

        def calls() -> None:
            for _ in range(CALLS):
                torch.autograd.grad(model(x), wanted, direction)

        return calls

    models = {name: attach(name, subject, 0.0) for name in ("floor", "peft", OURS)}
    taken = timing.take_turns({name: runner(model) for name, model in models.items()}, CPU, samples)
    return [
        {"case": "overhead of a call", "provider": name, "precision": "fp32", "dropout": 0.0,
         "status": "timed", "reason": None, **summary(found, CALLS)}
        for name, found in taken.items()
    ]  # fmt: skip


def import_time(runs: int = 7) -> list[Row]:
    """What `import lora_kernels` adds to `import torch`, each time in a fresh process."""
    code = (
        "import time, torch; wall, cpu = time.perf_counter(), time.process_time(); "
        "import lora_kernels; "
        "print((time.perf_counter() - wall) * 1e6, (time.process_time() - cpu) * 1e6)"
    )
    # Compiled files are kept, as after an install by pip, also where Python is told not to.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    taken, busy = [], []  # wall time also counts waiting for a core, processor time does not
    for _ in range(runs + 1):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True,
            env=environment,
        )  # fmt: skip
        wall, cpu = map(float, done.stdout.split())
        taken.append(wall)
        busy.append(cpu)
    row: Row = {"case": "import", "provider": "lora_kernels", "precision": None, "dropout": None}
    row |= {"status": "timed", "reason": None, "cpu_us": round(statistics.median(busy[1:]), 1)}
    return [row | summary(taken[1:])]  # the first run compiles


def _lines(rows: Sequence[Row]) -> str:
    blocks = groupby(rows, key=lambda row: (row["case"], row["precision"], row["dropout"]))
    return "\n".join(_block(list(block)) for _, block in blocks)


def _block(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"\n{first['case']}"
    if first["precision"]:
        title += f", {first['precision']}, dropout {first['dropout']}"
    peft = next((row.get("median_us") for row in rows if row["provider"] == "peft"), None)
    lines = [title]
    for row in rows:
        if row["status"] != "timed":
            lines.append(f"  {row['provider']:<16}{row['status']}: {row['reason']}")
            continue
        spread = f"({row['p20_us']:.1f} - {row['p80_us']:.1f})"
        line = f"  {row['provider']:<16}{row['median_us']:>12.1f} us  {spread}"
        if row.get("over_ours") is not None and row["provider"] != OURS:
            line += f"  this / ours: {row['over_ours']:.2f}"
        if peft and row["provider"] == OURS:
            line += f"  PEFT / this: {peft / row['median_us']:.2f}"
            goal = GOALS.get((first["precision"], first["dropout"]))
            if goal and first["case"] in ("linears", "encoder"):
                line += f" (goal {goal})"
        if row["case"] == "import":
            line += f"  (goal {IMPORT_GOAL_MS:.0f} ms; processor time {row['cpu_us']:.1f} us)"
        lines.append(line)
    return "\n".join(lines)
