"""A run's side of a pack (`pack.py`): what it asks for in a step, and what it does with the answer.

Ready      before the first step: a place in the pack
Batch      first in a step: the logits of its inputs
Slope      then: the gradients of its parameters, from the slope of its logits
EpochEnds  between two epochs, where losers are stopped: whether it may go on
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers import TrainerCallback

from .strand import Strand

if TYPE_CHECKING:
    from .pack import Pack
    from .trainer import ExactTrainer

Inputs = Mapping[str, Tensor]
Step = Callable[..., tuple[Tensor, Tensor | None]]


class Batch(NamedTuple):
    """Asks for the logits of these inputs."""

    inputs: Inputs


class Slope(NamedTuple):
    """Asks for the gradients of the parameters, from that of the logits."""

    gradient: Tensor
    loss: Tensor


class Ready(NamedTuple):
    """Asks for a place in the pack."""


class EpochEnds(NamedTuple):
    """Asks whether the run may go on after so many epochs."""

    epochs: int


class StoppedError(Exception):
    """Raised in a run that others have beaten."""


class Seat(TrainerCallback):
    """The place of a run in a pack; `trainer` is the run's once it is ready to train.

    With `halving` the run asks between two epochs whether it may go on; `metric` is then compared,
    or the loss where it is not scored.
    """

    def __init__(self, name: str, pack: Pack, halving: bool = False) -> None:
        self.name, self.pack, self.halving = name, pack, halving
        self.metric = ""
        self.strand: Strand
        self.trainer: ExactTrainer
        self.why_alone: str | None = None
        self.diverged = False

    @property
    def alone(self) -> bool:
        """Whether the run makes its steps without the others."""
        return self.why_alone is not None

    def begin(self, model: nn.Module, metric: str) -> None:
        """Take note of the pretrained model, before LoRA is added, and of the task's metric."""
        self.metric = metric
        self.pack.keep(model)

    def join(self, trainer: ExactTrainer) -> None:
        """Take part. Afterwards the parameters of the trainer's model are those of the pack."""
        self.trainer = trainer
        if self.halving and trainer.eval_dataset is None:
            raise ValueError("--stop-losers compares scores of validation: there is no such split")
        self.why_alone = self.strand.ask(Ready())

    def step(
        self, run: Step, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `run(model, inputs, ...)`, with the pack's forward and backward in place of its own.

        The time in which others run is not counted; the pack counts a share of its own.
        """
        if not self.alone:
            inputs = self.trainer._prepare_inputs(inputs)  # type: ignore[arg-type]
            logits = self._ask(Batch({k: v for k, v in inputs.items() if k != "labels"}))
            if isinstance(logits, str):
                self.why_alone = logits
        if self.alone:
            return run(model, inputs, *args, **kwargs)
        loss, kept = run(_Said(model, logits), inputs, *args, **kwargs)
        assert logits.grad is not None
        self.diverged = self._ask(Slope(logits.grad, loss))
        return loss, kept

    def _ask(self, what: Batch | Slope) -> Any:
        began = time.perf_counter()
        answer = self.strand.ask(what)
        self.trainer.meter.seconds["training"] -= time.perf_counter() - began
        return answer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a run that has diverged for good: its loss and its parameters are no numbers."""
        trained = (p for p in self.trainer.model.parameters() if p.requires_grad)
        if self.diverged and not all(bool(p.isfinite().all()) for p in trained):
            control.should_training_stop = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two epochs, ask whether the run may go on."""
        epochs = len(self.scores())
        if self.halving and epochs and not self.alone:
            self.strand.ask(EpochEnds(epochs))

    def scores(self) -> list[Mapping[str, float]]:
        """What Trainer logged of the validation split after each epoch so far."""
        return [log for log in self.trainer.state.log_history if "eval_loss" in log]

    def score(self, epoch: int) -> float:
        """The validation score after an epoch, by which losers are told; higher is better."""
        log = self.scores()[epoch - 1]
        score = log.get(f"eval_{self.metric}", -log["eval_loss"])
        return score if math.isfinite(score) else -math.inf

    def notes(self, steps: int) -> list[str]:
        """What the run's result should tell of the pack."""
        if self.alone:
            return []
        found = [
            f"trained with up to {self.pack.most} runs in one pass over the base: its seconds are "
            "its share of theirs, its memory is that of all"
        ]
        if self.pack.has_dropout:
            found.append("the base's own dropout draws other masks than in a run alone")
        if self.pack.graphs is not None:
            found += str(self.pack.graphs).splitlines()
        if self.diverged:
            found.append(f"it left the others at step {steps}: its loss is no number")
        return found


class _Said(nn.Module):
    """Stands for a run's model in Trainer's step: the logits are there, and the loss is its own."""

    def __init__(self, model: nn.Module, logits: Tensor) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """What the model's forward returns, without computing the logits."""
        outputs = {"logits": self.logits}
        if labels is not None:
            outputs["loss"] = loss_of(self.model, self.logits, labels, kwargs)
        return outputs

    def _get_name(self) -> str:  # by which Trainer tells how labels are smoothed
        return self.model._get_name()  # type: ignore[no-any-return, operator]


def loss_of(model: Any, logits: Tensor, labels: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The loss that the model's forward computes of its logits. `given` are its other arguments."""
    if logits.ndim == 3:  # of every token
        counts = {k: v for k, v in given.items() if k == "num_items_in_batch"}
        size = model.config.vocab_size
        return model.loss_function(logits=logits, labels=labels, vocab_size=size, **counts)
    return model.loss_function(labels=labels, pooled_logits=logits, config=model.config)
