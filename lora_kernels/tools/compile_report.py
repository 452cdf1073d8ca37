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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..hardware.cards import ARCHITECTURES, Architecture
from ..hardware.tiles import Tiles, shipped
from ..strategies.choose import choose
from ..strategies.problem import Problem, interpreting
from ..strategies.table import STRATEGIES, triton_supports
from .absent_card import absent_card
from .probe import Probe, without_memory
from .shapes import LAYERS, Layer

GATED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# (layer, M, R, dropout, pure, adapters). Ragged sizes, ranks up to 64 and every flag occur in some
# row. Adapters are fp32, as in mixed precision, or those of a `pure` row in the dtype of x.
Specimen = tuple[Layer, int, int, bool, bool, int]
SPECIMENS: tuple[Specimen, ...] = (
    (LAYERS["roberta-base.query"], 4096, 16, True, False, 1),
    (LAYERS["gpt2.c_fc"], 4096, 8, False, True, 1),
    (LAYERS["roberta-base.down"]._replace(bias=False), 4096, 64, True, False, 1),
    (Layer("ragged", 773, (771,), ("ragged",)), 1000, 3, True, False, 1),
    # Rows of masks of 200 bytes, which 16 does not divide.
    (Layer("gpt2-xl", 1600, (1600,), ("c_proj",)), 4096, 8, True, False, 1),
    (LAYERS["roberta-base.qkv"], 4096, 8, True, False, 1),
    (LAYERS["roberta-base.qkv"], 4096, 8, False, False, 1),
    (LAYERS["roberta-base.qkv"], 4096, 64, True, False, 1),
    (LAYERS["gpt2.c_attn.qv"], 4096, 8, True, False, 1),
    (LAYERS["roberta-base.query"], 4096, 16, True, False, 4),
    (LAYERS["roberta-base.qkv"], 4096, 8, True, False, 4),
    (LAYERS["roberta-base.qkv"], 4096, 64, False, False, 4),
    (LAYERS["gpt2.c_attn.qv"], 4096, 8, True, True, 4),
    (LAYERS["llama-8b.k_proj"]._replace(nf4=True), 512, 16, True, False, 1),
    (Layer("ragged", 832, (832,), ("ragged",), nf4=True), 1000, 64, True, False, 1),
)


class Row(NamedTuple):
    """One compiled kernel; AMD kernels have no counts.

    `registers` are those of a thread, `spills` the 4-byte registers that it keeps in local memory,
    `programs` how many a multiprocessor holds at a time, `occupancy` their warps over the most it
    holds, `byte_loads` the instructions that load a single byte of global memory.
    """

    kernel: str
    tile: str
    dtype: str
    arch: str
    registers: int | None
    spills: int | None
    shared_bytes: int
    shared_limit: int
    programs: int | None
    occupancy: float | None
    matrix_instructions: int | None
    byte_loads: int | None

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
    layer, M, R, dropout, pure, adapters = specimen
    K, G, tf32 = layer.K, len(layer.children), dtype is torch.float32
    problem = Problem(
        M, max(layer.N), K, R, dtype, arch, dropout, tf32,
        segments=G, columns=layer.columns, nf4=layer.nf4,
    )  # fmt: skip
    choice = choose(problem, strategy)
    if choice.strategy != strategy:
        return  # refused: `fused` for columns, all but `library` for sm_75
    adapter = dtype if pure else torch.float32
    if choice.tiles is None:  # `library`, which launches our kernels for masks alone, and DoRA's
        from .. import kernels

        x = torch.empty(M, K, dtype=dtype, device="meta")
        if dropout:
            seed = torch.empty(1, dtype=torch.int64, device="meta")
            mask = kernels.draw_masks(seed, G, M, K, 0.1)[0]
            kernels.apply_mask(kernels.apply_mask(x, mask), mask, onto=x)
        if triton_supports(problem) is None and not (layer.columns or layer.nf4):
            weight = x.new_empty(K, problem.N).T if layer.conv1d else x.new_empty(problem.N, K)
            A, B = (
                weight.new_empty(R, K, dtype=adapter),
                weight.new_empty(problem.N, R, dtype=adapter),
            )
            gain, _ = kernels.row_gains(weight, A, B, B.new_empty(problem.N), 2.0, precision="tf32")
            y = kernels.scale_columns(
                x.new_empty(M, problem.N), gain, x.new_empty(problem.N) if layer.bias else None
            )
            kernels.scale_columns_backward(y, y, gain)
        return
    for tiles in _each_shipped(problem, choice.tiles):
        choice = replace(choice, tiles=tiles)
        probe = Probe(problem, choice, without_memory, layer.bias, layer.conv1d, adapter, adapters)
        x, dy = probe.inputs()
        probe.backward(x, dy, probe.forward(x))


