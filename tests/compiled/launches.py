"""A launch of a known signature is the one that Triton would make: kernel, grid, every argument.

Run by test_launch.py. Triton's own dispatch is asked for the kernel of each launch, with a compiler
that compiles nothing and a card that writes down what it is asked to run. Each training step runs
on what was remembered of all steps before, and again with nothing remembered. When the cache is
used, and when not, is the subject of `launch_cache.py`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lora_kernels import kernels
from lora_kernels.algebra.operands import Operands, Settings, Wanted, Weights
from lora_kernels.hardware.tiles import KERNELS, Tile, Tiles
from lora_kernels.kernels import launch, projection
from lora_kernels.strategies.tiled import (
    fused_backward,
    fused_forward,
    hybrid_backward,
    hybrid_forward,
    split_backward,
    split_forward,
)

assert not launch.INTERPRETED


class Compiled:
    """What stands for a compiled kernel."""

    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, source: Any, card: Card) -> None:
        self.names, self.card = source.fn.arg_names, card

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (function, metadata) == (self.function, self.packed_metadata)
        assert stream == f"stream of {self.card.device}"
        hooks = [getattr(hook, "calls", hook) for hook in (enter, leave)]
        self.card.write_down(self, (x, y, z), arguments, "hooked" if any(hooks) else "run")


class Launched(NamedTuple):
    kernel: Compiled
    grid: tuple[int, ...]
    arguments: tuple[str, ...]  # a pointer by the tensor that it points to
    how: str


class Card:
    """A Triton driver; also the allocator, to tell one new tensor from another."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, object()
        self.start()

    def start(self) -> None:
        self.launched: list[Launched] = []
        self.allocated: dict[int, tuple[str, weakref.ref[torch.Tensor]]] = {}
        self.count = itertools.count()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.device

    def get_current_stream(self, device: Any) -> str:
        assert device is self.device
        return f"stream of {device}"

    def empty(self, *shape: int, **options: Any) -> torch.Tensor:
        new = torch.zeros(*shape, **options)
        name = f"new {next(self.count)}: {tuple(new.shape)} {new.dtype}"
        self.allocated[new.data_ptr()] = name, weakref.ref(new)
        return new

    def write_down(self, kernel: Compiled, grid: Any, arguments: Any, how: str) -> None:
        named = [
            repr(self.pointer(each) if "_ptr" in name else each)
            for name, each in zip(kernel.names, arguments, strict=True)
        ]
        self.launched.append(Launched(kernel, tuple(grid), tuple(named), how))

    def pointer(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.pointer(each) for each in value)
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        name, tensor = self.allocated.get(value, (value, lambda: True))
        assert tensor() is not None, f"{name} was freed before the launch that reads it"
        return name


CUDA = GPUTarget("cuda", 86, 32)


@contextmanager
def card(target: GPUTarget = CUDA):
    with pytest.MonkeyPatch.context() as patch:
        active = Card(target)
        patch.setattr(driver, "_active", active)
        patch.setattr("triton.compiler.compile", lambda source, **_: Compiled(source, active))
        patch.setattr(launch, "_STEPS", {})
        yield active


class Step(NamedTuple):
    """A training step; a name in `offset` is a tensor whose address does not divide by 16."""

    M: int = 32
    N: int = 32
    K: int = 48
    R: int = 8
    G: int = 1
    dtype: torch.dtype = torch.float16
    adapters: torch.dtype = torch.float32
    bias: bool = True
    bias_dtype: torch.dtype = torch.float16
    dropout: float = 0.0
    scale: float = 2.0
    conv1d: bool = False
    padding: int = 0  # columns between the rows of x and dy
    offset: frozenset[str] = frozenset()
    strategy: str = "split"
    tile: Tile = Tile(32, 32, 16, 4, 2)
    precision: str = "ieee"
    wanted: Wanted = Wanted(True, True, True)


FORWARD = {"split": split_forward, "fused": fused_forward, "hybrid": hybrid_forward}
BACKWARD = {"split": split_backward, "fused": fused_backward, "hybrid": hybrid_backward}


def tensors(step: Step) -> tuple[torch.Tensor, Operands, tuple[torch.Tensor, ...], Any]:
    def new(name: str, *shape: int, dtype: torch.dtype = step.dtype, padding: int = 0):
        *rows, columns = shape
        start = 1 if name in step.offset else 0
        whole = torch.zeros(*rows, columns + padding + start, dtype=dtype)
        assert whole.data_ptr() % 16 == 0
        return whole.flatten()[start:].as_strided(shape, whole[..., :columns].stride())

    M, N, K, R, G = step[:5]
    layers = [
        Weights(
            new("weight", K, N).T if step.conv1d else new("weight", N, K),
            new("bias", N, dtype=step.bias_dtype) if step.bias else None,
            new("lora_A", R, K, dtype=step.adapters),
            new("lora_B", N, R, dtype=step.adapters),
        )
        for _ in range(G)
    ]
    dy = tuple(new("dy", M, N, padding=step.padding) for _ in range(G))
    seed = torch.zeros(1, dtype=torch.int64) if step.dropout else None
    return new("x", M, K, padding=step.padding), Operands.of(layers), dy, seed


def run(step: Step, made: Any, active: Card) -> list[Launched]:
    """The launches of the step; new tensors are counted from zero."""
    active.start()
    run_step(step, made, active.empty)
    return active.launched


def run_step(step: Step, made: Any, empty: Callable[..., torch.Tensor]) -> None:
    """Forward and backward of the step, with `empty` in the place of torch's."""
    x, operands, dy, seed = made
    settings = Settings(step.scale, step.dropout)
    tiles = Tiles._make([step.tile] * len(KERNELS) + [step.precision])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        done = FORWARD[step.strategy](x, operands, settings, seed, tiles)
        BACKWARD[step.strategy](dy, x, operands, done.h, done.mask, settings, step.wanted, tiles)


