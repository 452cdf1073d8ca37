"""The benchmarks' GPU paths on a stand-in for torch.cuda: control flow only.

Every tensor that is asked for on "cuda" is made on the CPU, events read the clock, and a replay
does nothing. So wrong names, arguments and orders surface; that kernels run on a GPU does not, and
no time means anything. What a capture forbids (a value read by the host, a tensor that the host
sends) raises while a graph is captured, as it would there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench import __main__ as command
from bench import cases, end_to_end, kernels, records, timing
from bench.providers import providers
from bench.subjects import METHODS, MODELS, PRECISIONS, Recipe
from lora_kernels.algebra import masks
from lora_kernels.strategies import library
from lora_kernels.strategies.choose import _decide, choose
from lora_kernels.strategies.problem import Problem, _gpu, architecture, processors
from lora_kernels.strategies.table import STRATEGIES
from lora_kernels.tools import doctor, probe, tune
from lora_kernels.tools import timing as stopwatches

# PEFT imports bitsandbytes where it is installed; under a pretended GPU that fails halfway.
with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "masked_select")


def on_cpu(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class OnCpu(TorchFunctionMode):
    """Sends to the CPU what asks for the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(on_cpu, args), **kwargs)


class Capturing(TorchDispatchMode):
    """Refuses what would end a capture."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return function(*args, **(kwargs or {}))


class Event:
    """Reads the clock; only what was recorded has a time."""

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, end):
        return max((end.at - self.at) * 1e3, 1e-6)


class Stream:
    device_index = 0

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    """A graph and the context that captures it."""

    captured = 0

    def __init__(self):
        self.whole = False

    def replay(self):
        assert self.whole

    @contextlib.contextmanager
    def capture(self, pool):
        assert pool == "pool"
        state["capturing"] = True
        try:
            with Capturing():
                yield
        except Exception as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            state["capturing"] = False
        self.whole = True
        Graph.captured += 1


class Generator:
    def clone_state(self):
        return "before"

    def graphsafe_set_state(self, state_before):
        state["generator"] = state_before


state: dict[str, object] = {}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with an "NVIDIA H200"."""
    properties = types.SimpleNamespace(
        major=9, minor=0, L2_cache_size=1 << 12, multi_processor_count=132, name="NVIDIA H200",
        total_memory=141 << 30,
    )  # fmt: skip
    state.clear()
    home, stand_ins = Stream(), {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "graph_pool_handle": lambda: "pool",
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": Graph.capture,
        "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda: home,
        "set_stream": lambda stream: state.update(stream=stream),
        "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 100,
        "max_memory_allocated": lambda device=None: 300,
        "reset_peak_memory_stats": lambda device=None: None,
        "default_generators": (Generator(),),
        "is_current_stream_capturing": lambda: bool(state.get("capturing")),
    }  # fmt: skip
    for name, value in stand_ins.items():
        assert hasattr(torch.cuda, name), name  # a stand-in for what torch does not have hides it
        monkeypatch.setattr(torch.cuda, name, value)
    cleared = state.setdefault("cleared", [])
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool", "_cuda_clearCublasWorkspaces"):
        called = functools.partial(lambda name, *given: cleared.append((name, *given)), name)
        monkeypatch.setattr(torch._C, name, called, raising=False)  # a CPU build has none of them
    generator, draw = torch.Generator, masks.draw
    posed = type("Generator", (generator,), {"__new__": lambda cls, d="cpu": generator(on_cpu(d))})
    monkeypatch.setattr(torch, "Generator", posed)

    def drawn(*arguments):  # on a CPU the seed is read, on a GPU it is not
        with _disable_current_modes():
            return draw(*arguments)

    monkeypatch.setattr(masks, "draw", drawn)
    caches = (
        architecture, _gpu, processors, _decide, records.machine,
        timing.copy_bandwidth, timing.matrix_rate, library._launches_masks,
    )  # fmt: skip
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "tuned"))
    monkeypatch.setattr(timing, "matrix_rate", lambda *_: 800.0)  # 8192 cubed on a CPU
    seen = {"launches": 7, "kernels": 7, "busy_share": 0.5}  # the profiler wants a driver
    monkeypatch.setattr(end_to_end, "_profile", lambda step, step_ms: step() or seen)
    for cached in caches:
        cached.cache_clear()
    with OnCpu():
        yield home
    for cached in caches:
        cached.cache_clear()


