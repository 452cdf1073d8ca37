"""What the training loop tells and asks for as it goes: checkpoints, bars, a line an epoch."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback


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
