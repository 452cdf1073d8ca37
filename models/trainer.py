"""The Hugging Face Trainer with three changes: exact resume, small checkpoints, every step's loss.

* The order of an epoch depends on (seed, epoch) alone. Trainer's own samplers draw it from the
  global generator, whose state at the start of an epoch is lost when a run resumes inside it.
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
from transformers import Trainer, TrainerCallback

_TRAINED = "trained.safetensors"
_PROGRESS = "progress.json"
_POOL = 50  # batches among which examples are sorted by length


class LengthGroupedSampler(Sampler[int]):
    """Batches of like length in random order, from (seed, epoch) alone.

    Examples are shuffled, sorted by length within pools of 50 batches, cut into batches, and the
    batches shuffled: little padding, and no drift from long to short over an epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; called by the data loader at the start of every epoch."""
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
        yield from ordered[whole * self.batch_size :]  # the incomplete batch stays last


class ExactTrainer(Trainer):
    """See the module's docstring. ``step_losses`` and ``seconds`` survive a resume."""

    def __init__(self, *args: Any, lengths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = lengths
        self._losses: list[torch.Tensor] = []
        self._started = time.perf_counter()
        self._seconds_before = 0.0

    @property
    def step_losses(self) -> list[float]:
        """The training loss of every step so far, as the fp32 (or wider) number it was."""
        return torch.stack(self._losses).tolist() if self._losses else []

    @property
    def seconds(self) -> float:
        """Wall time since training began, less the time between a kill and the resume."""
        return self._seconds_before + time.perf_counter() - self._started

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the clock starts here."""
        self._started = time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one step and keep its loss, on the device: reading it here would wait for the GPU."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach().clone())
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what a checkpoint needs of the model: the parameters that train."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous() for n, p in self._trained().items()}
        save_file(trained, directory / _TRAINED)
        progress = {"losses": self.step_losses, "seconds": self.seconds}
        (directory / _PROGRESS).write_text(json.dumps(progress))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        saved, trained = load_file(directory / _TRAINED), self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{directory} holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        progress = json.loads((directory / _PROGRESS).read_text())
        device = self.args.device
        self._losses = [torch.tensor(loss, device=device) for loss in progress["losses"]]
        self._seconds_before = progress["seconds"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthGroupedSampler(self._lengths, self.args.train_batch_size, self.args.seed)


class SaveEvery(TrainerCallback):
    """Ask for a checkpoint every ``steps`` steps, but not where an epoch ends.

    Trainer's own save_steps saves there before the epoch's evaluation, and a run resumed from that
    checkpoint never makes it.
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
    """Keep loss and metrics of what Trainer logs for a split, without its prefix, loss first.

    Sorted: a resumed run reads its earlier logs from a file that holds them in another order.
    """
    noise = re.compile(rf"{prefix}_(runtime|.*_per_second|model_preparation_time)")
    return {
        name.removeprefix(f"{prefix}_"): value
        for name, value in sorted(
            logged.items(), key=lambda item: (item[0] != f"{prefix}_loss", item[0])
        )
        if name.startswith(f"{prefix}_") and not noise.fullmatch(name)
    }


def last_checkpoint(directory: Path) -> Path | None:
    """Find the newest complete checkpoint: the state is what is written last."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return path
    return None