def test_kernel_suite(gpu, tmp_path):
    case = cases.Case(cases.tiny()[2].layer, 33, 3, 0.1, "bfloat16")
    names = ("floor", "peft", "library", "auto")
    known, results = providers(), records.Results("kernels", CUDA, tmp_path)
    jobs = [(case, [known[name] for name in names])]
    assert kernels.suite(jobs, CUDA, results, samples=2) == 0
    rows = results.rows()
    assert results.path.name == "nvidia-h200-kernels.json"
    assert {(row["provider"], row["mode"], row["direction"]) for row in rows} == {
        (name, mode, direction)
        for name in names
        for mode, direction in ((m, d) for m in cases.MODES for d in cases.DIRECTIONS)
    }
    for row in rows:
        assert (row["status"], row["device"], row["gpu"]) == ("timed", "cuda", "NVIDIA H200")
        assert row["peak_bytes"] == 200 and row["samples"] >= 4 and row["floor_ratio"] > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["roberta-base", "gpt2"])
def test_a_whole_step_can_be_captured(gpu, many_tokens, name, precision):
    method, before = METHODS["lora-graph"], Graph.captured
    subject = (MODELS[name], method, PRECISIONS[precision], Recipe())
    row = end_to_end.measure(*subject, CUDA, steps=3, tiny=True)
    assert row["status"] == "timed", row["reason"]
    assert Graph.captured == before + 1 and row["peak_memory_bytes"] == 300
    assert row["samples"] == 3 and "launches" in row


def test_what_a_graph_cannot_hold_is_refused_with_the_reason(gpu):
    """Without the row's own word, the capture of this model fails (where, transformers decides)."""
    arguments = METHODS["lora-graph"], PRECISIONS["bf16"], Recipe(), CUDA
    model = MODELS["deberta-v2-xlarge"]
    row = end_to_end.measure(model, *arguments, steps=1, tiny=True)
    assert row["status"] == "unavailable" and "copied from the host" in row["reason"]
    free = dataclasses.replace(model, no_graph=None)
    row = end_to_end.measure(free, *arguments, steps=1, tiny=True)
    assert row["status"] == "failed"
    assert "not permitted when stream is capturing" in row["reason"]


def test_end_to_end_command(gpu, tmp_path, capsys):
    arguments = ["end_to_end", "--tiny", "--models", "gpt2", "--methods", "full", "lora"]
    arguments += ["--precisions", "bf16", "--steps", "2", "--results", str(tmp_path)]
    assert command.main(arguments) == 0
    rows = records.read(tmp_path / "nvidia-h200-end-to-end.json")
    assert [row["method"] for row in rows] == ["full", "lora"]
    assert "7 launches   50% busy" in capsys.readouterr().out


def test_a_failed_capture_leaves_nothing_behind(gpu):
    one = torch.ones(())

    def reads():
        return one.item() if state.get("capturing") else None

    with pytest.raises(RuntimeError, match="not permitted"):
        stopwatches.captured(reads)
    assert state["stream"] is gpu and state["generator"] == "before"
    names = ("_cuda_endAllocateToPool", "_cuda_releasePool")
    assert state["cleared"] == [(name, 0, "pool") for name in names]


@pytest.mark.parametrize("lack", ["_cuda_endAllocateToPool", "_cuda_releasePool"])
def test_a_torch_that_cannot_leave_a_failed_capture_says_so(gpu, monkeypatch, lack):
    monkeypatch.delattr(torch._C, lack)
    one = torch.ones(())
    with (
        pytest.warns(RuntimeWarning, match=f"cannot leave a failed capture.*{lack}"),
        pytest.raises(RuntimeError, match="not permitted"),
    ):
        stopwatches.captured(lambda: one.item() if state.get("capturing") else None)
    assert state["stream"] is gpu and state["cleared"] == []


def test_tuning(gpu, monkeypatch):
    rows = {name: STRATEGIES[name] for name in ("library", "split")}
    tiles = {**dict.fromkeys(tune.CANDIDATES, ()), "project": tune.CANDIDATES["project"][:1]}
    for module, name, value in (
        (tune, "STRATEGIES", rows), (tune, "CANDIDATES", tiles),
        (stopwatches, "STEPS", 1), (probe, "STEPS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)  # the interpreter takes its time
    problem = Problem.on(CUDA, 33, 32, 48, 3, torch.float32, dropout=True)
    assert (problem.arch, problem.gpu) == ("sm_90", "NVIDIA H200")
    rows = tune.tune([problem], CUDA, report=lambda line: None)
    assert rows[problem.key].median_us > 0
    assert "measured on this card" in choose(problem).reason


def test_doctor(gpu):
    findings = doctor.examine()
    trials = {
        t["strategy"]: t["problem"] for t in findings["strategies"] if t["device"] == "cuda:0"
    }
    assert set(trials.values()) == {None}
    assert findings["devices"][1]["arch"] == "sm_90" and "H200" in doctor.render(findings)


def test_queued_times_leave_out_the_first(gpu):
    waits = iter([0.05, 0.0, 0.0, 0.0])
    times = stopwatches.queued_times(lambda: time.sleep(next(waits)), 3)
    assert len(times) == 3 and max(times) < 40_000
