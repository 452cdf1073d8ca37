"""Whole fine-tuning steps: forward, backward and optimizer, of models built from their configs.

Batches are full: sequences have one length, no padding, and attention takes no mask. (transformers
drops a mask of ones, but only in eager code, which can read it: graphs would be timed with a slower
attention.) Steps are queued without waiting for the device, as in training. Peak memory counts from
the model's arrival on the device to the last step.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.hardware.capture import captured

from . import timing, training_run
from .kernels import explain_error
from .records import RESULTS, Results, Row, folder_of
from .subjects import METHODS, MODELS, PRECISIONS, Method, Model, Precision, Recipe

QUICK = {
    "models": ("roberta-base", "roberta-large", "gpt2-medium"),
    "precisions": ("bf16",),
}
TINY_BATCH, TINY_LENGTH = 2, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench end_to_end`."""
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="three models, in bf16")
    parser.add_argument("--tiny", action="store_true", help="two small layers: tests the suite")
    parser.add_argument("--rank", type=int, default=Recipe.rank)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout, help="LoRA's")
    parser.add_argument("--steps", type=int, default=timing.SAMPLES, help="steps to time")
    parser.add_argument(
        "--in-turns", action="store_true",
        help="the methods of a model step in turns, so that a drift hits all alike, and rows have "
        "over_lora, the median over rounds of a step over ours; all are in memory at once",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what the file holds already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--train-run", nargs=argparse.REMAINDER, metavar="FLAGS",
        help="instead: one real run by PEFT and one by us, with these flags of models.train",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure every combination that the file does not hold; 1 if any failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.train_run is not None:
        return training_run.run(arguments.train_run, device, arguments.results)
    quick: dict[str, Any] = QUICK if arguments.quick else {}
    models = arguments.models or quick.get("models", MODELS)
    precisions = arguments.precisions or quick.get("precisions", PRECISIONS)
    recipe = Recipe(arguments.rank, arguments.dropout)
    results = Results("end_to_end", device, folder_of(arguments))
    failed = 0
    if arguments.in_turns:
        for name, precision in product(models, precisions):
            rows = measure_in_turns(
                MODELS[name], arguments.methods or tuple(METHODS), PRECISIONS[precision], recipe,
                device, steps=arguments.steps, tiny=arguments.tiny,
            )  # fmt: skip
            results.add(rows)
            print("\n".join(map(_line, rows)), flush=True)
            failed += any(row["status"] == "failed" for row in rows)
        print(f"rows in {results.path}")
        return 1 if failed else 0
    methods = [METHODS[name] for name in arguments.methods or METHODS]
    eager = [method for method in methods if not method.compiled]
    slow = [method for method in methods if method.compiled]  # last: minutes each
    jobs = [*product(eager, models, precisions)]
    jobs += [(m, name, p) for name, p, m in product(models, precisions, slow)]
    for method, name, precision in jobs:
        subject = (MODELS[name], method, PRECISIONS[precision])
        if results.has(_key(*subject, arguments.tiny)) and not arguments.again:
            continue
        row = measure(*subject, recipe, device, steps=arguments.steps, tiny=arguments.tiny)
        results.add([row])
        print(_line(row), flush=True)
        failed += row["status"] == "failed"
        if row["status"] == "failed" and not _alive(device):
            print("the device has failed; the same command begins again")
            break
    print(f"rows in {results.path}")
    return 1 if failed else 0


def _key(model: Model, method: Method, precision: Precision, tiny: bool) -> Row:
    return {
        "model": f"tiny-{model.name}" if tiny else model.name,
        "method": method.name,
        "provider": method.provider,
        "precision": precision.name,
        "batch": TINY_BATCH if tiny else model.batch,
        "length": TINY_LENGTH if tiny else model.length,
    }


def measure(
    model: Model, method: Method, precision: Precision, recipe: Recipe, device: torch.device, *,
    steps: int, tiny: bool,
) -> Row:  # fmt: skip
    """One row: a model trained by one method in one precision."""
    row = _start(model, method, precision, recipe, device, tiny)
    if row["status"] == "unavailable":
        return row
    try:
        return row | _measure(model, method, precision, recipe, device, steps, tiny)
    except Exception as error:
        return row | {"status": "failed", "reason": explain_error(error)}
    finally:
        _clear(device)


def measure_in_turns(
    model: Model, methods: Sequence[str], precision: Precision, recipe: Recipe,
    device: torch.device, *, steps: int, tiny: bool,
) -> list[Row]:  # fmt: skip
    """A row for each method of one model in one precision, their steps taken in turns."""
    rows, runs, built = {}, {}, {}
    for name in methods:
        method = METHODS[name]
        rows[name] = _start(model, method, precision, recipe, device, tiny)
        if rows[name]["status"] == "unavailable":
            continue
        try:
            built[name] = _build(model, method, precision, recipe, device, tiny)
            step = built[name].step
            step()  # compiles, and shows what fails before the others are timed
            runs[name] = captured(step) if method.graph else step
        except Exception as error:
            rows[name] |= {"status": "failed", "reason": explain_error(error)}
    taken = timing.take_turns(runs, device, steps)
    for name, found in taken.items():
        rows[name] |= _found(found, built[name], None)
        rows[name] |= {"over_lora": timing.paired_ratio(found, taken.get("lora"))}
    runs.clear()
    built.clear()
    _clear(device)
    return list(rows.values())


def _start(
    model: Model, method: Method, precision: Precision, recipe: Recipe, device: torch.device,
    tiny: bool,
) -> Row:  # fmt: skip
    """The row before it is timed; its status is "unavailable" where it cannot be."""
    row = _key(model, method, precision, tiny)
    row |= {"rank": recipe.rank, "lora_dropout": recipe.dropout, "targets": list(model.targets)}
    reason = None
    if method.graph and device.type != "cuda":
        reason = "CUDA graphs need a GPU"
    elif method.graph and model.no_graph:
        reason = model.no_graph
    elif precision.scaled and device.type != "cuda":
        reason = "fp16 is not trained on a CPU"
    return row | {"status": "unavailable" if reason else "timed", "reason": reason}


def _clear(device: torch.device) -> None:
    """Forget what was compiled, and free what was built."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a lost device: the row says why
            # torch holds a workspace for every stream that ran a product.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()


def _alive(device: torch.device) -> bool:
    """Whether a GPU still works; after an illegal access nothing runs in the same process."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return False
    return True


class _Built(NamedTuple):
    """A training step, and what its row says of the model."""

    step: Callable[[], None]
    batch: int
    trainable: int


def _build(
    row: Model, method: Method, precision: Precision, recipe: Recipe, device: torch.device,
    tiny: bool,
) -> _Built:  # fmt: skip
    torch.manual_seed(0)
    model = row.build(device, precision.weights, tiny=tiny)
    model.requires_grad_(False)
    model = method.attach(model, row, recipe)
    batch = TINY_BATCH if tiny else row.batch
    length = TINY_LENGTH if tiny else row.length
    vocabulary = 100 if tiny else 50000  # tokens 5 to here are no model's padding
    inputs = {
        "input_ids": torch.randint(5, vocabulary, (batch, length), device=device),
        "labels": torch.randint(0, 2, (batch,), device=device),
        "attention_mask": torch.ones(batch, length, dtype=torch.long, device=device),
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    step = training_step(model, inputs, method, precision, device)
    return _Built(step, batch, trainable)


def _measure(
    row: Model, method: Method, precision: Precision, recipe: Recipe, device: torch.device,
    steps: int, tiny: bool,
) -> Row:  # fmt: skip
    built = _build(row, method, precision, recipe, device, tiny)
    timed = captured(built.step) if method.graph else built.step
    taken = timing.sample(timed, device, steps, queued=True)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    found = _found(taken, built, memory)
    if device.type == "cuda":
        try:
            found |= _profile(timed, found["step_ms"])
        except Exception as error:  # the timing stays where the profiler cannot run
            found |= {"launches": None, "busy_share": None, "reason": explain_error(error)}
    return found


def _found(taken: list[float], built: _Built, memory: int | None) -> Row:
    """The columns of a row that say what was measured; FloatingPointError for a loss of NaN."""
    middle = len(taken) // 2
    median, p20, p80 = (value / 1e3 for value in timing.spread(taken))
    loss = float(built.step.loss)  # type: ignore[attr-defined]
    if not loss < float("inf"):
        raise FloatingPointError(f"the loss is {loss}")
    return {
        "status": "timed",
        "samples_per_second": round(built.batch / median * 1e3, 2),
        "step_ms": round(median, 4),
        "p20_ms": round(p20, 4),
        "p80_ms": round(p80, 4),
        "noise": round(timing.noise(taken[:middle] or taken, taken[middle:]), 4),
        "peak_memory_bytes": memory,
        "trainable": built.trainable,
        "samples": len(taken),
    }


def training_step(
    model: nn.Module, inputs: dict[str, torch.Tensor], method: Method, precision: Precision,
    device: torch.device,
) -> Callable[[], None]:  # fmt: skip
    """One optimizer step as a function without arguments, which a CUDA graph can hold.

    The function keeps its last loss as the attribute `loss`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True, capturable=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaled)
    call: Callable[..., Any] = torch.compile(model) if method.compiled else model

    def casting() -> Any:
        if precision.autocast is None:
            return contextlib.nullcontext()
        # Casts that were cached before the capture would not be replayed.
        return torch.autocast(device.type, precision.autocast, cache_enabled=not method.graph)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with casting():
            loss = call(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        step.loss = loss.detach()  # type: ignore[attr-defined]

    return step


def _profile(step: Callable[[], object], step_ms: float) -> Row:
    """One step: launches by the host, kernels on the device, and the share of time it is busy."""
    from torch.profiler import ProfilerActivity, profile

    # CUPTI stays loaded between profiles: unloading it under a CUDA graph has crashed.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    launches = kernels = 0
    busy_us = 0.0
    for event in profiled.events() or ():
        if "LaunchKernel" in event.name or "GraphLaunch" in event.name:
            launches += 1
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels += not event.name.startswith(("Memcpy", "Memset"))
            busy_us += event.time_range.elapsed_us()
    return {
        "launches": launches,
        "kernels": kernels,
        "busy_share": round(min(1.0, busy_us / 1e3 / step_ms), 4),
    }


def _line(row: Row) -> str:
    name = f"{row['model']:<24}{row['precision']:<15}{row['method']:<14}"
    if row["status"] != "timed":
        return f"{name}{row['status']}: {row['reason']}"
    memory = row["peak_memory_bytes"]
    text = f"{name}{row['step_ms']:>10.2f} ms {row['samples_per_second']:>9.1f} samples/s"
    if memory is not None:
        text += f" {memory / 2**20:>8.0f} MiB"
    if row.get("over_lora") is not None:
        text += f"  this / ours: {row['over_lora']:.2f}"
    if row.get("launches") is not None:
        text += f" {row['launches']:>6} launches {row['busy_share']:>5.0%} busy"
    return text
