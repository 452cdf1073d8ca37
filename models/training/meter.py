"""Time and memory of a run, apart for what it does: training, scoring, saving."""

from __future__ import annotations

import re
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Seconds and peak bytes by phase; a phase within another one interrupts it.

    On a GPU the bytes are those that torch has allocated, and the queue of the GPU is waited for
    where a phase ends. On a CPU they are the resident memory of the process. Linux can forget the
    peak of that, so the peak of a phase is its own; elsewhere it is that of the process so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self.before = _resident()
        self._phase: str | None = None
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time and memory under `name`."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def read(self) -> dict[str, float]:
        """Phase -> seconds so far, up to this moment."""
        self._switch(self._phase)
        return dict(self.seconds)

    def memory(self) -> dict[str, Any]:
        """The peak bytes of training, and `scoring`, `saving`, and `before` the run began."""
        of = "GPU, allocated" if torch.cuda.is_available() else "process, resident"
        peaks = {"bytes": self.bytes["training"]}
        peaks |= {name: self.bytes[name] for name in ("scoring", "saving")}
        return {"of": of, **peaks, "before": self.before}

    def _switch(self, name: str | None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
            self.bytes[self._phase] = max(self.bytes[self._phase], _peak())
        _forget_peak()
        self._phase, self._since = name, now


def _peak() -> int:
    """The peak bytes since `_forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # not Linux, or a container that forbids it: the peak is the process's
        _CLEAR.write_text("5")


def _resident() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
