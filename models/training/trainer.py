"""The Hugging Face Trainer with five changes: it resumes exactly, saves little, and counts more.

* The order of an epoch depends on (seed, epoch) alone. Trainer's own samplers draw it from the
  global generator. A run that resumes within an epoch no longer has the generator's state at the
  start of that epoch, and would see other batches.
* A checkpoint holds the parameters that train, not the frozen model.
* The loss of each step is kept at full precision, so that two methods can be compared.
* Each epoch has a row: its seconds, its learning rate, and the scores of the training rows as they
  were trained on. Time and memory of training, scoring and saving are counted apart.
* Several processes share the rows of a step (`processes`). Trainer's own would each take as many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from lora_kernels import GraphedStep

from ..record.checkpoints import PROGRESS, TRAINED, seal
from ..record.run_directory import writing
from . import processes
from .meter import Meter
from .progress import Progress, clean

if TYPE_CHECKING:
    from .seat import Seat

_POOL = 50  # batches among which examples are sorted by length


class LengthGroupedSampler(Sampler[int]):
    """Batches of like length in random order, which depends on (seed, epoch) alone.

    Rows are shuffled, sorted by length within pools of 50 batches, and cut into batches; then the
    batches are shuffled. So there is little padding, and lengths do not drift over an epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; the data loader calls this when an epoch starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * _POOL
        ordered = [
            row
            for start in range(0, len(order), pool)
            for row in sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
        ]
        whole = len(ordered) // self.batch_size
        for batch in torch.randperm(whole, generator=generator).tolist():
            yield from ordered[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from ordered[whole * self.batch_size :]  # an incomplete batch stays last


class ExactTrainer(Trainer):
    """Trainer with the changes that this module's docstring lists.

    `lengths` are the tokens of each training row. `scores` makes the scores of an epoch from what
    the model said of the training rows and from their labels; None makes none. `new` are modules
    that no pretrained file holds: checkpoints hold them though they may not train. With `graphs`
    steps are replayed from CUDA graphs; with a `seat` they are made in one pass with those of other
    runs (`pack`). `step_losses`, `epochs`, `seconds` and what a callback with
    `state_dict` and `load_state_dict` keeps survive a resume. Progress shows as one bar and a line
    for each epoch, instead of Trainer's own callbacks.
    """

    def __init__(
        self,
        *args: Any,
        lengths: Sequence[int],
        scores: Callable[[Any, Any], dict[str, float]] | None,
        new: Sequence[str] = (),
        graphs: bool = False,
        seat: Seat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.graphs = GraphedStep(self.model, self._forward_backward) if graphs else None
        self.seat = seat
        self._logits: list[torch.Tensor | None] = []
        self._lengths = lengths
        self._scores = scores
        self._new = tuple(f"{path}." for path in new)
        self._losses: list[torch.Tensor] = []
        self._step_loss: Any = 0.0  # of the batches of a step so far
        self._batches = 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.epochs: list[dict[str, float]] = []
        self.predictions: dict[str, Any] = {}
        if self.args.gradient_accumulation_steps > 1 or processes.count() > 1:
            # Trainer hands such models the rows of a step, by which not all divide their loss.
            self.model_accepts_loss_kwargs = False
        self.meter = Meter()
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if processes.is_first():
            self.add_callback(Progress())
        self.add_callback(_Counting(self))

    @property
    def step_losses(self) -> list[float]:
        """The training loss of every step so far; no digit of it is lost."""
        return torch.stack(self._losses).tolist() if self._losses else []

    @property
    def seconds(self) -> float:
        """Wall time of training so far, without the time between a kill and its resume."""
        seconds = self.meter.read()
        return sum(seconds[name] for name in ("training", "scoring", "saving") if name in seconds)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, by the clock."""
        if self.seat is not None:
            self.seat.join(self)
        with self.meter.phase("training"):
            output = super().train(*args, **kwargs)
        self._check_steps()
        return output

    def score(self, splits: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Split -> loss and metrics of the model as it is at the end of training.

        `predictions` then holds the model's outputs for each split.
        """
        validations = [log for log in self.state.log_history if "eval_loss" in log]
        scores = {}
        for name, split in splits.items():
            # The last epoch ended with the validation scores of this very model.
            if name == "validation" and "eval" in self.predictions:
                scores[name] = clean(validations[-1], "eval")
                self.predictions[name] = self.predictions.pop("eval")
            else:
                scores[name] = clean(self.evaluate(split, metric_key_prefix=name), name)
        return scores

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score a split, by the clock."""
        with self.meter.phase("scoring" if self.is_in_train else "final scoring"):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what the model says of each row of the split that was scored last."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        self.predictions[prefix] = output.predictions
        if processes.count() > 1 and self._scores is not None:
            # Rows that fill up the last batch are taken out of the predictions, not of the loss.
            output.metrics[f"{prefix}_loss"] = self._loss_of(output.predictions, output.label_ids)
        return output

    def _loss_of(self, predictions: Any, labels: Any) -> float:
        """The loss of a whole split, from what the model says of it."""
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        outputs, wanted = {"logits": torch.from_numpy(logits)}, torch.from_numpy(labels)
        if self.label_smoother is not None:
            return float(self.label_smoother(outputs, wanted))
        config: Any = self.model.config
        return float(self.model.loss_function(wanted, outputs["logits"], config))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kw: Any) -> Any:
        """Compute the loss, and keep what the model says of the training rows."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kw)
        if model.training:
            if processes.count() > 1:
                loss = loss * processes.weight_of(processes.mean_over(inputs["labels"]))
            scored = self._scores is not None
            self._logits.append(outputs["logits"].detach().float() if scored else None)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one batch and add its loss to the step's, on the device: to read it would wait."""
        if self._batches == 0:
            self._check_steps()
        model.train()
        run: Any = self.graphs or partial(self._forward_backward, model)
        if self.seat is not None and not self.seat.alone:
            run = partial(self.seat.step, self._forward_backward, model)
        accumulated = self.current_gradient_accumulation_steps
        loss, logits = run(dict(inputs), *args, accumulated=accumulated, **kwargs)
        if logits is not None:
            self._seen.append((logits, inputs["labels"].to(logits.device)))
        self._step_loss = self._step_loss + loss
        self._batches += 1
        if self._batches == self.current_gradient_accumulation_steps:
            self._losses.append(self._step_loss.clone())
            self._step_loss, self._batches = 0.0, 0
        return loss

    def _forward_backward(
        self, model: Any, inputs: Any, *args: Any, accumulated: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of a batch, and its logits where they are scored.

        `accumulated` tells graphs of the loss's divisor.
        """
        self._logits.clear()  # of a step that failed
        loss = super().training_step(model, inputs, *args, **kwargs)
        return processes.mean(loss.detach()), self._logits.pop()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that train, and what else survives a resume."""
        directory = Path(output_dir or self.args.output_dir)
        seen = self._all_seen()
        if not processes.is_first():
            return
        directory.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous() for n, p in self._trained().items()}
        save_file(trained, directory / TRAINED)
        progress = {
            "losses": self.step_losses,
            "seconds": self.meter.read(),
            "epochs": self.epochs,
            "seen": [[t.tolist() for t in pair] for pair in seen],
            "callbacks": [callback.state_dict() for callback in self._stateful()],
        }
        (directory / PROGRESS).write_text(json.dumps(progress))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Leave out an epoch behind the last step, of which Trainer would make one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What a checkpoint holds: the parameters that train, and those that are new."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or any(path in name for path in self._new)
        }

    def _check_steps(self) -> None:
        """Raise RuntimeError unless every step done has its loss: two runs have been mixed."""
        if self.state.global_step != len(self._losses):
            raise RuntimeError(
                f"step {self.state.global_step} comes with {len(self._losses)} losses: "
                f"{self.args.output_dir} was changed during the run"
            )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        directory = Path(self.args.output_dir)
        with writing(directory.parent), self.meter.phase("saving"):
            super()._save_checkpoint(*args, **kwargs)
            processes.gathered(None)  # each has written its part
            if processes.is_first():
                seal(directory / f"checkpoint-{self.state.global_step}")
            processes.gathered(None)  # none goes on, to be killed, before the checkpoint is whole

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        self._load_trained(directory)
        progress = json.loads((directory / PROGRESS).read_text())
        device = self.args.device
        self._losses = [torch.tensor(loss, device=device) for loss in progress["losses"]]
        self._seen = [
            (torch.tensor(logits, device=device), torch.tensor(labels, device=device))
            for logits, labels in progress["seen"]
            if processes.is_first()
        ]
        self.epochs = progress["epochs"]
        for name, seconds in progress["seconds"].items():
            self.meter.seconds[name] += seconds
        for callback, state in zip(self._stateful(), progress["callbacks"], strict=True):
            callback.load_state_dict(state)

    def _stateful(self) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if hasattr(c, "load_state_dict")]

    def _load_best_model(self) -> None:
        self._load_trained(Path(self.state.best_model_checkpoint or ""))
        self.predictions.pop("eval", None)  # of another epoch

    def _load_trained(self, directory: Path) -> None:
        saved, trained = load_file(directory / TRAINED), self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{directory} holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def end_epoch(self) -> None:
        """Add the row of an epoch that has been trained."""
        seconds = self.meter.read()["training"]
        scores: dict[str, float] = {}
        if self._scores is not None:
            seen = self._all_seen()
            logits, labels = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
            scores = self._scores(logits.cpu().numpy(), labels.cpu().numpy())
        self._seen = []
        self.epochs.append(
            {
                **{f"train_{name}": value for name, value in scores.items()},
                "seconds": seconds - sum(row["seconds"] for row in self.epochs),
            }
        )

    def _all_seen(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and labels of the batches of this epoch, in all processes."""
        if processes.count() == 1:
            return self._seen
        first, *others = processes.gathered([(a.cpu(), b.cpu()) for a, b in self._seen])
        doubled = 0 < len(self._lengths) % self.args.train_batch_size < processes.count()
        if doubled and sum(len(b) for each in (first, *others) for _, b in each) > len(
            self._lengths
        ):  # each process took the last batch
            others = [each[:-1] for each in others]
        return [pair for each in (first, *others) for pair in each]

    def get_train_dataloader(self) -> Any:
        """Trainer's loader; with several processes, that of this process's share of each batch."""
        if processes.count() == 1:
            return super().get_train_dataloader()
        sampler = self._get_train_sampler()
        size = self.args.train_batch_size
        return processes.Shares(self.train_dataset, sampler, size, self.data_collator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthGroupedSampler(self._lengths, self.args.train_batch_size, self.args.seed)


class _Counting(TrainerCallback):
    """Tells the trainer where an epoch ends, before that epoch is scored and saved."""

    def __init__(self, trainer: ExactTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the epoch's row."""
        self.trainer.end_epoch()
