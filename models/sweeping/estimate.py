"""What a run will take, before it starts: parameters by counting, memory and time by formula.

    memory  >= 4 parameters + 12 trained            bytes: values; gradients and Adam's two means
    memory  ~  that + 34 d L tokens b / 2           b bytes an activation, L blocks of width d
    work    ~  (4 backbone + 2 trained) tokens      FLOPs of training; 2 backbone tokens to score

The time is the work over the rate of a matrix product that is measured here. Both are estimates:
they tell minutes from days and 2 GB from 40.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache

from ..arguments import Arguments
from .bases import config_of

# Task -> rows of train, rows scored after training, and tokens of a text, about.
SIZES: dict[str, tuple[int, int, int]] = {
    "sst2": (67349, 872, 13),
    "cola": (8551, 1043, 11),
    "mrpc": (3668, 2133, 53),
    "rte": (2490, 277, 70),
    "stsb": (5749, 2879, 31),
    "qnli": (104743, 5463, 50),
    "qqp": (363846, 40430, 30),
    "mnli": (392702, 9815, 39),
    "snli": (549367, 19666, 27),
    "ag_news": (120000, 7600, 53),
    "sms_spam": (1045, 449, 24),
    "digits": (1441, 356, 0),
    "e2e_nlg": (42061, 9365, 64),
    "docstrings": (3100, 770, 60),
}
ACTIVATION = 34  # bytes of a token in a block, over its width, at two bytes a number (no softmax)
UTILISATION = 0.4  # the share of a matrix product's rate that training reaches


@dataclass(frozen=True)
class Estimate:
    """Steps, parameters that train, the bytes that are certain and those expected, and FLOPs."""

    steps: int
    trainable: int
    total: int
    least_bytes: int
    bytes: int
    work: float


def estimate(arguments: Arguments) -> Estimate:
    """The estimate of a run. Raises ValueError and FileNotFoundError as loading its base does."""
    unlike = ("seed", "learning_rate", "data_dir", "output_dir", "max_train_samples", "epochs")
    key = {k: v for k, v in arguments.identity().items() if k not in unlike}
    trainable, total, backbone, blocks, width, patches = _count(json.dumps(key, sort_keys=True))
    rows, scored, tokens = SIZES[arguments.task]
    rows = min(rows, arguments.max_train_samples or rows)
    scored = min(scored, 2 * arguments.max_eval_samples if arguments.max_eval_samples else scored)
    if patches:
        tokens = patches
    elif arguments.pad_to_max or tokens > arguments.max_length:
        tokens = arguments.max_length
    batches = math.ceil(rows / arguments.batch_size)
    steps = arguments.epochs * math.ceil(batches / arguments.gradient_accumulation)
    seen = rows * arguments.epochs
    if arguments.max_steps is not None:
        steps = arguments.max_steps
        seen = steps * arguments.batch_size * arguments.gradient_accumulation
    least = 4 * total + 12 * trainable
    wide = 2 if arguments.precision == "fp32" else 1
    activations = ACTIVATION * width * blocks * tokens * arguments.batch_size * wide
    work = (4.0 * backbone + 2 * trainable) * tokens * seen
    work += 2.0 * backbone * tokens * scored * (arguments.epochs + 1)
    return Estimate(steps, trainable, total, least, least + activations, work)


@lru_cache(maxsize=1024)
def _count(key: str) -> tuple[int, int, int, int, int, int]:
    """Trained, all and backbone parameters, blocks, width, and patches of an image (0 for text)."""
    import torch

    from ..data.tasks import task_of
    from ..model.attach import attach, parameter_counts
    from ..model.loading import kind_of

    arguments = Arguments(**json.loads(key))
    task = task_of(arguments.task)
    config = config_of(arguments.model)
    config.num_labels, config.pad_token_id = task.num_labels, 0
    with torch.device("meta"):
        model = kind_of(task).from_config(config)
    attached = attach(arguments, model)
    counts = parameter_counts(attached.model)
    patches = (config.image_size // config.patch_size) ** 2 + 1 if task.images else 0
    return (
        counts["all"]["trainable"],
        counts["all"]["total"],
        counts["backbone"]["total"],
        config.num_hidden_layers,
        config.hidden_size,
        patches,
    )


def memory_here() -> int:
    """Bytes of this machine's GPU, or of its main memory where it has none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(arguments: Arguments) -> None:
    """Raises ValueError for a run whose parameters alone need more memory than there is.

    A base whose size cannot be told passes: loading it says what is wrong.
    """
    try:
        needed = estimate(arguments).least_bytes
    except (ValueError, OSError, KeyError):
        return
    here = memory_here()
    if needed > here:
        raise ValueError(
            f"this run cannot fit: parameters, gradients and Adam's means need "
            f"{needed / 2**30:.1f} GiB, and there are {here / 2**30:.1f} GiB"
        )


@lru_cache(maxsize=1)
def rate_here() -> float:
    """FLOPs a second of a float32 matrix product on this machine, measured in about 0.2 s."""
    import torch
    from torch.utils.benchmark import Timer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 512
    a = torch.randn(size, size, device=device)
    timer = Timer("a @ a", globals={"a": a})  # it warms up, and waits for a GPU
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.2).median


def seconds(work: float) -> float:
    """The time that `work` FLOPs take on this machine, about."""
    return work / (UTILISATION * rate_here())
