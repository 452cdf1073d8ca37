"""Which memory the kernels touch: the checks of compute-sanitizer, in Triton's interpreter.

A pointer remembers the argument it was computed from, so every access is held against the very
elements of that tensor: not its storage, nor another tensor that lies behind it. Within a launch
every element of every output is stored once, and loaded by no other program than the one that
stores it: programs run in any order on a GPU. What the compiler makes of a program (its shared
memory, its barriers) is not seen here.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.groups import GroupCase, laid, run, tensors

triton = pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from lora_kernels import kernels
from lora_kernels.algebra.nf4 import BLOCK, NF4
from lora_kernels.algebra.operands import Parts, Settings, Weights
from lora_kernels.autograd.functional import lora_layer
from lora_kernels.autograd.nf4 import nf4_linear
from lora_kernels.hardware.tiles import Tile, tiles_for
from lora_kernels.strategies.table import STRATEGIES

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="watches Triton's interpreter (TRITON_INTERPRET=1)"
)

# kernel -> the arguments that it writes; the others are only read.
OUTPUTS = {
    "_project": ("h_ptr", "mask_ptr"),
    "_low_rank_gemm": ("out_ptrs",),
    "_fused_gemm": ("out_ptrs", "h_ptr"),
    "_column_gradients": ("d_ptr", "dlora_A_ptr", "dlora_B_ptr"),
    "_add_partials": ("out_ptrs",),
    "_draw_masks": ("mask_ptr",),
    "_apply_mask": ("out_ptr",),
    "_row_gains": ("gain_ptr", "length_ptr"),
    "_scale_columns": ("out_ptr",),
    "_scale_columns_backward": ("dp_ptr", "dgain_ptr"),
    "_copy": ("out_ptr",),  # the test's own
    "_count": ("out_ptr",),
}
Program = tuple[int, ...]


class Argument:
    """A tensor that a kernel was given; `addresses` are those of its elements."""

    def __init__(self, name: str, tensor: Tensor, written: bool) -> None:
        self.name, self.tensor, self.written = name, tensor, written
        offsets = np.tensordot(tensor.stride(), np.indices(tensor.shape), 1).ravel()
        self.addresses = tensor.data_ptr() + offsets * tensor.itemsize

    def at(self, address: int) -> str:
        shape, stride = list(self.tensor.shape), list(self.tensor.stride())
        offset = (int(address) - self.tensor.data_ptr()) / self.tensor.itemsize
        return f"{self.name} at offset {offset:g} (shape {shape}, strides {stride})"


class Access(NamedTuple):
    program: Program
    addresses: np.ndarray


class Launch:
    """The accesses of all programs of one launch, and what is wrong with them."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.arguments: dict[int, Argument] = {}
        self.loads: list[Access] = []
        self.stores: list[Access] = []
        self.faults: list[str] = []

    def take(self, given: dict[str, Any]) -> None:
        """Note the tensors among the arguments, and those of tuples by their index."""
        for name, value in given.items():
            named = {name: value}
            if isinstance(value, tuple):
                named = {f"{name}[{i}]": each for i, each in enumerate(value)}
            for full, each in named.items():
                if isinstance(each, Tensor):
                    self.arguments[id(each)] = Argument(full, each, name in OUTPUTS[self.kernel])

    def access(self, verb: str, program: Program, pointers: Any, mask: Any) -> Any:
        """Note an access; gives its mask less the lanes that must not touch memory."""
        argument = pointers.attr.get("argument")
        assert argument, f"{self.kernel} {verb} through a pointer of unknown origin"
        addresses, active = pointers.data.astype(np.int64), mask.data.astype(bool)
        inside = np.isin(addresses, argument.addresses)
        if (outside := addresses[active & ~inside]).size:
            self.fault(f"program {program} {verb} outside of {argument.at(outside[0])}")
        if verb == "stores" and not argument.written:
            self.fault(f"program {program} stores to {argument.name}, which is no output")
            inside[...] = False
        active &= inside
        noted = self.stores if verb == "stores" else self.loads
        noted.append(Access(program, addresses[active]))
        return interpreter.TensorHandle(active, tl.int1)

    def fault(self, message: str) -> None:
        self.faults.append(f"{self.kernel}: {message}")

    def close(self) -> None:
        """AssertionError with all faults; of the elements that share one, the first is named."""
        stored, writers = _joined(self.stores)
        order = np.argsort(stored, kind="stable")
        stored, writers = stored[order], writers[order]
        for i in np.flatnonzero(stored[1:] == stored[:-1])[:1]:
            both = f"{_program(writers[i])} and {_program(writers[i + 1])}"
            self.fault(f"programs {both} store {self.output_at(stored[i])}")
        for argument in self.arguments.values():
            if argument.written:
                for address in np.setdiff1d(argument.addresses, stored)[:1]:
                    self.fault(f"no program stores {argument.at(address)}")
        loaded, readers = _joined(self.loads)
        of_output = np.isin(loaded, stored)
        loaded, readers = loaded[of_output], readers[of_output]
        writers = writers[np.searchsorted(stored, loaded)]
        for i in np.flatnonzero((readers != writers).any(axis=1))[:1]:
            reader, writer = _program(readers[i]), _program(writers[i])
            self.fault(f"program {reader} loads what {writer} stores: {self.output_at(loaded[i])}")
        if self.faults:
            raise AssertionError("\n".join(self.faults))

    def output_at(self, address: int) -> str:
        every = self.arguments.values()
        return next(a.at(address) for a in every if a.written and address in a.addresses)