def check(step: Step, active: Card) -> None:
    made = tensors(step)
    run(step, made, active)
    remembered = run(step, made, active)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_STEPS", {})
        plain = run(step, made, active)
    assert len(plain) == len(remembered) >= 2
    for ours, theirs in zip(remembered, plain, strict=True):
        assert ours.kernel is theirs.kernel, ours
        assert ours == theirs


BASE = Step()
CHANGES = [
    *({"M": M} for M in (1, 16, 17, 31, 33, 64, 65, 129, 300)),
    *({"N": N} for N in (1, 16, 31, 33)),
    *({"K": K} for K in (1, 16, 47, 56)),
    *({"R": R} for R in (1, 3, 16, 17)),
    {"G": 3}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"adapters": torch.float16},
    {"bias": False}, {"bias_dtype": torch.float32}, {"dropout": 0.1}, {"scale": 1.0}, {"scale": 1},
    {"conv1d": True}, {"padding": 1}, {"padding": 16},
    *({"offset": frozenset([name])} for name in ("x", "weight", "bias", "lora_A", "lora_B", "dy")),
    {"tile": Tile(16, 32, 16, 4, 2)}, {"tile": Tile(32, 16, 16, 4, 2)},
    {"tile": Tile(32, 32, 32, 4, 2)}, {"tile": Tile(32, 32, 16, 8, 2)},
    {"tile": Tile(32, 32, 16, 4, 3)}, {"precision": "tf32"},
    *({"wanted": Wanted(*flags)} for flags in ((True, False, False), (False, True, False),
                                               (False, False, True), (True, True, False))),
    {"strategy": "hybrid"}, {"strategy": "fused"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(map(str, *c.items())))
@pytest.mark.parametrize("strategy", ["split", "fused"])
def test_one_difference_makes_another_signature(strategy, change):
    with card() as active:
        base = BASE._replace(strategy=strategy)
        check(base, active)
        check(base._replace(**change), active)
        check(base, active)


sizes = st.sampled_from([1, 3, 8, 15, 16, 17, 32, 48, 65])
steps = st.builds(
    Step,
    M=sizes, N=sizes, K=sizes, R=st.sampled_from([1, 3, 8, 16]), G=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    adapters=st.sampled_from([torch.float16, torch.float32]),
    bias=st.booleans(), bias_dtype=st.sampled_from([torch.float16, torch.float32]),
    scale=st.sampled_from([1.0, 2.0]), tile=st.just(BASE.tile), wanted=st.just(BASE.wanted),
    precision=st.just("ieee"), dropout=st.sampled_from([0.0, 0.1]), conv1d=st.booleans(),
    padding=st.sampled_from([0, 1, 16]),
    offset=st.frozensets(st.sampled_from(["x", "weight", "bias", "lora_A", "lora_B", "dy"])),
    strategy=st.sampled_from(["split", "fused", "hybrid"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def shared():
    with card() as active:
        yield active


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(step=steps)
def test_no_signature_is_taken_for_another(shared, step):
    check(step, shared)


def test_two_plans_share_no_signature():
    ours = projection._plan

    def theirs(*arguments):
        return ours(*arguments)._replace(grid=(7, 7, 7))

    tensors = torch.zeros(32, 48), (torch.zeros(8, 48),), None, None
    call = tensors, 0.0, BASE.tile, "ieee", 1, None
    with card() as active:
        for plan in (ours, theirs) * 2:
            launch.launch(plan, *call)
        assert [each.grid == (7, 7, 7) for each in active.launched] == [False, True] * 2


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch):
    x, lora_A = torch.zeros(32, 48), (torch.zeros(8, 48),)

    def project(rows: int) -> None:
        kernels.project(x[:rows], lora_A, tile=BASE.tile, precision="ieee", parts=1)

    with card() as active:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="_project is launched for the first time while"):
            project(32)
        assert not active.launched and not launch._STEPS
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        project(32)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        project(32)  # a hit
        project(16)  # a miss of the cache, but no new kernel
        assert len(active.launched) == 3


def test_masks_of_the_library():
    with card() as active:
        t, mask = torch.zeros(17, 24), torch.zeros(17, 3, dtype=torch.uint8)
        seed = torch.zeros(1, dtype=torch.int64)

        def calls():
            active.start()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", active.empty)
                for dropout, each in ((0.1, t), (0.2, t.half()), (0.2, t[:, 1:])):
                    kernels.draw_masks(seed, 1, 17, 24, dropout)
                    kernels.apply_mask(each, mask)
                    kernels.apply_mask(each, mask, onto=each)
            return [(each.kernel, each.grid, each.arguments[-9:]) for each in active.launched]

        first = calls()
        assert [each[:2] for each in calls()] == [each[:2] for each in first]


def test_more_than_two_gigabytes_is_another_kernel_on_amd(monkeypatch):
    monkeypatch.setattr(launch, "_HIP", True)
    lora_A = (torch.empty(8, 48, device="meta"),)
    far = torch.empty((1 << 29) + 48, device="meta")[-48:].view(1, 48)
    near = torch.empty(1, 48, device="meta")
    with card(GPUTarget("hip", "gfx942", 64)) as active:
        for x in (near, far, near, far):
            kernels.project(x, lora_A, tile=BASE.tile, precision="ieee")
        kernel = [each.kernel for each in active.launched]
    assert kernel[0] is kernel[2] is not kernel[1] is kernel[3]
