"""Compile every kernel for cards that are not there, and read what the compiler made of them.

The strategies run unchanged on tensors of the "meta" device, under a Triton driver that poses as
the card and launches nothing. So the report is of the kernels that a training step on that card
would run: shipped tiles, real strides, real flags. The cuobjdump and nvdisasm of the Triton wheel
read registers, spills and instructions from each cubin.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..hardware.cards import ARCHITECTURES, Architecture
from ..strategies.choose import choose
from ..strategies.problem import Problem, interpreting
from ..strategies.table import STRATEGIES
from .absent_card import SPECIMENS, Specimen, _Compiled, absent_card
from .probe import Probe, without_memory

GATED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One compiled kernel; AMD kernels have no counts.

    `registers` are those of a thread, `spills` the 4-byte registers that it keeps in local memory,
    `occupancy` the resident warps of a multiprocessor over the most it holds.
    """

    kernel: str
    tile: str
    dtype: str
    arch: str
    registers: int | None
    spills: int | None
    shared_bytes: int
    shared_limit: int
    occupancy: float | None
    matrix_instructions: int | None

    @property
    def refusal(self) -> str | None:
        """Why the gate refuses this kernel; None if it passes."""
        if self.spills:
            return f"{self.spills} registers spill"
        if self.shared_bytes > self.shared_limit:
            return f"{self.shared_bytes} bytes of shared memory, {self.shared_limit} at most"
        return None


def training_step(specimen: Specimen, dtype: torch.dtype, arch: str, strategy: str) -> None:
    """Forward and backward on tensors without memory: every launch of a step on the card."""
    M, N, K, R, dropout, bias, conv1d, G, columns, pure = specimen
    tf32 = dtype is torch.float32
    problem = Problem(M, N, K, R, dtype, arch, dropout > 0, tf32, G, columns=columns)
    choice = choose(problem, strategy)
    if choice.strategy != strategy:
        return  # refused: `fused` for columns, all but `library` for sm_75
    if choice.tiles is None:  # `library`, which launches our kernels for masks alone
        if dropout:
            _library_masks(M, K, G, dtype)
        return
    adapter = dtype if pure else torch.float32
    probe = Probe(problem, choice, without_memory, bias=bias, conv1d=conv1d, adapter=adapter)
    x, dy = probe.inputs()
    probe.backward(x, dy, probe.forward(x))


def _library_masks(M: int, K: int, G: int, dtype: torch.dtype) -> None:
    from .. import kernels

    x, seed = torch.empty(M, K, dtype=dtype, device="meta"), torch.empty(1, device="meta").long()
    mask = kernels.draw_masks(seed, G, M, K, 0.1)
    kernels.apply_mask(kernels.apply_mask(x, mask[0]), mask[0], onto=x)


def compile_report(
    archs: Iterable[str],
    dtypes: Iterable[str] = tuple(DTYPES),
    keep: Path | None = None,
    specimens: Iterable[Specimen] = SPECIMENS,
) -> list[Row]:
    """A row for every kernel x shipped tile x dtype x architecture; cubins go into folder `keep`.

    Raises ValueError for an unknown architecture, RuntimeError under TRITON_INTERPRET.
    """
    archs, dtypes, specimens = list(archs), list(dtypes), list(specimens)
    for arch in archs:
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}: one of {', '.join(ARCHITECTURES)}")
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set: nothing is compiled in the interpreter; unset it"
        )
    rows: dict[Row, bytes] = {}
    for arch in archs:
        with absent_card(arch) as card:
            for dtype in dtypes:
                card.compiled.clear()
                for specimen, strategy in product(specimens, STRATEGIES):
                    card.specimen = specimen
                    training_step(specimen, DTYPES[dtype], arch, strategy)
                for compiled in card.compiled:
                    rows.setdefault(_row(compiled, arch, dtype), compiled.binary)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for row, binary in rows.items():
            kind = "cubin" if row.arch.startswith("sm_") else "hsaco"
            name = f"{row.arch}-{row.kernel}-{row.dtype}-{row.tile}.{kind}"
            Path(keep, name).write_bytes(binary)
    return list(rows)


def _row(compiled: _Compiled, arch: str, dtype: str) -> Row:
    limits, metadata = ARCHITECTURES[arch], compiled.metadata
    constants = {
        compiled.source.fn.arg_names[path[0]]: value
        for path, value in compiled.source.constants.items()
    }
    blocks = [f"{n[6:].lower()}{v}" for n, v in constants.items() if n.startswith("BLOCK")]
    flags = [n.lower() for n, v in constants.items() if v is True]
    layout = "conv1d" if compiled.specimen.conv1d else "linear"
    count = f"{'of' if compiled.specimen.columns else 'x'}{compiled.specimen.segments}"
    depth = [f"w{metadata.num_warps}", f"s{metadata.num_stages}"]
    tile = "-".join([*blocks, *depth, *flags, layout, count])
    registers = spills = matrix = occupancy = None
    if arch.startswith("sm_"):
        registers, spills, matrix = _inspect(compiled.binary)
        occupancy = _occupancy(limits, registers, metadata.shared, metadata.num_warps)
    return Row(
        metadata.name.strip("_"), tile, dtype, arch, registers, spills, metadata.shared,
        limits.program_shared * 1024, occupancy, matrix,
    )  # fmt: skip


def _inspect(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, spilled registers, matrix instructions) of a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        assembly = _run(knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    local = re.search(r"LOCAL:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if not (registers and local and stack):
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[-300:]}")
    spilled = max(int(local[1]), int(stack[1])) // 4
    matrix = len(re.findall(r"\b(?:[HIDQ]G?MMA|UTC\w*MMA)\b", assembly))
    return int(registers[1]), spilled, matrix


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _occupancy(limits: Architecture, registers: int, shared: int, warps: int) -> float:
    """Resident warps of a multiprocessor over the most it holds; `shared` in bytes."""
    per_warp = -(-registers * 32 // 256) * 256  # a warp gets registers in blocks of 256
    programs = min(
        limits.programs,
        limits.warps // warps,
        limits.registers // (per_warp * warps),
        limits.shared * 1024 // (shared + 1024),  # the system takes 1 KiB a program
    )
    return round(programs * warps / limits.warps, 3)


def render(rows: Iterable[Row]) -> str:
    """The rows as a table, then what the gate refuses and why."""
    rows = list(rows)
    lines = [
        f"{'kernel':<16} {'dtype':<9} {'arch':<7} {'regs':>4} {'spills':>6} {'shared':>7} "
        f"{'occup':>5} {'mma':>4}  tile"
    ]
    for row in rows:
        lines.append(
            f"{row.kernel:<16} {row.dtype:<9} {row.arch:<7} {_or_dash(row.registers):>4} "
            f"{_or_dash(row.spills):>6} {row.shared_bytes:>7} {_or_dash(row.occupancy):>5} "
            f"{_or_dash(row.matrix_instructions):>4}  {row.tile}"
        )
    refused = [row for row in rows if row.refusal]
    lines += [f"REFUSED {row.arch} {row.kernel} {row.tile}: {row.refusal}" for row in refused]
    lines.append(f"{len(rows)} kernels, {len(refused)} refused")
    return "\n".join(lines)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else str(value)


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [asdict(row) for row in rows]