def _joined(accesses: list[Access]) -> tuple[np.ndarray, np.ndarray]:
    """The addresses of all accesses, and the program of each address."""
    none = Access((0, 0, 0), np.empty(0, np.int64))
    programs, addresses = zip(none, *accesses, strict=True)
    return np.concatenate(addresses), np.repeat(programs, [each.size for each in addresses], axis=0)


def _program(index: np.ndarray) -> Program:
    return tuple(index.tolist())


class Watch:
    """Stands in for parts of the interpreter, and hands each launch what it notes."""

    def __init__(self, monkeypatch) -> None:
        self.launches: list[Launch] = []
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        replaced = [
            (executor, "__call__", self.launch),
            (executor, "_init_args_hst", self.arguments),
            (interpreter, "_implicit_cvt", self.pointer),
            (builder, "create_masked_load", self.load),
            (builder, "create_masked_store", self.store),
            (builder, "create_atomic_rmw", self.atomic),
            (builder, "create_atomic_cas", self.atomic),
        ]
        arithmetic = ("addptr", "splat", "broadcast", "expand_dims")
        replaced += [(builder, f"create_{name}", self.computed) for name in arithmetic]
        for owner, name, method in replaced:
            partial = functools.partial(method, getattr(owner, name))
            monkeypatch.setattr(owner, name, lambda *a, partial=partial, **k: partial(*a, **k))

    @property
    def kernels(self) -> set[str]:
        return {launch.kernel for launch in self.launches}

    def launch(self, original, executor, *args, **kwargs):
        self.launches.append(Launch(executor.fn.__name__))
        original(executor, *args, **kwargs)
        self.launches[-1].close()

    def arguments(self, original, executor, args, kwargs):
        """The interpreter makes tensors of its own, of the same memory: those are noted."""
        host_args, host_kwargs = original(executor, args, kwargs)
        self.launches[-1].take(inspect.getcallargs(executor.fn, *host_args, **host_kwargs))
        return host_args, host_kwargs

    def pointer(self, original, argument):
        value = original(argument)
        if isinstance(argument, Tensor):
            value.handle.set_attr("argument", self.launches[-1].arguments[id(argument)])
        return value

    def computed(self, original, builder, *operands):
        """A pointer computed from another is one into the same argument."""
        value = original(builder, *operands)
        for each in operands:
            if "argument" in getattr(each, "attr", ()):
                value.set_attr("argument", each.attr["argument"])
        return value

    def load(self, original, builder, pointers, mask, *rest):
        allowed = self.launches[-1].access("loads", builder.grid_idx, pointers, mask)
        return original(builder, pointers, allowed, *rest)

    def store(self, original, builder, pointers, value, mask, *rest):
        allowed = self.launches[-1].access("stores", builder.grid_idx, pointers, mask)
        return original(builder, pointers, value, allowed, *rest)

    def atomic(self, original, builder, *operands):
        raise AssertionError(f"{self.launches[-1].kernel} takes an atomic operation")


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Checks every launch of a test."""
    return Watch(monkeypatch)


GRADIENTS = {"_column_gradients", "_add_partials"}
STRATEGY_NAMES = ("split", "fused", "hybrid")


def launched(case: GroupCase, strategy: str) -> set[str]:
    """The kernels of a step."""
    if strategy != "fused":
        return {"_project", "_low_rank_gemm"} | GRADIENTS
    dx = case.wanted is None or "x" in case.wanted
    forward = {"_project", "_low_rank_gemm"} if case.dropout else {"_fused_gemm"}
    return forward | GRADIENTS | ({"_fused_gemm"} if dx else set())


HALF = torch.float16
CASES = {
    "one-of-everything": GroupCase(1, (1,), 1, 1),
    "one-row": GroupCase(1, (45,), 70, 3, HALF, dropout=0.25, bias=False, dy=("scalar",)),
    "full-tiles": GroupCase(64, (32, 64), 64, 16, HALF, HALF, bias=False),
    "ragged": GroupCase(37, (45,), 70, 33, dropout=0.25, dy=("columns",)),
    "two-bands-of-rows": GroupCase(
        270, (33, 5), 40, 1, HALF, x="transposed", dy=("transposed", "transposed")
    ),
    "group": GroupCase(
        37, (40, 33, 70), 45, 3, HALF, dropout=0.25, x="slice", weight="slice", lora="rows",
        dy=("slice", "columns", "row"),
    ),
    "group-of-conv1d": GroupCase(
        33, (32, 5), 13, 16, dropout=0.25, x="columns", weight="transposed", lora="transposed"
    ),
    "frozen-x": GroupCase(37, (45,), 40, 3, wanted=frozenset(("lora_A", "lora_B"))),
    "frozen-lora_A": GroupCase(33, (45, 9), 31, 3, HALF, wanted=frozenset(("x", "lora_B"))),
    "frozen-lora_B": GroupCase(33, (45, 9), 31, 3, wanted=frozenset(("x", "lora_A"))),
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_touches_what_it_was_given(watch, strategy, case):
    run(tensors(case, 0, whole=False), case, strategy)
    assert watch.kernels == launched(case, strategy)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_step_with_the_tiles_of_a_card(watch, monkeypatch, strategy):
    case = GroupCase(150, (140, 33), 72, 33, HALF, dropout=0.25)
    tiles = tiles_for("sm_90", HALF.itemsize, case.R, tf32=False)
    monkeypatch.setattr(
        "lora_kernels.autograd.functional.decide", lambda *_: (STRATEGIES[strategy], tiles)
    )
    run(tensors(case, 0, whole=False), case, strategy)
    assert watch.kernels == launched(case, strategy)


@pytest.mark.parametrize("strategy", ["split", "hybrid"])
@pytest.mark.parametrize(
    ("columns", "N", "dropout"),
    [(((3, 40), (50, 83)), 90, 0.25), (((0, 1), (1, 33)), 33, 0.0)],
    ids=["gaps", "side-by-side"],
)
def test_ranges_of_columns(watch, strategy, columns, N, dropout):
    M, K, R = 37, 45, 3
    x, weight, bias = torch.randn(M, K), laid(torch.randn(N, K), "rows"), torch.randn(N)
    lora_A = torch.randn(len(columns) * R, K)
    lora_B = torch.randn(sum(stop - start for start, stop in columns), R)
    leaves = [each.requires_grad_() for each in (x, lora_A, lora_B)]
    settings = Settings(0.5, dropout, strategy, columns)
    y = lora_layer(x, Parts(Weights(weight, bias, lora_A, lora_B), settings))
    torch.autograd.grad(y, leaves, laid(torch.randn(M, N), "slice"))
    assert watch.kernels == {"_project", "_low_rank_gemm"} | GRADIENTS


@pytest.mark.parametrize(("M", "N", "K"), [(37, 45, 64), (150, 140, 192)], ids=str)
@pytest.mark.parametrize("card", ["cpu", "sm_90", "wide"])
def test_a_weight_in_nf4(watch, M, N, K, card):
    weight = NF4(
        torch.randint(0, 256, (N, K // 2), dtype=torch.uint8),
        torch.rand(N, K // BLOCK),
        torch.linspace(-1, 1, 16),
    )
    x, lora_A, lora_B = torch.randn(M, K).half(), torch.randn(3, K), torch.randn(N, 3)
    leaves = [each.requires_grad_() for each in (x, lora_A, lora_B)]
    tiles = tiles_for(card, 2, 3, tf32=False, nf4=True)
    if card == "wide":  # a tile of dx holds two blocks of a row
        tiles = tiles._replace(low_rank_gemm_dx=Tile(32, 128, 32, 1, 1), precision="ieee")
    chosen = STRATEGIES["split"], tiles
    settings = Settings(0.5, 0.25, "split")
    y = nf4_linear(
        x, weight.packed, lambda _: weight, torch.randn(N), lora_A, lora_B, settings, chosen
    )
    torch.autograd.grad(y, leaves, torch.randn(M, N).half())
    assert watch.kernels == {"_project", "_low_rank_gemm"} | GRADIENTS


@pytest.mark.parametrize(("M", "K"), [(1, 1), (37, 530)], ids=["one", "ragged"])
@pytest.mark.parametrize("view", ["plain", "transposed", "slice"])
def test_masks(watch, M, K, view):
    mask = kernels.draw_masks(torch.tensor([7]), 3, M, K, 0.25)
    t = laid(torch.randn(M, K), view)
    kernels.apply_mask(t, mask[1])
    kernels.apply_mask(t.half(), mask[2], onto=laid(torch.zeros(M, K).half(), "slice"))
    assert watch.kernels == {"_draw_masks", "_apply_mask"}


@pytest.mark.parametrize(("M", "N", "K", "R"), [(1, 1, 1, 1), (70, 131, 70, 19)], ids=str)
@pytest.mark.parametrize("view", ["plain", "transposed", "slice"])
def test_gains(watch, M, N, K, R, view):
    weight, lora_A, lora_B, dy = (
        laid(torch.randn(shape), view) for shape in ((N, K), (R, K), (N, R), (M, N))
    )
    gain, _ = kernels.row_gains(weight, lora_A, lora_B, torch.randn(N), 0.5, precision="ieee")
    p = torch.randn(M, N)
    for bias in (None, torch.randn(N)):
        kernels.scale_columns(p, gain, bias)
    kernels.scale_columns_backward(dy, p, gain)
    assert watch.kernels == {"_row_gains", "_scale_columns", "_scale_columns_backward"}


@triton.jit
def _copy(x_ptrs, out_ptr, readable, writable, ahead, step, BLOCK: tl.constexpr):
    index = tl.program_id(0) * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptrs[0] + index + ahead, mask=index < readable, other=0.0)
    tl.store(out_ptr + index, x, mask=index < writable)


def copy(into="out", readable=12, writable=12, ahead=0, step=8, source="x"):
    """Two programs of eight lanes copy twelve numbers; around them lies more of one storage."""
    memory = torch.zeros(48)
    places = {"x": memory[8:20], "out": memory[20:32], "strided": memory[20:44:2]}
    _copy[(2,)]((places[source],), places[into], readable, writable, ahead, step, BLOCK=8)


VIEW = "(shape [12], strides [1])"
FAULTS = {
    "loads-past-the-end": (
        {"readable": 13},
        f"program (1, 0, 0) loads outside of x_ptrs[0] at offset 12 {VIEW}",
    ),
    "loads-before-the-start": (
        {"ahead": -1},
        f"program (0, 0, 0) loads outside of x_ptrs[0] at offset -1 {VIEW}",
    ),
    "stores-past-the-end": (
        {"writable": 13},
        f"program (1, 0, 0) stores outside of out_ptr at offset 12 {VIEW}",
    ),
    "stores-between-elements": (
        {"into": "strided"},
        "program (0, 0, 0) stores outside of out_ptr at offset 1 (shape [12], strides [2])",
    ),
    "stores-twice": (
        {"step": 4},
        f"programs (0, 0, 0) and (1, 0, 0) store out_ptr at offset 4 {VIEW}",
    ),
    "leaves-one-out": ({"writable": 11}, f"no program stores out_ptr at offset 11 {VIEW}"),
    "loads-what-another-stores": (
        {"source": "out", "ahead": 1, "readable": 11},
        f"program (0, 0, 0) loads what (1, 0, 0) stores: out_ptr at offset 8 {VIEW}",
    ),
}


def test_a_sound_launch_passes(watch):
    copy()
    copy(source="out")  # each program what it stores itself
    assert watch.kernels == {"_copy"}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported(watch, fault, message):
    with pytest.raises(AssertionError) as raised:
        copy(**fault)
    assert str(raised.value).splitlines()[0] == f"_copy: {message}"


def test_a_store_to_an_input_is_reported(watch, monkeypatch):
    monkeypatch.setitem(OUTPUTS, "_copy", ())
    with pytest.raises(AssertionError, match=r"_copy: .* stores to out_ptr, which is no output"):
        copy()


@triton.jit
def _count(out_ptr):
    tl.atomic_add(out_ptr, 1)


def test_an_atomic_operation_is_reported(watch):
    with pytest.raises(interpreter.InterpreterError, match="_count takes an atomic operation"):
        _count[(2,)](torch.zeros(1, dtype=torch.int32))
