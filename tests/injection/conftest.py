"""A count of the layers that run fused, for tests of several files."""

from __future__ import annotations

import pytest

from lora_kernels.autograd.functional import lora_layer, lora_linears


@pytest.fixture
def fused_calls(monkeypatch) -> list[int]:
    """Grows by one with each layer that runs fused, in a group or alone."""
    calls: list[int] = []
    alone, together = lora_layer, lora_linears

    def counted_alone(*args, **kwargs):
        calls.append(1)
        return alone(*args, **kwargs)

    def counted_together(x, layers, settings):
        calls.extend(1 for _ in layers)
        return together(x, layers, settings)

    monkeypatch.setattr("lora_kernels.injection.peft.lora_layer", counted_alone)
    monkeypatch.setattr("lora_kernels.layers.group.lora_linears", counted_together)
    return calls
