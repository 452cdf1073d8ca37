"""FusedLoRACallback: the one line for transformers' Trainer and trainers that are built on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import arguments
from ..strategies.table import check_strategy
from .inject import describe, fused_layers
from .peft import fuse_peft
from .report import Report
from .wrappers import unwrapped

_LOG = logging.getLogger("lora_kernels")


class FusedLoRACallback:
    """Lets a Trainer run LoRA fused: `Trainer(..., callbacks=[FusedLoRACallback()])`.

    It calls `fuse_peft` when training begins, after the trainer has wrapped the model
    (`peft_config` of TRL's SFTTrainer, `add_adapter` of sentence-transformers). Names, values and
    files stay PEFT's, so checkpoints need no step of their own. A model of `add_lora` is fused
    already.

    `report` holds the `Report` afterwards. It also goes to the logger "lora_kernels": the table at
    level INFO, and layers that run unfused, with the reason, at level WARNING. Arguments are those
    of `fuse_peft`. Raises ValueError, when training begins, for a model without LoRA.

    >>> trainer = SFTTrainer(model, peft_config=peft_config, callbacks=[FusedLoRACallback()])
    """

    __module__ = "lora_kernels"  # where pickles find it, wherever the file lies
    report: Report | None = None

    def __init__(self, strategy: str = "auto", group: bool = True) -> None:
        check_strategy(strategy)
        self.strategy, self.group = strategy, arguments.flag("group", group)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Fuse the model that is about to train."""
        model: nn.Module = unwrapped(objects["model"])
        if fused_layers(model):
            self.report = describe(model)
        else:
            self.report = fuse_peft(model, self.strategy, self.group)
        if getattr(state, "is_world_process_zero", True):
            _LOG.info("%s", self.report)
            for row in self.report.skipped:
                _LOG.warning("%s runs unfused: %s", row.name, row.reason)

    def __getattr__(self, name: str) -> Callable[..., None]:
        # A Trainer calls every event of every callback. This is no subclass of its TrainerCallback,
        # since importing this package imports no transformers.
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What happens at all other events."""
