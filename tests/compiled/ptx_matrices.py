"""Instructions of a warp or of four: matrices in shared memory and their products (ptx.py)."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.compiled.ptx_memory import Array, Fault
from tests.compiled.ptx_numbers import from_bf16

LANE = np.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4  # a thread holds row GROUP of a fragment, columns around QUAD


@cache
def vector(operand: str) -> list[str]:
    """The registers between braces, or the only one."""
    return [each.strip() for each in operand.strip("{} ").split(",")]


def ldmatrix(machine: Any, kinds: list[str], operands: list[str]) -> None:
    """Thread l gives row l % 8 of matrix l // 8, and gets two of the eight of row l // 4."""
    targets, address = vector(operands[0]), machine.address(operands[1], "u32")
    count = len(targets)
    givers = machine.lanes[machine.lanes % 32 < 8 * count]
    rows = machine.shared.load(address[givers], 16, givers).view(np.uint16)
    matrices = rows.reshape(-1, count, 8, 8)
    if "trans" in kinds:
        matrices = matrices.swapaxes(2, 3)
    held = matrices.reshape(-1, count, 32, 2)  # thread l: elements 2l and 2l + 1
    for i, target in enumerate(targets):
        pairs = np.ascontiguousarray(held[:, i]).view(np.uint32)
        machine.write(target, pairs.reshape(machine.T), None)


def stmatrix(machine: Any, kinds: list[str], operands: list[str]) -> None:
    """The way back."""
    sources, address = vector(operands[1]), machine.address(operands[0], "u32")
    count = len(sources)
    held = np.stack([machine.read(each, "b32") for each in sources], 1).view(np.uint16)
    matrices = held.reshape(-1, 32, count, 2).swapaxes(1, 2).reshape(-1, count, 8, 8)
    if "trans" in kinds:
        matrices = matrices.swapaxes(2, 3)
    givers = machine.lanes[machine.lanes % 32 < 8 * count]
    rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
    machine.shared.store(address[givers], rows, givers)


