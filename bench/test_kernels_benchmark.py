"""The kernel suite's cases through pytest-benchmark: `pytest bench --benchmark-only`.

Cases, providers and checks are those of `python -m bench kernels --quick`; on a CPU the toys alone.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench import cases, timing
from bench.check import check
from bench.kernels import buffers, one_pass
from bench.providers import Built, providers
from lora_kernels.hardware.capture import captured

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases.quick() if DEVICE.type == "cuda" else cases.tiny()
PROVIDERS = providers()


@functools.lru_cache(maxsize=1)
def _built(case: cases.Case, name: str) -> Built:
    """The layer of a provider that passed the check; skips if it cannot run, fails if wrong."""
    provider = PROVIDERS[name]
    reason = provider.refuses(case, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    built = provider.build(case, DEVICE)
    verdict = check(built, case, DEVICE, provider.slack)
    assert not verdict.wrong, verdict.wrong
    return built


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(benchmark, case: cases.Case, name: str, direction: str) -> None:
    """One call until the device has finished; on a GPU the replay of a CUDA graph."""
    if DEVICE.type == "cpu" and "compile" in name:
        pytest.skip("compiling toys says nothing")
    ring = buffers(case, DEVICE)
    run = one_pass(_built(case, name), ring, direction)
    if DEVICE.type == "cuda":
        run = captured(run)

    def timed() -> None:
        run()
        timing.synchronize(DEVICE)

    benchmark.group = f"{case}, {direction}"
    benchmark.extra_info["calls"] = len(ring)
    benchmark.pedantic(timed, rounds=timing.SAMPLES, warmup_rounds=2)
