"""Each test draws the same numbers whatever ran before, and finds NaN in memory that is not its."""

from __future__ import annotations

import os

import pytest
import torch

# The models are tiny: threads would only wait for one another.
torch.set_num_threads(1)
# Without a fixed workspace cuBLAS warns of every product in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A vendor's product in fp16 may else add slices up in fp16: which ones do depends on the call.
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """torch.empty gives NaN in deterministic mode, so that an unwritten output is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def many_tokens(monkeypatch):
    """No call has few tokens (`autograd/few.py`): a CPU runs layers as a GPU does."""
    monkeypatch.setattr("lora_kernels.strategies.problem.FEW_ELEMENTS", -1)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)
