"""`lora-kernels doctor`: what this machine has, which strategies run on it, and why not the others.

The facts are gathered first and judged apart from that, so every pitfall is tested anywhere.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..algebra import reference
from ..autograd.functional import lora_linear
from ..strategies.choose import choose
from ..strategies.problem import Problem, architecture, interpreting
from ..strategies.table import STRATEGIES
from .shapes import LAYERS

PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "peft", "lora-kernels")

# Layers that people adapt, on 16 sequences of 128 tokens, at rank 8, with dropout.
EXAMPLES = {
    "RoBERTa-base query": LAYERS["roberta-base.query"],
    "RoBERTa-base intermediate": LAYERS["roberta-base.up"],
    "GPT-2 c_attn": LAYERS["gpt2.c_attn"],
    "Llama-3-8B q_proj": LAYERS["llama-8b.q_proj"],
}
EXAMPLE_TOKENS, EXAMPLE_RANK = 2048, 8
EXAMPLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    """A device that layers can run on: torch's name for it, its model, architecture and memory."""

    name: str
    model: str
    arch: str
    memory_gib: float | None = None


@dataclass(frozen=True)
class Facts:
    """What was found on the machine, before any judgement."""

    versions: Mapping[str, str | None]
    gpu_build: str | None
    devices: tuple[Device, ...]
    driver: str | None
    gpu_error: str | None
    interpreting: bool
    peft_asked: str | None = None  # the oldest PEFT that transformers works with
    launches_known: bool = True  # whether the launch cache knows this Triton

    @property
    def gpus(self) -> list[str]:
        """The architectures of the devices that are not the CPU."""
        return [device.arch for device in self.devices if device.arch != "cpu"]

    def older(self, package: str, *limit: int) -> bool:
        """Whether a package is installed in a version before `limit`."""
        numbers = _numbers(self.versions.get(package) or "")
        return numbers != () and numbers < limit


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, without what a build adds."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


class Pitfall(NamedTuple):
    """A known trap: when the facts show it, and what to say; a fatal one leaves nothing usable."""

    name: str
    found: Callable[[Facts], object]
    text: str
    fatal: bool = False


PITFALLS = (
    Pitfall("cpu-build", lambda f: f.driver and not f.gpu_build,
            "there is a GPU driver, but this build of torch knows no GPU: "
            "install a GPU build of torch"),
    Pitfall("gpu-unreachable", lambda f: f.driver and f.gpu_build and not f.gpus,
            "there is a GPU driver and a GPU build of torch, but no GPU answers: the driver may be "
            "older than that build needs, or CUDA_VISIBLE_DEVICES hides it"),
    Pitfall("no-triton", lambda f: f.gpus and not f.versions["triton"],
            "Triton is not installed: the GPU gets the library strategy alone"),
    Pitfall("unknown-triton", lambda f: f.gpus and f.versions["triton"] and not f.launches_known,
            "the launch cache does not know this Triton, so Triton's own dispatch makes every "
            "launch: results are the same, but a launch takes the host about 34 us, not 6; small "
            "models get slower. Take Triton 3.6 or 3.7"),
    Pitfall("turing", lambda f: any(re.fullmatch(r"sm_[1-7]\d", arch) for arch in f.gpus),
            "Triton (3.3 and later) has no matrix instructions for cards before sm_80: they get "
            "the library strategy; they have no fast bfloat16 either, so train in float16"),
    Pitfall("interpreter-numpy",
            lambda f: f.interpreting and f.older("triton", 3, 7) and not f.older("numpy", 2, 4),
            "Triton 3.6's interpreter fails with NumPy 2.4 and later: "
            "take Triton 3.7, or numpy<2.4", fatal=True),
    Pitfall("interpreter-gpu", lambda f: f.interpreting and f.gpus,
            "TRITON_INTERPRET is set: kernels run in Python, not on the GPU, far slower: unset it"),
    Pitfall("old-torch", lambda f: f.older("torch", 2, 11) or f.older("triton", 3, 6),
            "torch before 2.11 or Triton before 3.6: not tested, upgrade both"),
    Pitfall("old-peft", lambda f: f.peft_asked and f.older("peft", *_numbers(f.peft_asked)),
            "this transformers asks for a newer PEFT than the one beside it: its add_adapter, "
            "load_adapter and from_pretrained of an adapter fail; take another pair, such as "
            "transformers<5.24 with PEFT 0.21"),
)  # fmt: skip


def gather() -> Facts:
    """The facts of this machine. A driver that fails becomes `gpu_error`, not an exception."""
    devices = [Device("cpu", platform.processor() or platform.machine(), "cpu")]
    gpu_error = None
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            device = torch.device("cuda", index)
            properties = torch.cuda.get_device_properties(device)
            gib = round(properties.total_memory / 2**30, 1)
            devices.append(Device(str(device), properties.name, architecture(device), gib))
    except RuntimeError as error:
        gpu_error = _first_line(error)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = None
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"ROCm {hip}" if hip else cuda and f"CUDA {cuda}"
    found = (versions, build, tuple(devices), _driver(), gpu_error, interpreting())
    return Facts(*found, _peft_asked(), _launches_known())


def _launches_known() -> bool:
    """Whether the launch cache knows this Triton; True where the cache cannot be imported."""
    try:
        from ..kernels import launch

        return launch.KNOWN
    except AttributeError:  # a Triton that lacks even what the module imports
        return False
    except (ImportError, ValueError):  # no Triton, or a variable that the trials will report
        return True