def _numbers(bits: Array, kind: str) -> Array:
    """The numbers in the last axis of 32-bit registers."""
    if kind == "tf32":
        return (bits & 0xFFFFE000).view(np.float32)  # ten bits of mantissa are looked at
    if kind == "bf16":
        return from_bf16(np.ascontiguousarray(bits).view(np.uint16))
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def _left(machine: Any, registers: list[str], kind: str) -> Array:
    """A [warps, 16, k] of four registers a thread."""
    bits = np.stack([machine.read(each, "b32") for each in registers], 1)
    a = _numbers(bits, kind).reshape(machine.T // 32, 32, 2, 2, -1)  # half of k, of the rows
    each = a.shape[4]
    A = np.zeros((len(a), 16, 4 * each * 2), np.float32)
    for half, low, i in np.ndindex(2, 2, each):
        A[:, GROUP + 8 * low, QUAD * each + i + half * 4 * each] = a[:, LANE, half, low, i]
    return A


def _right(machine: Any, registers: list[str], kind: str) -> Array:
    """B [warps, k, 8] of two registers a thread."""
    bits = np.stack([machine.read(each, "b32") for each in registers], 1)
    b = _numbers(bits, kind).reshape(machine.T // 32, 32, 2, -1)
    each = b.shape[3]
    B = np.zeros((len(b), 4 * each * 2, 8), np.float32)
    for half, i in np.ndindex(2, each):
        B[:, QUAD * each + i + half * 4 * each, GROUP] = b[:, LANE, half, i]
    return B


def _accumulator(values: Array) -> Array:
    """C [warps, 16, n] of n / 2 registers a thread, as [warps, 32, n / 2]."""
    C = np.zeros((len(values), 16, values.shape[2] * 2), np.float32)
    for place in range(values.shape[2]):
        block, low, i = place // 4, place // 2 % 2, place % 2
        C[:, GROUP + 8 * low, block * 8 + QUAD * 2 + i] = values[:, LANE, place]
    return C


def _registers(C: Array) -> Array:
    """The way back: [registers, threads]."""
    count = C.shape[2] // 2
    places = [(place // 4, place // 2 % 2, place % 2) for place in range(count)]
    values = [C[:, GROUP + 8 * low, b * 8 + QUAD * 2 + i].reshape(-1) for b, low, i in places]
    return np.stack(values).astype(np.float32)


def mma(machine: Any, kinds: list[str], operands: list[str]) -> None:
    """D [16, 8] = A [16, k] B [k, 8] + C, of each warp."""
    targets, *sources = (vector(each) for each in operands)
    A, B = _left(machine, sources[0], kinds[-2]), _right(machine, sources[1], kinds[-2])
    held = np.stack([machine.read(each, "f32") for each in sources[2]], 1)
    D = A @ B + _accumulator(held.reshape(-1, 32, len(targets)))
    for target, value in zip(targets, _registers(D), strict=True):
        machine.write(target, value, None)


class _Group(NamedTuple):
    registers: dict[str, Array]
    places: list[Array]


class Products:
    """The wgmmas under way: what they read may not change, what they write is not there yet."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.open = _Group({}, [])
        self.groups: list[_Group] = []

    def value(self, operand: str) -> Array:
        """A register as the next product in line sees it."""
        for group in reversed([*self.groups, self.open]):
            if operand in group.registers:
                return group.registers[operand]
        return self.machine.read(operand, "f32")

    def issue(self, registers: dict[str, Array], places: list[Array]) -> None:
        self.open.registers.update(registers)
        for each in places:
            self.machine.shared.in_use[each] += 1
        self.open.places.extend(places)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = _Group({}, [])

    def wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            group = self.groups.pop(0)
            for name, value in group.registers.items():
                self.machine.write(name, value, None)
            for each in group.places:
                self.machine.shared.in_use[each] -= 1


# swizzle mode of a descriptor -> bytes of a row of the pattern
_PATTERN = {1: 128, 2: 64, 3: 32}


def _described(machine: Any, descriptor: int, rows: int, k: int, across: bool, kind: str) -> Any:
    """(numbers [rows, k], places) of a matrix in shared memory; `across`: k is the slow axis.

    A pattern is eight lines of 128, 64 or 32 bytes, whose 16-byte pieces are permuted by the
    number of the line. Along the line it goes on at the leading offset, over lines at the stride.
    """
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    width = _PATTERN.get(descriptor >> 62)
    if width is None or (descriptor >> 49) & 7:
        raise Fault(f"a matrix descriptor of another kind: {descriptor:#x}")
    size = 4 if kind == "tf32" else 2
    row, depth = np.arange(rows)[:, None], np.arange(k)[None, :]
    line, along = (depth, row * size) if across else (row, depth * size)
    if not across and k * size > width:
        raise Fault("a product deeper than the pattern")
    logical = start + line // 8 * stride + line % 8 * width + along // width * leading
    logical = logical + along % width
    places = logical ^ ((logical >> 7 & (width // 16 - 1)) << 4)
    flat = places[:, :, None] + np.arange(size)
    return _numbers(machine.shared.peek(flat).view(f"u{size}")[..., 0], kind), flat


def wgmma(machine: Any, kinds: list[str], operands: list[str]) -> None:
    """D [64, n] = A [64, k] B [k, n] (+ D) of four warps at a time, under way until waited for."""
    if kinds[0] != "mma_async":
        if kinds[0] == "commit_group":
            machine.products.commit()
        elif kinds[0] == "wait_group":
            machine.products.wait(int(operands[0], 0))
        return
    n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", kinds[3]).groups())  # type: ignore[union-attr]
    kind, targets = kinds[-1], vector(operands[0])
    a, b, add, _, _, *across = operands[1:]
    across = [int(each) for each in across] if across else [0, 0]
    if len(across) == 1:  # A from registers lies one way
        across = [0, *across]
    adding = machine.flag(add).all() if add.startswith("%p") else bool(int(add))
    warps, places = machine.T // 32, []
    held = np.stack([machine.products.value(each) for each in targets], 1)
    C = _accumulator(held.reshape(warps, 32, len(targets))) if adding else 0
    A = np.zeros((warps, 16, k), np.float32)
    B = np.zeros((warps, k, n), np.float32)
    if a.startswith("{"):
        A = _left(machine, vector(a), kind)
    for first in range(0, warps, 4):
        here = slice(first, first + 4)
        if not a.startswith("{"):
            described = int(machine.read(a, "b64")[first * 32])
            whole, used = _described(machine, described, 64, k, bool(across[0]), kind)
            A[here] = whole.reshape(4, 16, k)
            places.append(used)
        described = int(machine.read(b, "b64")[first * 32])
        whole, used = _described(machine, described, n, k, bool(across[1]), kind)
        B[here] = whole.T
        places.append(used)
    D = _registers(A @ B + C)
    machine.products.issue(dict(zip(targets, D, strict=True)), places)


MATRICES = {"ldmatrix": ldmatrix, "stmatrix": stmatrix, "mma": mma, "wgmma": wgmma}
