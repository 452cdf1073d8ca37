"""Tests run with uninitialised memory filled with NaN, so that an unwritten output is seen."""

from __future__ import annotations

import os

import pytest
import torch

# The models are tiny: threads would only wait for one another.
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """torch.empty gives NaN in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
