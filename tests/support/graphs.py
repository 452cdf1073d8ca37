"""What stands in for CUDA graphs where there are none.

A replay runs the step again on the tensors that it was captured with, and writes into the memory
that the capture left.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.training import captures, graphed_forward, graphed_step


class Recorder:
    """A graph that is no graph: its memory is that of the capture."""

    def __init__(self):
        self.captures = self.replays = 0
        self.capturing = False
        self.owner = None

    def captured(self, run, pool):
        assert pool is not None
        parameters = list(self.owner.model.parameters())
        self.captures += 1
        state, self.capturing = torch.get_rng_state(), True
        try:
            run()
        finally:
            self.capturing = False
        torch.set_rng_state(state)  # a capture computes nothing
        memory, enabled = self._memory(run, parameters), torch.is_grad_enabled()

        def replay():
            self.replays += 1
            before = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            with torch.set_grad_enabled(enabled):
                run()
            for old, new in zip(memory, self._memory(run, parameters), strict=True):
                if old is not None:
                    old.data.copy_(new)
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

        return replay

    def _memory(self, run, parameters):
        outputs = next(
            c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, list)
        )
        found = []
        captures.taken_apart(outputs[0], found)
        return [*found, *[p.grad for p in parameters]]


def recording(monkeypatch) -> Recorder:
    """Let a recorder take the place of CUDA graphs."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    found = Recorder()
    for module in (graphed_step, graphed_forward):
        monkeypatch.setattr(module, "captured", found.captured)
    monkeypatch.setattr(captures, "_has_graphs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    before = captures.Captures.__call__

    def called(self, *args, **kwargs):
        found.owner = self
        return before(self, *args, **kwargs)

    monkeypatch.setattr(captures.Captures, "__call__", called)
    return found
