"""The Hugging Face Trainer with three changes: exact resume, small checkpoints, every step's loss.

* The order of an epoch depends on (seed, epoch) alone. Trainer's own samplers draw it from the
  global generator. A run that resumes within an epoch no longer has the generator's state at the
  start of that epoch, and would see other batches.
* A checkpoint holds the parameters that train, not the frozen model.
* The loss of each step is kept at full precision, so that two methods can be compared.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .checkpoints import PROGRESS, TRAINED, seal
from .run_directory import writing

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
    """Trainer with the three changes that this module's docstring lists.

    `lengths` are the tokens of each training row. `new` are modules that no pretrained file holds:
    checkpoints hold them though they may not train. `step_losses` and `seconds` survive a resume.
    Progress shows as one bar and a line for each epoch, instead of Trainer's own callbacks.
    """

    def __init__(
        self, *args: Any, lengths: Sequence[int], new: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = lengths
        self._new = tuple(f"{path}." for path in new)
        self._losses: list[torch.Tensor] = []
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._seconds_before = 0.0
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(Progress())

    @property
    def step_losses(self) -> list[float]:
        """The training loss of every step so far; no digit of it is lost."""
        return torch.stack(self._losses).tolist() if self._losses else []

    @property
    def seconds(self) -> float:
        """Wall time of training so far, without the time between a kill and its resume."""
        now = time.perf_counter() if self._ended is None else self._ended
        return self._seconds_before + now - self._started

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, by the clock."""
        self._started = time.perf_counter()
        output = super().train(*args, **kwargs)
        self._check_steps()
        self._ended = time.perf_counter()
        return output

    def score(self, splits: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Split -> loss and metrics of the model as it is at the end of training."""
        validations = [log for log in self.state.log_history if "eval_loss" in log]
        return {
            # The last epoch ended with the validation scores of this very model.
            name: clean(validations[-1], "eval")
            if name == "validation"
            else clean(self.evaluate(split, metric_key_prefix=name), name)
            for name, split in splits.items()
        }

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one step and keep its loss on the device: to read it here would wait for the GPU."""
        self._check_steps()
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach().clone())
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that train, and the losses and seconds so far."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous() for n, p in self._trained().items()}
        save_file(trained, directory / TRAINED)
        progress = {"losses": self.step_losses, "seconds": self.seconds}
        (directory / PROGRESS).write_text(json.dumps(progress))

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
        with writing(directory.parent):
            super()._save_checkpoint(*args, **kwargs)
            seal(directory / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        saved, trained = load_file(directory / TRAINED), self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{directory} holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        progress = json.loads((directory / PROGRESS).read_text())
        device = self.args.device
        self._losses = [torch.tensor(loss, device=device) for loss in progress["losses"]]
        self._seconds_before = progress["seconds"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthGroupedSampler(self._lengths, self.args.train_batch_size, self.args.seed)


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint every `steps` steps, but not where an epoch ends; 0 asks for none.

    At the end of an epoch, Trainer's own `save_steps` saves before the epoch is scored, and a run
    that resumes from there never scores it.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the flag that Trainer reads."""
        ends_epoch = float(state.epoch).is_integer()
        if self.steps and state.global_step % self.steps == 0 and not ends_epoch:
            control.should_save = True


class Progress(TrainerCallback):
    """A progress bar for training and for scoring, and one readable line for each epoch."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def _advance(self, name: str, total: int, done: int | None = None) -> None:
        if name not in self._bars:
            # In a log file a bar redrawn twice a second is noise.
            pause = 0.5 if sys.stderr.isatty() else 15.0
            self._bars[name] = tqdm(
                total=total, desc=name, leave=False, dynamic_ncols=True, mininterval=pause
            )
        bar = self._bars[name]
        bar.update(1 if done is None else done - bar.n)

    def _close(self, name: str) -> None:
        if name in self._bars:
            self._bars.pop(name).close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the training bar."""
        self._advance("training", state.max_steps, state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Advance the scoring bar."""
        self._advance("scoring", len(eval_dataloader))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Print an epoch's numbers above the bar."""
        self._close("scoring")
        if metrics and "eval_loss" in metrics:
            numbers = "  ".join(
                f"{name} {value:.4f}" for name, value in clean(metrics, "eval").items()
            )
            tqdm.write(f"epoch {state.epoch:.0f}  validation  {numbers}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the training bar."""
        self._close("training")


def clean(logged: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Name -> loss and metrics among what Trainer logs for a split, without the prefix.

    The loss comes first, the rest by name. (Trainer's order is lost on a resume, which reads the
    earlier logs from a file.)
    """
    noise = re.compile(rf"{prefix}_(runtime|.*_per_second|model_preparation_time)")
    return {
        name.removeprefix(f"{prefix}_"): value
        for name, value in sorted(
            logged.items(), key=lambda item: (item[0] != f"{prefix}_loss", item[0])
        )
        if name.startswith(f"{prefix}_") and not noise.fullmatch(name)
    }
