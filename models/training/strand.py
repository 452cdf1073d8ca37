"""A function in a thread of its own that runs only in its turn, as if the process were its own.

`resume` lets it run until it asks for something or ends. All that a process has once and a run
changes is swapped with the turn: the random states, where print writes, and what accelerate notes
of the step. So several runs can take turns within one process, each in the stream of numbers that
it has alone.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.state import GradientState


class Surroundings(NamedTuple):
    """What a process has once and a run changes."""

    torch: torch.Tensor
    cuda: list[torch.Tensor]
    numpy: Any
    python: Any
    streams: tuple[Any, Any]
    accelerate: dict[str, Any]

    @classmethod
    def now(cls) -> Surroundings:
        """As they are."""
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            np.random.get_state(),
            random.getstate(),
            (sys.stdout, sys.stderr),
            dict(GradientState._shared_state),
        )

    def restore(self) -> None:
        """Make them so again."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        sys.stdout, sys.stderr = self.streams
        shared = GradientState._shared_state  # every GradientState has this very object inside
        shared.clear()
        shared.update(self.accelerate)


class ClosedError(BaseException):
    """Raised in a strand that is to end; not an Exception, so that no run takes it for its own."""


class Strand:
    """`function()` in its own thread, in turns with the one that calls `resume`."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.ended = False
        self.surroundings = Surroundings.now()
        self._function = function
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._asked: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        # A daemon, so that a process ends though a strand still waits for its turn.
        threading.Thread(target=self._run, daemon=True).start()

    def resume(self, answer: Any = None) -> Any:
        """Give `answer` to what was asked; return what is asked next, or None at the end.

        An exception as the answer is raised where the strand asked. One that the function lets out
        is raised here.
        """
        ours = Surroundings.now()
        self.surroundings.restore()
        self._answer = answer
        self._turn.release()
        self._back.acquire()
        self.surroundings = Surroundings.now()
        ours.restore()
        if self._error is not None:
            raise self._error
        return self._asked

    def close(self) -> None:
        """End it where it asked, so that it lets go of its files and locks."""
        with suppress(ClosedError):
            self.resume(ClosedError())

    def ask(self, what: Any) -> Any:
        """In the strand: end the turn; return the answer that the next turn brings."""
        self._asked = what
        self._back.release()
        self._turn.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self._function()
        except BaseException as error:  # noqa: BLE001 - it is raised again in `resume`
            self._error = error
        self._asked, self.ended = None, True
        self._back.release()
