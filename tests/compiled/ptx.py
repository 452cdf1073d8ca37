"""A machine that runs a kernel's PTX on the host, and refuses what a GPU would let pass.

All threads of a program step together, one NumPy operation an instruction, so a branch must go one
way for all (Triton's do). What runs side by side on a GPU is watched instead of played:

    shared memory   a byte read or overwritten without a barrier after another warp touched it, read
                    before anyone wrote it, or touched while an asynchronous copy to it is under way
                    (such a copy arrives as late as it may: when its thread waits for it)
    global memory   an access outside the tensors that the kernel was given, or not aligned to its
                    own width

Instructions are those that Triton emits for A100, RTX 30, 40, 50 and for Hopper (whose wgmma reads
shared memory and writes registers until it is waited for). Source: NVIDIA, PTX ISA 9.0, sections
5.1 (state spaces) and 9.7 (instructions, fragments of matrices, matrix descriptors).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from tests.compiled.ptx_matrices import MATRICES, Products, vector
from tests.compiled.ptx_memory import Array, Fault, Memory, Shared
from tests.compiled.ptx_numbers import (
    ARITHMETIC,
    COMPARE,
    TYPES,
    extract,
    from_bf16,
    permute,
    to_bf16,
)

Statement = tuple[str, str, list[str]]  # guard ("", "p1", "!p1"), operation, operands


class Program(NamedTuple):
    """A kernel: its statements, labels (places), parameters (offset, type) and threads."""

    name: str
    statements: list[Statement]
    labels: dict[str, int]
    parameters: dict[str, tuple[int, str]]
    threads: int


_STATEMENT = re.compile(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_SIZES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def parse(text: str) -> Program:
    """A kernel from Triton's PTX, which holds one."""
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.entry (\w+)\((.*?)\)", text, re.DOTALL)
    threads = re.search(r"\.reqntid (\d+)", text)
    assert head and threads
    parameters, offset = {}, 0
    for kind, name in re.findall(r"\.param \.(\w+)[^,\n]*?(\w+),?\s*(?:\n|$)", head[2]):
        size = _bits(kind) // 8
        offset = -(-offset // size) * size
        parameters[name] = offset, kind
        offset += size
    body = text[head.end() :]
    body = body[body.index("{") + 1 :].split(".section")[0].rpartition("}")[0]
    body = re.sub(r"\.(loc|file|pragma)[^\n]*", "", body)
    statements: list[Statement] = []
    labels = {}
    for piece in map(str.strip, re.split(r";|(?<=:)\n", body)):
        while label := re.match(r"(\$\w+):\s*", piece):
            labels[label[1]] = len(statements)
            piece = piece[label.end() :]
        if not piece or piece.startswith(".reg"):
            continue
        found = _STATEMENT.fullmatch(piece)
        if not found:
            raise Fault(f"not understood: {piece}")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
        guard = f"{found[1]}{found[2]}" if found[2] else ""
        statements.append((guard, found[3], [each.strip() for each in operands]))
    return Program(head[1], statements, labels, parameters, int(threads[1]))


class Machine:
    """One program: all its threads, at the statement where they are."""

    def __init__(
        self, code: Program, place: tuple[int, ...], grid: tuple[int, ...], parameters: Array,
        shared: int, memory: Memory,
    ) -> None:  # fmt: skip
        T = code.threads
        self.code, self.memory, self.parameters, self.T = code, memory, parameters, T
        self.lanes = np.arange(T)
        self.registers: dict[str, Array] = {}
        self.garbage = np.full(T, 0xDEADBEEFDEADBEEF, np.uint64)  # what no statement has written
        self.shared = Shared(shared, self.lanes // 32)
        self.products = Products(self)
        self.special = {"%tid.x": self.lanes.astype(np.uint32), "%laneid": self.lanes % 32}
        for axis, at, count in zip("xyz", place, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(T, at, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(T, count, np.uint32)
        self.symbols = {"global_smem": 0, **{n: at for n, (at, _) in code.parameters.items()}}

    def run(self) -> None:
        at, statements = 0, self.code.statements
        while at < len(statements):
            guard, operation, operands = statements[at]
            try:
                jump = self._step(guard, operation, operands)
            except (Fault, KeyError, ValueError) as error:
                words = f"{self.code.name}: {operation} {', '.join(operands)}: {error!r}"
                raise Fault(words) from error
            if jump == "ret":
                return
            at = self.code.labels[jump] if jump else at + 1

    def _guarded(self, guard: str) -> Array | None:
        if not guard:
            return None
        flag = self.registers[guard.lstrip("!")]
        return ~flag if guard.startswith("!") else flag

    def read(self, operand: str, kind: str) -> Array:
        """An operand of every thread, as numbers of a type."""
        dtype = np.dtype(TYPES[kind])
        if operand in self.special:
            value = self.special[operand]
        elif operand.startswith("%"):
            value = self.registers.get(operand[1:], self.garbage)
        elif operand.startswith("0f"):
            value = np.full(self.T, int(operand[2:], 16), np.uint32)
        elif operand in self.symbols:
            value = np.full(self.T, self.symbols[operand], np.uint64)
        else:
            whole = int(operand.rstrip("U"), 0) & (256**dtype.itemsize - 1)
            value = np.full(self.T, whole, np.uint64)
        if value.dtype.itemsize != dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        return from_bf16(value) if kind == "bf16" else value.view(dtype)

    def flag(self, operand: str) -> Array:
        negated = operand.startswith("!")
        value = self.registers[operand.lstrip("!%")]
        return ~value if negated else value

    def write(self, operand: str, value: Array, where: Array | None) -> None:
        """Bits into a register of every thread, or of those `where` the guard holds.

        A wider register is filled up by the sign of a signed value, by zeros else.
        """
        if operand == "_":
            return
        name = operand[1:]
        if value.dtype != bool:
            bits = {"s": 16, "d": 64}.get(name.lstrip("r")[:1], 32)
            if value.dtype.kind != "i":
                value = value.view(f"u{value.dtype.itemsize}")
            value = value.astype(f"{value.dtype.kind}{bits // 8}").view(f"u{bits // 8}")
        if where is not None and not where.all():
            value = np.where(where, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def _step(self, guard: str, operation: str, operands: list[str]) -> str | None:
        name, *kinds = operation.split(".")
        where = self._guarded(guard)
        if name == "bra":
            if where is not None and where.any() != where.all():
                raise Fault("threads of one program go different ways")
            return operands[0] if where is None or where.all() else None
        if name == "ret":
            return "ret"
        if name in MATRICES:
            MATRICES[name](self, kinds, operands)
        else:
            getattr(self, f"_{name}", self._compute)(name, kinds, operands, where)
        return None

    # ------------------------------------------------------------ arithmetic
    def _compute(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        kind, (target, *sources) = kinds[-1], operands
        if kind == "pred":
            flags = [self.flag(each) for each in sources]
            return self.write(target, ARITHMETIC[name](*flags), where)
        if kind == "f32x2":  # two numbers in a register
            values = [self.read(each, "b64").view(np.float32) for each in sources]
            return self.write(target, ARITHMETIC[name](*values).view(np.uint64), where)
        if "wide" in kinds:
            values = [
                self.read(each, kind).astype(f"{kind[0].replace('s', 'i')}8")
                for each in sources[:2]
            ]
            wide = kind[0] + "64"
            values += [self.read(each, wide) for each in sources[2:]]
        elif "hi" in kinds:
            first, second = (self.read(each, kind).astype(np.uint64) for each in sources)
            return self.write(target, ((first * second) >> np.uint64(32)).astype(np.uint32), where)
        elif "f32" in kinds and kind != "f32":  # the last number is wide, the others are narrow
            values = [self.read(each, kind).astype(np.float32) for each in sources[:-1]]
            values.append(self.read(sources[-1], "f32"))
        elif name in ("shl", "shr"):
            values = [self.read(sources[0], kind), self.read(sources[1], "u32")]
        else:
            values = [self.read(each, kind) for each in sources]
        self.write(target, ARITHMETIC[name](*values), where)

    def _mov(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        target, source = operands
        kind = kinds[-1]
        if kind == "pred":
            known = source.startswith("%")
            flags = self.flag(source) if known else np.full(self.T, bool(int(source, 0)))
            self.write(target, flags, where)
        elif target.startswith("{"):
            parts = vector(target)
            each = f"u{_bits(kind) // 8 // len(parts)}"
            split = self.read(source, kind).view(each).reshape(self.T, len(parts))
            for i, part in enumerate(parts):
                self.write(part, split[:, i].copy(), where)
        elif source.startswith("{"):
            parts = vector(source)
            half = f"b{_bits(kind) // len(parts)}"
            joined = np.stack([self.read(part, half) for part in parts], 1)
            self.write(target, joined.view(f"u{_bits(kind) // 8}")[:, 0], where)
        else:
            self.write(target, self.read(source, kind), where)

    def _setp(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        target, first, second = operands
        values = self.read(first, kinds[-1]), self.read(second, kinds[-1])
        self.write(target, COMPARE[kinds[0]](*values), where)

    def _selp(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        target, yes, no, flag = operands
        values = self.read(yes, kinds[-1]), self.read(no, kinds[-1])
        self.write(target, np.where(self.flag(flag), *values), where)

    def _cvt(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        *_, to, of = kinds
        values = [self.read(source, of) for source in operands[1:]]
        if to.endswith("x2"):
            values.reverse()  # the first source is the upper half
        if to.startswith("bf16"):
            halves = [to_bf16(value) for value in values]
        else:
            with np.errstate(over="ignore"):
                halves = [value.astype(TYPES[to.removesuffix("x2")]) for value in values]
        if to.endswith("x2"):
            self.write(operands[0], np.stack(halves, 1).view(np.uint32)[:, 0], where)
        else:
            self.write(operands[0], halves[0], where)

    def _prmt(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        self.write(operands[0], permute(*(self.read(each, "b32") for each in operands[1:])), where)

    def _bfe(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        values = [self.read(each, "u32") for each in operands[1:]]
        self.write(operands[0], extract(*values, signed=kinds[-1] == "s32"), where)

    def _shfl(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        target, source, which, *_ = operands
        at, which = self.lanes % 32, self.read(which, "u32") % 32
        lane = {"idx": which, "bfly": at ^ which}[kinds[1]]
        from_lane = self.lanes // 32 * 32 + lane
        self.write(target, self.read(source, "b32")[from_lane], where)

    # ------------------------------------------------------------ memory
    def address(self, operand: str, kind: str) -> Array:
        """Base and offset of [base + offset]."""
        base, _, offset = operand.strip("[] ").partition("+")
        address = self.read(base.strip(), kind)
        return address + address.dtype.type(int(offset, 0)) if offset else address

    def _ld(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        space, size = kinds[0], _SIZES[kinds[-1].replace("u", "b").replace("f", "b")]
        targets = vector(operands[0])
        width = size * len(targets)
        lanes = self.lanes if where is None else self.lanes[where]
        data = np.zeros((self.T, width), np.uint8)
        if space == "param":
            at = self.address(operands[1], "u64").astype(np.int64)
            data = self.parameters[at[:, None] + np.arange(width)]
        elif space == "shared":
            data[lanes] = self.shared.load(self.address(operands[1], "u32")[lanes], width, lanes)
        else:
            for source, found, places in self.memory.at(
                self.address(operands[1], "u64")[lanes], width
            ):
                data[lanes[found]] = source[places]
        values = data.view(f"u{size}")
        for i, target in enumerate(targets):
            self.write(target, values[:, i].copy(), where)

    def _st(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        sources = vector(operands[1])
        lanes = self.lanes if where is None else self.lanes[where]
        kind = kinds[-1].replace("u", "b").replace("f", "b")
        data = np.stack([self.read(each, kind) for each in sources], 1).view(np.uint8)[lanes]
        if kinds[0] == "shared":
            self.shared.store(self.address(operands[0], "u32")[lanes], data, lanes)
            return
        address = self.address(operands[0], "u64")[lanes]
        for target, found, places in self.memory.at(address, data.shape[1]):
            target[places] = data[found]
            if (target[places] != data[found]).any():
                raise Fault("two threads write different values to one address")

    def _cp(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        if "commit_group" in kinds:
            return self.shared.commit()
        if "wait_group" in kinds:
            return self.shared.wait(int(operands[0], 0))
        lanes = self.lanes if where is None else self.lanes[where]
        width = int(operands[2], 0)
        data = np.zeros((len(lanes), width), np.uint8)
        taken = np.full(len(lanes), width)  # bytes read; the others are zero
        if len(operands) > 3:
            taken = self.read(operands[3], "u32")[lanes].astype(int)
        if not np.isin(taken, (0, width)).all():
            raise Fault("a copy of a part of its width")
        source = self.address(operands[1], "u64")[lanes]
        for values, found, places in self.memory.at(source[taken > 0], width):
            data[np.nonzero(taken)[0][found]] = values[places]
        self.shared.copy_later(self.address(operands[0], "u32")[lanes], data, lanes)
        return None

    def _fence(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        """Orders a thread's own accesses, which are in order here."""

    def _bar(self, name: str, kinds: list[str], operands: list[str], where: Any) -> None:
        if "warp" not in kinds:
            self.shared.epoch += 1


def launch(
    code: Program, grid: tuple[int, int, int], arguments: list[Any], shared: int, memory: Memory
) -> None:
    """Run every program of a grid; `arguments` are numbers, and pointers as addresses."""
    parameters = np.zeros(sum(8 for _ in code.parameters), np.uint8)
    for (at, kind), value in zip(code.parameters.values(), arguments, strict=True):
        dtype = np.dtype(TYPES[kind])
        whole = value if dtype.kind == "f" else int(value) & (256**dtype.itemsize - 1)
        parameters[at : at + dtype.itemsize] = np.array([whole], dtype).view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    Machine(code, (x, y, z), grid, parameters, shared, memory).run()
