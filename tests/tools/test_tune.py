"""Tuned tables: what is measured is chosen; nothing is lost, nothing corrupt is applied."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels import STRATEGIES
from lora_kernels.hardware import tuned
from lora_kernels.hardware.tiles import DEFAULT_TILES, KERNELS, Tile, tiles_for
from lora_kernels.hardware.tuned import Tuned, load_table, store_rows
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem
from lora_kernels.tools import tune
from tests.support.oracle import DEVICE

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem(
    2048, 768, 768, 8, torch.bfloat16, "sm_86", dropout=True, gpu="NVIDIA GeForce RTX 3070"
)
MEASURED = Tile(64, 64, 64, 4, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    load_table.cache_clear()
    yield tmp_path
    load_table.cache_clear()


def row(strategy="split", us=12.5):
    return Tuned(strategy, {"low_rank_gemm": MEASURED}, us)


def test_a_measured_row_is_chosen_and_says_so():
    path = tuned.table_path(PROBLEM.gpu)
    assert "rtx-3070" in path.name and tuned.kernel_hash() in path.name and "triton" in path.name
    store_rows(path, PROBLEM.gpu, {PROBLEM.key: row()})
    choice = choose(PROBLEM)
    assert choice.strategy == "split" and choice.tiles.low_rank_gemm == MEASURED
    assert choice.tiles.project == tiles_for("any", 2, 8, tf32=False).project
    assert "measured on this card: 12 us" in choice.reason
    named = choose(PROBLEM, "split")
    assert named.tiles == choice.tiles
    assert named.reason == "named by the caller, with the tiles measured on this card"
    other = choose(PROBLEM, "hybrid")
    assert other.reason == "named by the caller" and other.tiles.low_rank_gemm != MEASURED
    other = Problem(2048, 768, 1024, 8, torch.bfloat16, "sm_86", dropout=True, gpu=PROBLEM.gpu)
    assert "cost model" in choose(other).reason


def test_a_row_that_cannot_is_not_chosen():
    sliced = replace(PROBLEM, segments=2, columns=True)
    store_rows(tuned.table_path(PROBLEM.gpu), PROBLEM.gpu, {sliced.key: row("fused")})
    assert choose(sliced).strategy != "fused"


def test_an_edited_kernel_makes_tuned_tables_another_s(tmp_path):
    copy = shutil.copytree(tuned.KERNEL_SOURCES, tmp_path / "kernels")
    assert tuned.kernel_hash(copy) == tuned.kernel_hash()
    edited = copy / "gradients.py"
    edited.write_text(edited.read_text().replace("acc += tl.load", "acc -= tl.load"))
    assert tuned.kernel_hash(copy) != tuned.kernel_hash()


def test_the_digest_of_no_kernels_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="no kernel sources in"):
        tuned.kernel_hash(tmp_path)


def test_one_row_serves_a_bucket_of_lengths_and_ranks_but_no_other():
    import dataclasses

    key = PROBLEM.key
    assert dataclasses.replace(PROBLEM, M=1025, R=16).key == key
    for change in ({"M": 1024}, {"R": 17}, {"dropout": False}, {"segments": 3}, {"N": 769}):
        assert dataclasses.replace(PROBLEM, **change).key != key


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"format": 99, "rows": {}}', '{"format": 1, "rows": {"k": {}}}',
        '{"format": 1, "rows": {"k": {"strategy": "split", "median_us": 1, "tiles": {"x": [1]}}}}',
    ],
)  # fmt: skip
def test_a_corrupt_table_is_ignored_with_one_warning_and_then_replaced(text):
    path = tuned.table_path(PROBLEM.gpu)
    path.write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        assert "cost model" in choose(PROBLEM).reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(PROBLEM)
    store_rows(path, PROBLEM.gpu, {PROBLEM.key: row()})
    assert choose(PROBLEM).strategy == "split"


IMPOSSIBLE = {
    "infinite": {"median_us": float("inf")},
    "no-number": {"median_us": float("nan")},
    "no-time": {"median_us": 0},
    "negative": {"median_us": -1.0},
    "endless": {"median_us": 10**400},
    "no-power-of-two": {"tiles": {"project": [48, 0, 64, 4, 4]}},
    "negative-size": {"tiles": {"project": [-32, 0, 64, 4, 4]}},
    "no-depth": {"tiles": {"low_rank_gemm": [64, 64, 0, 4, 4]}},
    "no-rows": {"tiles": {"low_rank_gemm": MEASURED, "project": [0, 0, 64, 4, 4]}},
    "three-warps": {"tiles": {"low_rank_gemm": [64, 64, 64, 3, 4]}},
    "no-stages": {"tiles": {"low_rank_gemm": [64, 64, 64, 4, 0]}},
    "half-a-stage": {"tiles": {"low_rank_gemm": [64, 64, 64, 4, 2.5]}},
    "four-sizes": {"tiles": {"low_rank_gemm": [64, 64, 64, 4]}},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_row_that_cannot_have_been_measured_is_ignored_alone(change):
    """The row of another length of the same layer stays, also when rows are added."""
    path, other = tuned.table_path(PROBLEM.gpu), replace(PROBLEM, M=4096)
    good = {"strategy": "split", "tiles": {"low_rank_gemm": MEASURED}, "median_us": 9.0}
    rows = {PROBLEM.key: good | change, other.key: good}
    path.write_text(json.dumps({"format": 1, "rows": rows}))
    with pytest.warns(UserWarning, match="is ignored") as caught:
        assert "cost model" in choose(PROBLEM).reason
        assert "measured on this card: 9 us" in choose(other).reason
    assert len(caught) == 1 and PROBLEM.key in str(caught[0].message)
    store_rows(path, PROBLEM.gpu, {"another": row()})
    assert set(load_table(path)) == {other.key, "another"}


def test_shipped_tiles_and_candidates_are_possible_rows():
    path = tuned.table_path("card")
    named = {
        f"{key} {kernel} {tile}": {kernel: tile}
        for key, row in DEFAULT_TILES.items()
        for kernel in KERNELS
        if (tiles_ := getattr(row, kernel.removesuffix("_dx")))
        for tile in (tiles_ if isinstance(tiles_[0], Tile) else (tiles_,))
    }
    named |= {
        f"{kernel} {tile}": {kernel: tile}
        for kernel, tiles_ in tune.CANDIDATES.items()
        for tile in tiles_
    }
    rows = {key: Tuned("split", tiles_, 1.0) for key, tiles_ in named.items()}
    tried = {tile for tiles_ in tune.CANDIDATES.values() for tile in tiles_}
    for arch in ("any", "sm_80", "sm_90"):
        row = DEFAULT_TILES[arch, 2, False]
        assert {*row.low_rank_gemm, *row.group_dx, *row.fused_gemm} <= tried
        assert {row.output_gradients, row.parameter_gradients} <= tried
    store_rows(path, "card", rows)
    assert load_table(path) == rows


def test_writers_at_the_same_time_lose_nothing(cache):
    """Eight processes add a row each to one file, again and again."""
    path = cache / "table.json"
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from lora_kernels.hardware.tuned import Tuned, store_rows\n"
        "path, me = Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(5):\n"
        "    store_rows(path, 'card', {f'{me}-{i}': Tuned('split', {}, 1.0)})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(i)], cwd=ROOT)
        for i in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert set(load_table(path)) == {f"{writer}-{i}" for writer in range(4) for i in range(5)}
    assert [p.name for p in cache.iterdir() if "table.json" in p.name] == ["table.json"]


def test_tuning_finds_the_fastest_strategy_and_tile(monkeypatch):
    """The measure is a made-up clock: only the choice is under test, on a tiny problem."""
    monkeypatch.setattr(
        tune, "CANDIDATES", {kernel: (Tile(16, 32, 16, 1, 1),) for kernel in KERNELS}
    )
    problem = Problem.on(DEVICE, 33, 32, 48, 3, torch.float32, dropout=False)
    seen = []
    real = tune.training_step

    def watched(problem, choice, device):
        step = real(problem, choice, device)
        step.choice = choice
        return step

    def clock(step):
        choice = step.choice
        seen.append(choice)
        time = {"library": 50.0, "split": 40.0, "fused": 30.0, "hybrid": 60.0}[choice.strategy]
        fast = choice.tiles is not None and choice.tiles.parameter_gradients.m == 16
        return time - 5 * fast

    monkeypatch.setattr(tune, "training_step", watched)
    lines = []
    rows = tune.tune([problem], DEVICE, measure=clock, report=lines.append)
    found = rows[problem.key]
    assert found.strategy == "fused" and found.median_us == 25.0
    assert found.tiles["parameter_gradients"] == Tile(16, 32, 16, 1, 1)
    assert found.tiles["fused_gemm"] != Tile(16, 32, 16, 1, 1)  # no faster: the shipped one stays
    assert "project" not in found.tiles  # which fused does not use
    assert {choice.strategy for choice in seen} == set(STRATEGIES)
    assert len(lines) == 1 and "fused 25.0 us" in lines[0]
    stored = load_table(tuned.table_path(problem.gpu or DEVICE.type))
    assert stored[problem.key] == found


def test_a_tile_that_changes_the_numbers_is_never_chosen(monkeypatch):
    problem = Problem.on(DEVICE, 33, 32, 48, 3, torch.float32, dropout=False)
    real = tune.training_step

    def broken(problem, choice, device):
        step = real(problem, choice, device)
        if choice.reason:  # a shipped choice has one, a candidate has none
            return step
        return lambda: tuple(t + 1 for t in step())

    monkeypatch.setattr(tune, "training_step", broken)
    monkeypatch.setattr(tune, "CANDIDATES", {k: (Tile(16, 32, 16, 1, 1),) for k in KERNELS})
    times = iter(range(1000, 0, -1))  # everything later is faster
    rows = tune.tune([problem], DEVICE, measure=lambda step: next(times), report=lambda line: None)
    assert Tile(16, 32, 16, 1, 1) not in rows[problem.key].tiles.values()


def test_another_order_of_sums_is_no_other_number():
    """A half-precision h that is rounded the other way shows in gradients held in float32."""
    problem = Problem.on(DEVICE, 512, 64, 64, 8, torch.float16, dropout=False)
    h, dy = torch.randn(512, 8), torch.randn(512, 64)
    gradient, other = (dy.T @ each.half().float() for each in (h, h * (1 + 2**-13)))
    assert (gradient - other).abs().max() > 100 * torch.finfo(torch.float32).eps
    assert tune._same(other, gradient, problem)
    assert not tune._same(gradient * 1.01, gradient, problem)
    assert not tune._same(other, gradient, replace(problem, dtype=torch.float32))


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_stored_where_nothing_runs(monkeypatch):
    problem = Problem.on(DEVICE, 33, 32, 48, 3, torch.float32, dropout=False)

    def gone(step):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match=r"no strategy runs .*M=33"):
        tune.tune([problem], DEVICE, measure=gone)
    assert not tuned.table_path(problem.gpu or DEVICE.type).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_one_clear_error(capsys):
    from lora_kernels import cli

    assert cli.main(["tune", "--model", "roberta-base"]) == 2
    assert "measures on a GPU" in capsys.readouterr().err
