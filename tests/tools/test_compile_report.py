"""Every kernel compiles for every card without one: no spill, shared memory within the card.

Nothing compiles in the interpreter, so the report runs in a process of its own. A whole gate takes
minutes (`make compile-gate`): a normal run compiles one dtype for one card, a nightly run all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from lora_kernels import cli
from lora_kernels.hardware.cards import ARCHITECTURES
from lora_kernels.hardware.tiles import shipped
from lora_kernels.tools import compile_report
from lora_kernels.tools.compile_report import DTYPES, GATED, Row, render

pytest.importorskip("triton")

SAMPLE = "sm_86", "bfloat16"
PAIRS = [
    pytest.param(
        arch, dtype,
        marks=[] if (arch, dtype) == SAMPLE else [pytest.mark.nightly, pytest.mark.slow],
    )
    for arch in GATED
    for dtype in DTYPES
]  # fmt: skip

ELEMENTWISE = {
    "add_partials", "add_splits", "draw_masks", "apply_mask", "scale_columns",
    "scale_columns_backward",
}  # fmt: skip


def run(*arguments, **environment):
    command = [sys.executable, "-m", "lora_kernels.cli", "compile-report", *arguments]
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("arch", "dtype"), PAIRS)
def test_the_gate(arch, dtype, tmp_path):
    done = run("--arch", arch, "--dtype", dtype, "--json", "--keep", str(tmp_path))
    rows = json.loads(done.stdout)
    refused = [row for row in rows if row["spills"] or row["shared_bytes"] > row["shared_limit"]]
    assert done.returncode == 0 and not refused, refused or done.stderr
    assert {row["kernel"] for row in rows} == {
        "project", "low_rank_gemm", "fused_gemm", "column_gradients", "row_gains", *ELEMENTWISE,
    }  # fmt: skip
    for row in rows:
        assert row["arch"] == arch and row["dtype"] == dtype
        assert 0 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1
        assert (row["matrix_instructions"] > 0) == (row["kernel"] not in ELEMENTWISE)
        # A mask is loaded in words, but where its rows are odd (97 bytes, for K = 773).
        if row["kernel"] in ("low_rank_gemm", "fused_gemm") and "even_k" in row["tile"]:
            assert row["byte_loads"] == 0, row
        name = f"{arch}-{row['kernel']}-{dtype}-{row['tile']}.cubin"
        assert (tmp_path / name).read_bytes()[:4] == b"\x7fELF"
    compiled = {re.sub("-r[0-9]+-(w.*?-s.*?)-.*", r"-\1", row["tile"]) for row in rows}
    ranks, size = (16, 64), 4 if dtype == "float32" else 2
    for tiles in (shipped(arch, size, R) for R in ranks):
        for m, n, k, warps, stages in {
            *tiles.low_rank_gemm,
            *tiles.dx,
            *tiles.group_dx,
            *tiles.fused_gemm,
        }:
            assert f"m{m}-n{n}-k{k}-w{warps}-s{stages}" in compiled
    masked = [row for row in rows if row["kernel"] == "column_gradients" and "mask" in row["tile"]]
    assert any(row["byte_loads"] == 0 for row in masked)


def test_a_card_without_matrix_instructions_for_triton_draws_masks():
    done = run("--arch", "sm_75", "--dtype", "float16", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert {row["kernel"] for row in rows} == {"draw_masks", "apply_mask"}


def test_the_gate_refuses_spills_and_too_much_shared_memory(capsys, monkeypatch):
    fine = Row("k", "t", "float16", "sm_86", 128, 0, 1000, 2000, 2, 0.3, 4, 0)
    spilled = fine._replace(registers=255, spills=7)
    wide = fine._replace(shared_bytes=3000)
    assert fine.refusal is None
    assert "7 registers" in str(spilled.refusal) and "3000 bytes" in str(wide.refusal)
    assert "3 kernels, 2 refused" in render([fine, spilled, wide])
    for rows, code in (([fine], 0), ([fine, spilled], 1)):
        monkeypatch.setattr(compile_report, "compile_report", lambda *_, rows=rows: rows)
        assert cli.main(["compile-report"]) == code
    capsys.readouterr()


def test_programs_by_hand():
    # 128 registers x 32 lanes x 8 warps = 32768 of 65536: two programs of 8 warps among 48.
    limits = ARCHITECTURES["sm_86"]
    assert compile_report._programs(limits, 128, 32768, 8) == 2
    assert compile_report._programs(limits, 129, 32768, 8) == 1
    # Shared memory: 49 KiB and the system's one fit twice into 100 KiB.
    assert compile_report._programs(limits, 32, 49 * 1024, 4) == 2
    # 16 programs are the most, however small.
    assert compile_report._programs(limits, 32, 0, 1) == 16


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="unknown architecture 'sm_42'"):
        compile_report.compile_report(["sm_42"])
    done = run("--arch", "sm_86", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