def _peft_asked() -> str | None:
    """The oldest PEFT for the transformers that is installed, read from it without importing it."""
    with suppress(ImportError, OSError, ValueError):
        spec = find_spec("transformers")
        for folder in (spec and spec.submodule_search_locations) or ():
            text = Path(folder, "integrations", "peft.py").read_text(encoding="utf-8")
            if found := re.search(r'^MIN_PEFT_VERSION = "([\d.]+)"', text, re.MULTILINE):
                return found[1]
    return None


def _driver() -> str | None:
    """The GPU driver's version, found without torch, whose CPU build sees no driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return f"NVIDIA {answer.stdout.split()[0]}"
    if os.path.exists("/proc/driver/nvidia/version"):
        return "NVIDIA, version unknown"
    return "AMD" if os.path.exists("/dev/kfd") else None


def _first_line(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def try_strategy(strategy: str, device: Device) -> str | None:
    """Run a strategy forward and backward on a tiny ragged layer; None, or what went wrong."""
    dtype = torch.float32 if device.arch == "cpu" else torch.float16
    M, N, K, R = 33, 40, 48, 3
    if refusal := STRATEGIES[strategy].supports(Problem(M, N, K, R, dtype, device.arch)):
        return refusal
    draw = torch.Generator().manual_seed(0)
    shapes = ((M, K), (N, K), (R, K), (N, R), (M, N))
    made = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]
    *exact, exact_dy = (tensor.double() for tensor in made)
    true = [reference.forward(*exact, scale=2.0)]
    true += reference.backward(exact_dy, *exact, scale=2.0)[:3]
    try:
        x, weight, lora_A, lora_B, dy = (tensor.to(device.name) for tensor in made)
        trained = [tensor.requires_grad_() for tensor in (x, lora_A, lora_B)]
        y = lora_linear(x, weight, lora_A, lora_B, scale=2.0, strategy=strategy)
        found = (y, *torch.autograd.grad(y, trained, dy))
    except Exception as raised:  # compilers and drivers raise classes of their own
        return _first_line(raised)
    for name, got, want in zip(("y", "dx", "dlora_A", "dlora_B"), found, true, strict=True):
        error = float((got.detach().cpu().double() - want).norm() / want.norm())
        if not error < 0.02:  # this looks for broken code generation; the tests judge rounding
            return f"computes a wrong {name}: relative error {error:.2g}"
    return None


def examine() -> dict[str, Any]:
    """All that `doctor` reports, as plain data; `usable` is the verdict."""
    facts = gather()
    trials = [
        {"device": device.name, "strategy": strategy, "problem": try_strategy(strategy, device)}
        for device, strategy in product(facts.devices, STRATEGIES)
    ]
    picks = []
    for device, (title, layer), dtype in product(facts.devices, EXAMPLES.items(), EXAMPLE_DTYPES):
        M, (N,), K, R = EXAMPLE_TOKENS, layer.N, layer.K, EXAMPLE_RANK
        problem = Problem.on(torch.device(device.name), M, N, K, R, dtype, dropout=True)
        choice = choose(problem)
        pick = {"device": device.name, "layer": title, "dtype": str(dtype).removeprefix("torch.")}
        pick |= {"problem": str(problem), "strategy": choice.strategy, "reason": choice.reason}
        picks.append(pick)
    needed = {(pick["device"], pick["strategy"]) for pick in picks}
    broken = [
        f"{trial['device']}: auto picks {trial['strategy']}, which does not run there"
        for trial in trials
        if trial["problem"] is not None and (trial["device"], trial["strategy"]) in needed
    ]
    pitfalls = [pitfall for pitfall in PITFALLS if pitfall.found(facts)]
    broken += [pitfall.text for pitfall in pitfalls if pitfall.fatal]
    named = [{"name": pitfall.name, "text": pitfall.text} for pitfall in pitfalls]
    findings = {"usable": not broken, "broken": broken, "pitfalls": named, **asdict(facts)}
    return {**findings, "strategies": trials, "auto": picks}


def render(findings: Mapping[str, Any]) -> str:
    """The findings as a page of text."""
    lines = ["Versions"]
    for name, version in findings["versions"].items():
        lines.append(f"  {name:<13} {version or 'not installed'}")
    lines += ["", "Devices"]
    for device in findings["devices"]:
        memory = f", {device['memory_gib']} GiB" if device["memory_gib"] else ""
        lines.append(f"  {device['name']:<13} {device['model']}, {device['arch']}{memory}")
    lines += [
        f"  torch build   {findings['gpu_build'] or 'CPU only'}",
        f"  GPU driver    {findings['driver'] or 'none found'}",
        f"  interpreter   {'on (TRITON_INTERPRET)' if findings['interpreting'] else 'off'}",
    ]
    if findings["gpu_error"]:
        lines.append(f"  GPU error     {findings['gpu_error']}")
    lines += ["", "Strategies, tried on a tiny layer, forward and backward"]
    for trial in findings["strategies"]:
        verdict = "runs" if trial["problem"] is None else f"no: {trial['problem']}"
        lines.append(f"  {trial['device']:<13} {trial['strategy']:<10} {verdict}")
    lines += ["", f"What auto picks (M = {EXAMPLE_TOKENS}, rank {EXAMPLE_RANK}, dropout on)"]
    for pick in findings["auto"]:
        layer = f"{pick['layer']}, {pick['dtype']}"
        lines.append(f"  {pick['device']:<13} {layer:<36} {pick['strategy']:<10} {pick['reason']}")
    if findings["pitfalls"]:
        lines += ["", "Pitfalls"]
        lines += [f"  {pitfall['name']}: {pitfall['text']}" for pitfall in findings["pitfalls"]]
    lines += ["", "Usable." if findings["usable"] else "Broken: " + "; ".join(findings["broken"])]
    return "\n".join(lines)