def _each_shipped(problem: Problem, tiles: Tiles) -> Iterator[Tiles]:
    """The tiles with, in turn, all that are shipped for its GEMMs: sizes of outputs decide."""
    if problem.nf4:  # one tile for all
        yield tiles
        return
    row = shipped(problem.arch, problem.dtype.itemsize, problem.R, aligned=problem.aligned)
    dx = row.dx_of(problem.segments)
    for i in range(max(len(row.low_rank_gemm), len(dx), len(row.fused_gemm))):
        fused = row.fused_gemm[i % len(row.fused_gemm)]
        yield tiles._replace(
            low_rank_gemm=row.low_rank_gemm[i % len(row.low_rank_gemm)],
            low_rank_gemm_dx=dx[i % len(dx)], fused_gemm=fused, fused_gemm_dx=fused,
        )  # fmt: skip


def compile_report(
    archs: Sequence[str], dtypes: Sequence[str] = tuple(DTYPES), keep: Path | None = None
) -> list[Row]:
    """A row for every kernel x shipped tile x dtype x architecture; cubins go into folder `keep`.

    Raises ValueError for an unknown architecture, RuntimeError under TRITON_INTERPRET.
    """
    for arch in archs:
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}: one of {', '.join(ARCHITECTURES)}")
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: nothing compiles in the interpreter: unset it")
    rows: dict[Row, bytes] = {}
    for arch in archs:
        with absent_card(arch) as card:
            for dtype, specimen in product(dtypes, SPECIMENS):
                card.compiled.clear()
                for strategy in STRATEGIES:
                    training_step(specimen, DTYPES[dtype], arch, strategy)
                for source, metadata, binary in card.compiled:
                    row = _row(source, metadata, binary, specimen[0], dtype, arch)
                    rows.setdefault(row, binary)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for row, binary in rows.items():
            kind = "cubin" if row.arch.startswith("sm_") else "hsaco"
            name = f"{row.arch}-{row.kernel}-{row.dtype}-{row.tile}.{kind}"
            Path(keep, name).write_bytes(binary)
    return list(rows)


def _row(source: Any, metadata: Any, binary: bytes, layer: Layer, dtype: str, arch: str) -> Row:
    names, limits, shared = source.fn.arg_names, ARCHITECTURES[arch], metadata.shared
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    blocks = [f"{n[6:].lower()}{v}" for n, v in constants.items() if n.startswith("BLOCK")]
    flags = [n.lower() for n, v in constants.items() if v is True]
    layout = "conv1d" if layer.conv1d else "linear"
    count = f"{'of' if layer.columns else 'x'}{len(layer.children)}"
    depth = [f"w{metadata.num_warps}", f"s{metadata.num_stages}"]
    tile = "-".join([*blocks, *depth, *flags, layout, count])
    registers = spills = matrix = byte_loads = programs = occupancy = None
    if arch.startswith("sm_"):
        registers, spills, matrix, byte_loads = _inspect(binary)
        programs = _programs(limits, registers, shared, metadata.num_warps)
        occupancy = round(programs * metadata.num_warps / limits.warps, 3)
    return Row(
        metadata.name.strip("_"), tile, dtype, arch, registers, spills, shared,
        limits.program_shared * 1024, programs, occupancy, matrix, byte_loads,
    )  # fmt: skip


def _inspect(cubin: bytes) -> tuple[int, int, int, int]:
    """(registers a thread, spilled registers, matrix instructions, byte loads) of a cubin."""
    from triton import knobs

    def output(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        assembly = output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    if len(counts) < 3:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[-300:]}")
    matrix = re.findall(r"\b(?:[HIDQ]G?MMA|UTC\w*MMA)\b", assembly)
    byte_loads = re.findall(r"\bLDG\.E\.[US]8\b", assembly)
    spills = max(int(counts["STACK"]), int(counts["LOCAL"])) // 4
    return int(counts["REG"]), spills, len(matrix), len(byte_loads)


def _programs(limits: Architecture, registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor holds at a time; `shared` in bytes."""
    per_warp = -(-registers * 32 // 256) * 256  # a warp gets registers in blocks of 256
    return min(
        limits.programs,
        limits.warps // warps,
        limits.registers // (per_warp * warps),
        limits.shared * 1024 // (shared + 1024),  # the system takes 1 KiB a program
    )


def render(rows: Sequence[Row]) -> str:
    """The rows as a table, then what the gate refuses and why."""
    line = "{:<16} {:<9} {:<7} {:>4} {:>6} {:>7} {:>5} {:>5} {:>4} {:>5}  {}".format
    counted = ("regs", "spills", "shared", "progs", "occup", "mma", "bytes")
    lines = [line("kernel", "dtype", "arch", *counted, "tile")]
    for row in rows:
        counts = row[4:7] + row[8:]  # all but the limit, which is the card's
        cells = ["-" if n is None else str(n) for n in counts]
        lines.append(line(row.kernel, row.dtype, row.arch, *cells, row.tile))
    refused = [row for row in rows if row.refusal]
    lines += [f"REFUSED {row.arch} {row.kernel} {row.tile}: {row.refusal}" for row in refused]
    return "\n".join([*lines, f"{len(rows)} kernels, {len(refused)} refused"])
